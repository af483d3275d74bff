"""Augmentation on the host: what is drawn, and the pixels it changes."""
