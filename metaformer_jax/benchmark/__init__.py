"""What `tools.benchmark` measures, each program in a process of its own."""
