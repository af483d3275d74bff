"""What the TPU's compiler says of a training step; `tools.preflight` tells."""
