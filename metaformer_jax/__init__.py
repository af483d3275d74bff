"""MetaFormer vision backbones in JAX/Flax.

What is below loads on first use, so importing the package costs nothing and
pulls in neither TensorFlow nor torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from metaformer_jax.checkpoints.pretrained import load_pretrained
  from metaformer_jax.inference import load
  from metaformer_jax.models.check_mixer import check_mixer
  from metaformer_jax.models.registry import (
    create_model,
    get_spec,
    list_models,
  )

__version__ = "0.1.0"

_WHERE = {
    "check_mixer": "models.check_mixer",
    "create_model": "models.registry",
    "get_spec": "models.registry",
    "list_models": "models.registry",
    "load": "inference",
    "load_pretrained": "checkpoints.pretrained",
}

__all__ = ["check_mixer", "create_model", "get_spec", "list_models", "load",
           "load_pretrained"]


def __getattr__(name: str) -> Any:
  if name in _WHERE:
    module = importlib.import_module(f"{__name__}.{_WHERE[name]}")
    return getattr(module, name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
