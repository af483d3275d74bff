"""Data sets: random access to records. Each source checks itself."""
