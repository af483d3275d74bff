"""The model table: names to specs to modules. Imports jax on creation only."""

import fnmatch
from typing import Any

from metaformer_jax import errors
from metaformer_jax.models import baselines, compared, poolformer, pyramids
from metaformer_jax.models import spec as spec_lib

_MODELS: dict[str, spec_lib.ModelSpec] = {
    **poolformer.MODELS, **baselines.MODELS, **compared.MODELS,
    **pyramids.MODELS}


def list_models(pattern: str = "*") -> list[str]:
  """Returns the sorted names that match a shell pattern ("poolformer_s*")."""
  return sorted(fnmatch.filter(_MODELS, pattern))


def get_spec(name: str) -> spec_lib.ModelSpec:
  """Returns the table's row; ValueError names the nearest to an unknown."""
  if name not in _MODELS:
    raise ValueError(
        f"unknown model {name!r}{errors.did_you_mean(name, _MODELS)}")
  return _MODELS[name]


def create_model(name: str, *, num_classes: int | None = None,
                 drop_path_rate: float = 0.0, dtype: Any = None,
                 **overrides: Any):
  """Builds the Linen module of a named model.

  Args:
    name: one of `list_models()`.
    num_classes: outputs of the head, by default as published; 0 builds no
      head, and the model returns the pooled features.
    drop_path_rate: stochastic depth of the last block, growing linearly from
      0 at the first (arXiv 1603.09382).
    dtype: of the computation, e.g. `jnp.bfloat16`; None is float32.
      Parameters are float32 either way.
    **overrides: hyper-parameters of the table's row to set otherwise, e.g.
      `pool_size=5` or `token_mixers=("pooling",) * 3 + ("attention",)`.

  Returns:
    An unbound module: `model.init(rng, images)`,
    `model.apply(variables, images, train=False)`.

  Raises:
    ValueError: unknown name or hyper-parameter.
  """
  spec = get_spec(name)
  for key in overrides:
    if key not in spec.hparams:
      raise ValueError(f"{name} has no hyper-parameter {key!r}"
                       f"{errors.did_you_mean(key, spec.hparams)}")
  if num_classes is None:
    num_classes = spec.num_classes
  return spec.load_class()(
      **{**spec.hparams, **overrides}, num_classes=num_classes,
      drop_path_rate=drop_path_rate, dtype=dtype)
