"""From a record to the uint8 image that a batch holds.

Images are not normalised here: batches travel to the device as uint8, a quarter
of the bytes, and are normalised there (`tasks.classification`). Resampling is
Pillow's, which averages over the whole footprint when it shrinks; torchvision's
and timm's transforms, with which the published accuracies were measured, use
it, too.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import images
from metaformer_jax.data.augment import draw, pixels
from metaformer_jax.data.sources import base


def random_resized_crop_box(
    width: int, height: int, area: tuple[float, ...],
    ratio: tuple[float, ...], rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws RandomResizedCrop's (left, top, right, bottom) in pixels.

  Ten tries at a box of uniform area and log-uniform width/height ratio; after
  that the largest centred box within the ratios (Szegedy et al., arXiv
  1409.4842; torchvision's fallback).
  """
  for _ in range(10):
    target = width * height * rng.uniform(*area)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w, endpoint=True))
      top = int(rng.integers(height - h, endpoint=True))
      return left, top, left + w, top + h
  w, h = width, height
  if width / height < ratio[0]:
    h = max(1, round(width / ratio[0]))
  elif width / height > ratio[1]:
    w = max(1, round(height * ratio[1]))
  left, top = (width - w) // 2, (height - h) // 2
  return left, top, left + w, top + h


def resize_shorter(picture: Image.Image, size: tuple[int, int],
                   interpolation: str,
                   max_pixels: int = schema.Data.max_pixels) -> Image.Image:
  """Resizes, keeping the aspect ratio, so that both sides reach a size.

  Args:
    picture: RGB.
    size: (height, width). For a square this is torchvision's resize of the
      shorter side; the other side is rounded down.
    interpolation: name of the filter.
    max_pixels: of the result.

  Raises:
    ValueError: there would be more, as of a picture of 40,000 x 1.
  """
  resized = _resized(*picture.size, size)
  width, height = picture.size
  images.check_size(resized, max_pixels,
                    f"{width} x {height} pixels resized to ")
  return picture.resize(resized, pixels.FILTERS[interpolation])


def _resized(w: int, h: int, size: tuple[int, int]) -> tuple[int, int]:
  """Width and height after `resize_shorter`."""
  height, width = size
  if w * height <= h * width:
    return width, int(width * h / w)
  return int(height * w / h), height


def centre_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
  """The centre of (height, width) pixels; a smaller picture is padded black."""
  return picture.crop(_centre(*picture.size, size))


def _centre(w: int, h: int,
            size: tuple[int, int]) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of `centre_crop`."""

  def start(side, wanted):  # Rounded as torchvision does in each of the cases.
    if side >= wanted:
      return round((side - wanted) / 2)
    return -((wanted - side) // 2)

  height, width = size
  left, top = start(w, width), start(h, height)
  return left, top, left + width, top + height


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Crop, resize, flip, augment: record, rng -> {"image", "label"}.

  With `data.augment_on="device"` the last comes later (`tasks.auto_augment`).
  """

  data: schema.Data
  task: tasks.Classification

  def __call__(self, record: base.Record, rng: np.random.Generator):
    task = self.task
    picture = images.decode(record["image"], self.data.max_pixels)
    box = random_resized_crop_box(*picture.size, task.crop_area,
                                  task.crop_ratio, rng)
    interpolation = task.train_interpolation
    if interpolation == "random":
      interpolation = ("bilinear", "bicubic")[rng.integers(2)]
    image = pixels.crop_resize(picture, box, task.input_size, interpolation,
                               flip=rng.random() < task.flip)
    if self.data.augment_on == "host":
      fill = pixels.fill_colour(self.data.mean)
      for op in draw.draw(task, rng):
        image = pixels.apply(image, op, fill)
    return {"image": image, "label": np.int32(record["label"])}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Resize, then crop the centre: record -> {"image", "label"}.

  A record's "labels" are passed on.
  """

  data: schema.Data
  task: tasks.Classification

  def __call__(self, record: base.Record,
               rng: np.random.Generator | None = None):
    del rng
    picture = resize_shorter(
        images.decode(record["image"], self.data.max_pixels), self._before_crop,
        self.task.interpolation, self.data.max_pixels)
    picture = centre_crop(picture, self.task.input_size)
    labels = {"labels": record["labels"]} if "labels" in record else {}
    return {"image": np.asarray(picture), "label": np.int32(record["label"]),
            **labels}

  @property
  def _before_crop(self) -> tuple[int, int]:
    """The size that the picture is resized to, as for `resize_shorter`."""
    return tuple(math.floor(side / self.task.crop_pct)
                 for side in self.task.input_size)

  def box(self, width: int, height: int) -> tuple[float, float, float, float]:
    """What the crop shows of a picture of this size.

    Returns:
      (left, top, right, bottom) in pixels of the picture, not rounded, and
      beyond it where the crop is padded.
    """
    w, h = _resized(width, height, self._before_crop)
    left, top, right, bottom = _centre(w, h, self.task.input_size)
    return (left * width / w, top * height / h,
            right * width / w, bottom * height / h)
