"""Weights of other frameworks, read without them; nothing in a file is run."""
