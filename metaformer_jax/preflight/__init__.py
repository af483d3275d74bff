"""Compiles a training step for a TPU that is not here; for tools.preflight."""
