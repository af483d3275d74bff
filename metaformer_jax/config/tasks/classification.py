"""The task section of image classification."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from metaformer_jax import errors
from metaformer_jax.config import paths, policies
from metaformer_jax.config.tasks import base
from metaformer_jax.models.options import option

if TYPE_CHECKING:
  from metaformer_jax.config.schema import Experiment

_MAX_OPERATIONS = 100  # Of RandAugment, per image.
_MAX_SIDE_ON_DEVICE = 4096  # `ops.augment.MAX_SIDE`; sums are in 32 bits.


@dataclasses.dataclass(frozen=True)
class Classification(base.Task):
  """Image classification: one label per image."""

  MEASURES = (base.Measure("top1", True, is_fraction=True),
              base.Measure("top5", True, is_fraction=True),
              base.Measure("loss", False))
  RESUMABLE = ("eval_labels", "real_path")
  PER_HOST = ("real_path",)
  AUGMENTS_ON = ("device", "host")

  name: str = option("classification", "what is learned")
  num_classes: int | None = option(
      None, "outputs of the model's head; None: the data's classes", low=1)
  class_names: tuple[str, ...] | None = option(
      None, "names of the classes, by which the data's are numbered; None: the "
      "data's, if it has any")
  image_size: int | None = option(
      None, "side of the square input in pixels; None: the model's", low=1)
  crop_pct: float | None = option(
      None, "evaluation: resize the shorter side to floor(image_size / "
      "crop_pct), then crop the centre; None: the model's", low=0.1, high=1)
  interpolation: str | None = option(
      None, "of the evaluation's resize; None: the model's",
      choices=("bilinear", "bicubic"))
  train_interpolation: str = option(
      "random", "of the training crop's resize; random: either one, per image",
      choices=("bilinear", "bicubic", "random"))
  crop_area: tuple[float, ...] = option(
      (0.08, 1.0), "RandomResizedCrop: area relative to the image's",
      above=0, high=1, length=2)
  crop_ratio: tuple[float, ...] = option(
      (3 / 4, 4 / 3), "RandomResizedCrop: width over height", above=0, length=2)
  flip: float = option(0.5, "probability of a left-right flip", low=0, high=1)
  auto_augment: str = option(
      "", "after crop and flip, in timm's notation: rand-m9-mstd0.5-inc1; 3a; "
      "empty: none")
  color_jitter: float = option(
      0.0, "largest change of brightness, contrast and saturation; ignored "
      "with rand", low=0)
  repeats: int = option(
      1, "repeated augmentation: each image comes this often in a row, and an "
      "epoch has as many fewer images", low=1)
  loss: str = option(
      "ce", "ce: softmax cross-entropy; bce: binary cross-entropy per class",
      choices=("bce", "ce"))
  bce_threshold: float = option(
      0.0, "bce: targets above it become 1, the others 0; 0: unchanged",
      low=0, high=0.999)
  label_smoothing: float = option(
      0.1, "probability mass spread over all classes", low=0, high=0.999)
  mixup: float = option(
      0.0, "alpha of mixup's beta distribution; 0: no mixup", low=0)
  cutmix: float = option(
      0.0, "alpha of cutmix's beta distribution; 0: no cutmix", low=0)
  mixup_prob: float = option(
      1.0, "probability that a micro-batch is mixed", low=0, high=1)
  mixup_switch_prob: float = option(
      0.5, "probability of cutmix where both are on", low=0, high=1)
  erasing: float = option(
      0.0, "probability that a box of an image is replaced by noise",
      low=0, high=1)
  eval_labels: str = option(
      "split", "split: the evaluation split's labels; real: ImageNet-ReaL; "
      "number: a folder's name is its class, as in ImageNet-V2",
      choices=("number", "real", "split"))
  real_path: str | None = option(None, "eval_labels=real: path of real.json")

  @property
  def input_size(self) -> tuple[int, int] | None:
    size = self.image_size
    return None if size is None else (size, size)

  def check(self, cfg: "Experiment", files: bool) -> Iterator[str]:
    if self.input_size is not None:
      yield from base.check_images(cfg, "image_size", *self.input_size)
    for key in ("crop_area", "crop_ratio"):
      low, high = getattr(self, key)
      if low > high:
        yield f"config.task.{key}: ({low}, {high}) is not in ascending order"
    try:
      policy = policies.parse(self.auto_augment)
      if getattr(policy, "n_ops", 0) > _MAX_OPERATIONS:
        raise ValueError(f"has an n above {_MAX_OPERATIONS}")
    except ValueError as e:
      yield f"config.task.auto_augment: {self.auto_augment!r} {e}"
    if cfg.data.augment_on == "device" and (
        self.image_size or 0) > _MAX_SIDE_ON_DEVICE:
      yield (f"config.task.image_size: {self.image_size} is above "
             f"{_MAX_SIDE_ON_DEVICE}, the largest for "
             "config.data.augment_on=device")
    if self.eval_labels != "split" and cfg.data.source != "folder":
      yield (f"config.task.eval_labels: {self.eval_labels} needs "
             f"config.data.source=folder, not {cfg.data.source}")
    names, n = self.class_names, self.num_classes
    if names is not None and n is not None and len(names) != n:
      yield (f"config.task.class_names: {len(names)} names, but "
             f"config.task.num_classes is {n}")
    if files and self.eval_labels == "real" and not _is_file(self.real_path):
      yield (f"config.task.real_path: {self.real_path!r} is not a file; give "
             "real.json of github.com/google-research/reassessed-imagenet")


def _is_file(path: str | None) -> bool:
  try:
    return path is not None and paths.local("", path).is_file()
  except errors.ConfigError:
    return False
