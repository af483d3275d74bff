"""Programs besides training: `python -m metaformer_jax.tools.NAME`."""
