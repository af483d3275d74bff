"""MetaFormer vision backbones in JAX/Flax.

What is below loads on first use, so importing the package costs nothing and
pulls in neither TensorFlow nor torch.
"""

import importlib

__version__ = "0.1.0"

_WHERE = {
    "check_mixer": "models.check_mixer",
    "create_model": "models.registry",
    "get_spec": "models.registry",
    "list_models": "models.registry",
    "load": "inference",
    "load_pretrained": "checkpoints.pretrained",
}

__all__ = [*_WHERE]


def __getattr__(name):
  if name in _WHERE:
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
  return sorted([*globals(), *__all__])
