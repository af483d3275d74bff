"""A row of the model table. No jax: configs are checked against it."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

from metaformer_jax import errors
from metaformer_jax.models import settings as settings_lib

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """One row of the model table.

  Attributes:
    name: as in timm and the official repositories.
    family: which conversion rules its weights follow (`convert.rules`).
    module: its class, as "package.module:Class"; imported on first use.
    settings: its hyper-parameters; `create_model` and `config.model` can
      override each of them, and no others.
    n_params: exact number of trainable parameters.
    gmacs: published multiply-accumulates in units of 1e9, at `input_size`;
      None if not published. `models.cost` counts those of the traced program.
    top1: published ImageNet-1K top-1 accuracy in percent, or None.
    source: where `gmacs` and `top1` are published.
    checkpoint: public name of the published weights, or None.
    num_classes: outputs of the head.
    n_frozen: exact number of values that are not trained.
    input_size: side of the square training image in pixels.
    crop_pct: evaluation resizes the shorter side to
      floor(input_size / crop_pct), then takes the centre.
    interpolation: of that resize.
    mean, std: of the RGB channels, for images scaled to [0, 1].
  """

  name: str
  family: str
  module: str
  settings: settings_lib.Family
  n_params: int
  gmacs: float | None
  top1: float | None
  source: str
  checkpoint: str | None
  num_classes: int = 1000
  n_frozen: int = 0
  input_size: int = 224
  crop_pct: float = 0.9
  interpolation: str = "bicubic"
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def load_class(self) -> Callable[..., Any]:
    module, name = self.module.split(":")
    return getattr(importlib.import_module(module), name)

  def has(self, key: str) -> bool:
    """Whether the model has a hyper-parameter of this name."""
    return key in _names(self.settings)

  def suggest(self, key: str) -> str:
    """What to use instead of a hyper-parameter that the model does not have.

    Returns:
      "; pvt has it", if other families have it, then the nearest valid name.
    """
    owners = [name for name, family in settings_lib.FAMILIES.items()
              if key in _names(family)]
    whose = f"; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it"
    return (whose if owners else "") + errors.did_you_mean(
        key, _names(self.settings))

  def override(self, **overrides: Any) -> settings_lib.Family:
    """The settings with other values; ValueError if a name is unknown."""
    for key in overrides:
      if not self.has(key):
        raise ValueError(
            f"{self.name} has no hyper-parameter {key!r}{self.suggest(key)}")
    return dataclasses.replace(self.settings, **overrides)


def _names(family: settings_lib.Family | type[settings_lib.Family]) -> set[str]:
  return {f.name for f in dataclasses.fields(family)}
