"""The task section of semantic segmentation."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from metaformer_jax.config.tasks import base
from metaformer_jax.models.options import option

if TYPE_CHECKING:
  from metaformer_jax.config.schema import Experiment
  from metaformer_jax.models.settings import Family

# The label of pixels that do not count; labels are uint8.
IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Segmentation(base.Task):
  """Semantic segmentation: a class for each pixel.

  The defaults are those of Semantic FPN on ADE20K (arXiv 2111.11418; the
  official repository's segmentation/configs, for mmsegmentation 0.19).
  """

  MEASURES = (base.Measure("miou", True, is_fraction=True),
              base.Measure("mean_accuracy", True, is_fraction=True),
              base.Measure("pixel_accuracy", True, is_fraction=True))
  RESUMABLE = ("eval_align", "eval_mode", "eval_stride", "eval_scales",
               "eval_flip", "eval_canvases")

  name: str = option("segmentation", "what is learned")
  num_classes: int | None = option(
      None, "outputs of the model's head; None: the data's classes", low=1,
      high=255)
  class_names: tuple[str, ...] | None = option(
      None, "names of the classes, by label; None: the data's, if it has any")
  reduce_zero_label: bool | None = option(
      None, "label 0 does not count, and the others are lowered by one; None: "
      "true for ADE20K")

  head: str = option("semantic_fpn", "the decoder",
                     choices=("semantic_fpn", "upernet"))
  feature_norm: str | None = option(
      None, "norm of each of the backbone's outputs; None: that of its blocks "
      "if it is a MetaFormer, layer_norm for one with a single scale, else "
      "none", choices=("batch_norm", "group_norm", "layer_norm", "none"))
  fpn_dim: int = option(256, "semantic_fpn: channels of the pyramid", low=1)
  head_dim: int | None = option(
      None, "channels of the head; None: 128 for semantic_fpn, 512 for upernet",
      low=1)
  head_drop_rate: float = option(
      0.1, "probability that a channel is dropped before the last layer", low=0,
      high=0.999)
  pool_sizes: tuple[int, ...] = option(
      (1, 2, 3, 6), "upernet: sides of the pyramid pooling's grids", low=1)
  auxiliary_weight: float = option(
      0.0, "weight of the loss of an FCN head on the last output but one; 0: "
      "no such head", low=0)
  auxiliary_dim: int = option(256, "channels of that head", low=1)

  scale: tuple[int, ...] = option(
      (2048, 512), "images are resized, keeping their ratio, to fit into this "
      "rectangle, longer side first", low=1, length=2)
  scale_range: tuple[float, ...] = option(
      (0.5, 2.0), "training: by which the rectangle is multiplied", above=0,
      length=2)
  crop_size: tuple[int, ...] = option(
      (512, 512), "training: height and width of the crop", low=1, length=2)
  cat_max_ratio: float = option(
      0.75, "training: largest part of a crop that one class should have; 1: "
      "any", above=0, high=1)
  flip: float = option(0.5, "probability of a left-right flip", low=0, high=1)
  photometric: bool = option(
      True, "training: distort brightness, contrast, saturation and hue")

  eval_align: int = option(
      32, "evaluation: sides are stretched to a multiple of it; 1: not", low=1)
  eval_mode: str = option(
      "whole", "whole: the image at once; slide: windows of crop_size",
      choices=("slide", "whole"))
  eval_stride: tuple[int, ...] = option(
      (341, 341), "slide: rows and columns between windows", low=1, length=2)
  eval_scales: tuple[float, ...] = option(
      (1.0,), "evaluation averages over these multiples of scale", above=0)
  eval_flip: bool = option(False, "evaluation averages over the mirrored image")
  eval_canvases: int = option(
      4, "padded sizes that evaluation images are grouped into; each is "
      "compiled once", low=1, high=64)

  @property
  def input_size(self) -> tuple[int, int]:
    height, width = self.crop_size
    return height, width

  def check(self, cfg: "Experiment", files: bool) -> Iterator[str]:
    del files
    yield from base.check_images(cfg, "crop_size", *self.crop_size)
    low, high = self.scale_range
    if low > high:
      yield (f"config.task.scale_range: ({low}, {high}) is not in ascending "
             "order")
    names, n = self.class_names, self.num_classes
    if names is not None and n is not None and len(names) != n:
      yield (f"config.task.class_names: {len(names)} names, but "
             f"config.task.num_classes is {n}")
    for key in ("pool_sizes", "eval_scales"):
      if not getattr(self, key):
        yield f"config.task.{key}: is empty; give at least one"
    if self.eval_mode == "slide":
      for stride, side in zip(self.eval_stride, self.crop_size):
        if stride > side:
          yield (f"config.task.eval_stride: {stride} leaves a gap between "
                 f"windows of {side}; largest: {side}")

  def check_model(self, settings: "Family") -> Iterator[str]:
    if settings.fixed_size and self.eval_mode == "whole":
      yield ("config.task.eval_mode: whole, but the model takes images of one "
             "size only; slide evaluates windows of config.task.crop_size")
