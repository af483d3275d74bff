"""MetaFormer vision backbones in JAX/Flax.

`create_model`, `list_models` and `get_spec` load on first use, so importing
the package costs nothing and pulls in neither TensorFlow nor torch.
"""

__version__ = "0.1.0"

__all__ = ["create_model", "get_spec", "list_models"]


def __getattr__(name):
  if name in __all__:
    from metaformer_jax.models import registry  # noqa: PLC0415

    return getattr(registry, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *__all__])
