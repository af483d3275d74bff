"""Pure JAX and Flax models: no data, no config, no TensorFlow."""
