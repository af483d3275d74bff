"""Augmentation on the host: random choice, and its effect on pixels."""
