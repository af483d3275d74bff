"""What the registry knows of a model; no jax, as configs are checked by it."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """One row of the model table.

  Attributes:
    name: as in timm and the official repositories.
    family: which conversion rules its weights follow (`convert.rules`).
    module: where its class is, as "package.module:Class"; loaded on first use.
    hparams: every hyper-parameter that the class takes from the table; these,
      and no others, can be overridden by `create_model` and `config.model`.
    n_params: exact number of trainable parameters.
    gmacs: published multiply-accumulates in units of 1e9, at `input_size`;
      None where none are. `models.cost` counts those of the traced program.
    top1: published ImageNet-1K top-1 accuracy in percent; None where there is
      none.
    source: where `gmacs` and `top1` are published.
    checkpoint: public name of the published weights; None where none are.
    num_classes: outputs of the head.
    n_frozen: exact number of frozen values, which are not trained.
    input_size: side of the square training image in pixels.
    crop_pct: evaluation resizes the shorter side to
      floor(input_size / crop_pct), then takes the centre.
    interpolation: of that resize.
    mean, std: of the RGB channels, for images scaled to [0, 1].
  """

  name: str
  family: str
  module: str
  hparams: Mapping[str, Any]
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
