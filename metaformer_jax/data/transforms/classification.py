"""From a record to the uint8 image that a batch holds.

Normalisation is not done here: batches travel to the device as uint8, a
quarter of the bytes, and are normalised there (`tasks.classification`).
Resampling is Pillow's, which averages over the whole footprint when it
shrinks; so do torchvision's and timm's transforms, which the published
accuracies were measured with.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from metaformer_jax.config.schema import Data
from metaformer_jax.data import images
from metaformer_jax.data.augment import draw as augment
from metaformer_jax.data.augment import pixels
from metaformer_jax.data.sources.folders import Record


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


def resize_shorter(picture: Image.Image, size: int,
                   interpolation: str) -> Image.Image:
  """Resizes so that the shorter side has `size` pixels, as torchvision does."""
  w, h = picture.size
  if w <= h:
    w, h = size, int(size * h / w)
  else:
    w, h = int(size * w / h), size
  return picture.resize((w, h), pixels.FILTERS[interpolation])


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
  """The centre size x size pixels; black beyond a smaller picture's edge."""

  def start(side):  # Rounded as torchvision does in each of the two cases.
    return round((side - size) / 2) if side >= size else -((size - side) // 2)

  left, top = start(picture.width), start(picture.height)
  return picture.crop((left, top, left + size, top + size))


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Crop, resize, flip, augment: record, rng -> {"image", "label"}."""

  cfg: Data

  def __call__(self, record: Record, rng: np.random.Generator):
    cfg = self.cfg
    picture = images.decode(record["image"], cfg.max_pixels)
    box = random_resized_crop_box(*picture.size, cfg.crop_area, cfg.crop_ratio,
                                  rng)
    interpolation = cfg.train_interpolation
    if interpolation == "random":
      interpolation = ("bilinear", "bicubic")[rng.integers(2)]
    image = pixels.crop_resize(picture, box, cfg.image_size, interpolation,
                               flip=rng.random() < cfg.flip)
    fill = augment.fill_colour(cfg.mean)
    for op in augment.draw(cfg, rng):
      image = augment.apply(image, op, fill)
    return {"image": image, "label": np.int32(record["label"])}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Resize by the shorter side, centre crop: record -> {"image", "label"}."""

  cfg: Data

  def __call__(self, record: Record, rng: np.random.Generator | None = None):
    del rng
    cfg = self.cfg
    picture = resize_shorter(
        images.decode(record["image"], cfg.max_pixels),
        math.floor(cfg.image_size / cfg.crop_pct), cfg.interpolation)
    picture = centre_crop(picture, cfg.image_size)
    labels = {"labels": record["labels"]} if "labels" in record else {}
    return {"image": np.asarray(picture), "label": np.int32(record["label"]),
            **labels}
