"""Measures over a whole evaluation split, each example exactly once."""
