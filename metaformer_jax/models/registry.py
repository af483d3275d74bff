"""The model table: names to specs to modules. Only `create_model` needs jax."""

import fnmatch
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from metaformer_jax import errors, imports
from metaformer_jax.models import (
  baselines,
  compared,
  compiling,
  poolformer,
  pyramids,
)
from metaformer_jax.models import spec as spec_lib

if TYPE_CHECKING:
  from flax import linen as nn

_MODELS: dict[str, spec_lib.ModelSpec] = {
    **poolformer.MODELS, **baselines.MODELS, **compared.MODELS,
    **pyramids.MODELS}


def list_models(pattern: str = "*") -> list[str]:
  """Returns the sorted names that match a shell pattern ("poolformer_s*")."""
  return sorted(fnmatch.filter(_MODELS, pattern))


def get_spec(name: str) -> spec_lib.ModelSpec:
  """Returns the table's row; ValueError names the nearest if it is unknown."""
  if name not in _MODELS:
    raise ValueError(
        f"unknown model {name!r}{errors.did_you_mean(name, _MODELS)}")
  return _MODELS[name]


def create_model(name: str, *, num_classes: int | None = None,
                 dtype: Any = None, compile: compiling.Compile | None = None,
                 **overrides: Any) -> "nn.Module":
  """Builds the Linen module of a named model.

  Args:
    name: one of `list_models()`; or the import path of a user's own, which is
      called with the other arguments, without the overrides' checks.
    num_classes: outputs of the head, by default as published; 0 builds no
      head, and the model returns the pooled features.
    dtype: of the computation, e.g. `jnp.bfloat16`; None is float32.
      Parameters are float32 either way.
    compile: how it is compiled; only a MetaFormer has a choice.
    **overrides: hyper-parameters that differ from the table's row, e.g.
      `drop_path_rate=0.1`, `pool_size=5` or
      `token_mixers=("pooling",) * 3 + ("attention",)`; see `models.settings`.

  Returns:
    An unbound module: `model.init(rng, images)`,
    `model.apply(variables, images, train=False)`.

  Raises:
    ValueError: unknown name or hyper-parameter, or what `compile` asks for is
      not for this model.
    ConfigError: it is an import path of something else.
  """
  default = compiling.Compile()
  compile = compile or default
  if imports.is_path(name):
    _require(compile.check(name, None))
    return imports.call(name, "a model, model(num_classes=, dtype=)",
                        num_classes=num_classes, dtype=dtype, **overrides)
  spec = get_spec(name)
  settings = spec.override(**overrides)
  if num_classes is None:
    num_classes = spec.num_classes
  _require(compile.check(name, settings))
  also = {} if compile == default else {"compile": compile}
  return spec.load_class()(
      **vars(settings), num_classes=num_classes, dtype=dtype, **also)


def _require(problems: Iterable[str]) -> None:
  """Raises a ValueError with all problems of `compiling.Compile.check`."""
  problems = list(problems)
  if problems:
    raise ValueError("; also ".join(f"compile.{line}" for line in problems))
