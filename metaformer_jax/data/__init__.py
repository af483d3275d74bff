"""Sources, transforms and the loader: from files to batches, without jax."""
