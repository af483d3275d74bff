"""Checks of a machine and its installation; for tools.doctor."""
