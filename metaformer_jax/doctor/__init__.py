"""What a machine has, and whether it goes together; `tools.doctor` tells."""
