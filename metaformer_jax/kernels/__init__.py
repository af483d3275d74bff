"""TPU kernels, each beside the plain function that it must equal."""
