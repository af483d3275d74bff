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
    module: where its class is, as "package.module:Class"; loaded on first use.
    hparams: every hyper-parameter that the class takes from the table; these,
      and no others, can be overridden by `create_model` and `config.model`.
    n_params: exact number of trainable parameters, 1000 classes.
    gmacs: published multiply-accumulates in units of 1e9, at `input_size`.
    top1: published ImageNet-1K top-1 accuracy in percent.
    source: where `gmacs` and `top1` are published.
    input_size: side of the square training image in pixels.
    crop_pct: evaluation resizes the shorter side to
      floor(input_size / crop_pct), then takes the centre.
    interpolation: of that resize.
    mean, std: of the RGB channels, for images scaled to [0, 1].
  """

  name: str
  module: str
  hparams: Mapping[str, Any]
  n_params: int
  gmacs: float
  top1: float
  source: str
  input_size: int = 224
  crop_pct: float = 0.9
  interpolation: str = "bicubic"
  mean: tuple[float, float, float] = IMAGENET_MEAN
  std: tuple[float, float, float] = IMAGENET_STD

  def load_class(self) -> Callable[..., Any]:
    module, name = self.module.split(":")
    return getattr(importlib.import_module(module), name)
