"""Augmentation of RGB pictures as timm defines it for the published recipes.

What is drawn is apart from what is done: `draw` returns a list of operations,
`apply` is a function of a picture and one of them. So the operations can be
compared with timm's pixel by pixel, and the draws with their distributions.

Sources: timm 1.0, `data/auto_augment.py` (RandAugment, arXiv 1909.13719, with
timm's noise and its increasing set; 3-Augment) and torchvision's ColorJitter.
"""

import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from metaformer_jax.data import policies, resampling
from metaformer_jax.experiment import Data


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation with its argument, and the filter if it moves pixels."""

  name: str
  argument: float = 0.0
  filter: str = "bilinear"


def _either_way(rng: np.random.Generator, value: float) -> float:
  return value if rng.random() < 0.5 else -value


def argument(name: str, magnitude: float, rng: np.random.Generator) -> float:
  """What an operation of RandAugment takes at a magnitude (timm's level_fn).

  rotate: degrees; posterize: bits that stay; solarize: the first value that is
  inverted; solarize_add: what is added to values below 128; shear, translate:
  over the picture's side; the enhancements: 1 changes nothing.
  """
  level = magnitude / 10
  match name:
    case "rotate":
      return _either_way(rng, 30 * level)
    case "posterize":
      return 4 - int(4 * level)
    case "solarize":
      return 256 - min(256, int(256 * level))
    case "solarize_add":
      return min(128, int(110 * level))
    case "color" | "contrast" | "brightness" | "sharpness":
      return max(0.1, 1 + _either_way(rng, 0.9 * level))
    case "shear_x" | "shear_y":
      return _either_way(rng, 0.3 * level)
    case "translate_x" | "translate_y":
      return _either_way(rng, 0.45 * level)
  return 0.0  # auto_contrast, equalize, invert.


def draw_rand(policy: policies.RandAugment, interpolation: str,
              rng: np.random.Generator) -> list[Op]:
  """RandAugment's operations, in order; those that chance leaves out are."""
  ops = []
  for choice in rng.integers(len(policies.RAND_OPS), size=policy.n_ops):
    if rng.random() >= policy.prob:
      continue
    name = policies.RAND_OPS[choice]
    if policy.std == math.inf:
      magnitude = rng.uniform(0, policy.magnitude)
    else:
      magnitude = rng.normal(policy.magnitude, policy.std)
    value = argument(name, min(max(magnitude, 0.0), policy.limit), rng)
    ops.append(Op(name, value, interpolation if interpolation != "random"
                  else ("bilinear", "bicubic")[rng.integers(2)]))
  return ops


def draw_three(rng: np.random.Generator) -> list[Op]:
  """3-Augment: one of three, always."""
  return [(Op("solarize", 128), Op("color", 0.0),
           Op("blur", rng.uniform(0.1, 2.0)))[rng.integers(3)]]


def draw_jitter(strength: float, rng: np.random.Generator) -> list[Op]:
  """ColorJitter: the three, in any order, by factors about 1."""
  names = ("brightness", "contrast", "color")
  return [Op(names[i], rng.uniform(max(0.0, 1 - strength), 1 + strength))
          for i in rng.permutation(3)]


def draw(cfg: Data, rng: np.random.Generator) -> list[Op]:
  """What `cfg` does to one picture; RandAugment leaves out the jitter."""
  policy = policies.parse(cfg.auto_augment)
  if isinstance(policy, policies.RandAugment):
    return draw_rand(policy, cfg.train_interpolation, rng)
  ops = draw_three(rng) if policy else []
  if cfg.color_jitter:
    ops += draw_jitter(cfg.color_jitter, rng)
  return ops


def fill_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
  """What comes in where a picture is moved away: the data's mean."""
  return tuple(min(255, round(255 * v)) for v in mean)


def _look_up(picture: Image.Image, value) -> Image.Image:
  return picture.point([value(i) for i in range(256)] * 3)


def apply(picture: Image.Image, op: Op, fill: tuple[int, ...]) -> Image.Image:
  """Does one operation to an RGB picture."""
  value = op.argument
  match op.name:
    case "auto_contrast":
      return ImageOps.autocontrast(picture)
    case "equalize":
      return ImageOps.equalize(picture)
    case "invert":
      return ImageOps.invert(picture)
    case "posterize":  # To 0 bits, black: not all versions of Pillow do it.
      return _look_up(picture, lambda i: i & (0xFF00 >> int(value)))
    case "solarize":
      return _look_up(picture, lambda i: i if i < value else 255 - i)
    case "solarize_add":
      return _look_up(picture, lambda i: i + value if i < 128 else i)
    case "color":
      return ImageEnhance.Color(picture).enhance(value)
    case "contrast":
      return ImageEnhance.Contrast(picture).enhance(value)
    case "brightness":
      return ImageEnhance.Brightness(picture).enhance(value)
    case "sharpness":
      return ImageEnhance.Sharpness(picture).enhance(value)
    case "blur":
      return picture.filter(ImageFilter.GaussianBlur(value))
    case "rotate":
      return resampling.rotate(picture, value, op.filter, fill)
    case "shear_x":
      return resampling.shear(picture, value, op.filter, fill)
    case "translate_x":
      return resampling.translate(picture, value, op.filter, fill)
    case "shear_y":
      return resampling.transposed(resampling.shear, picture, value, op.filter,
                                   fill)
    case "translate_y":
      return resampling.transposed(resampling.translate, picture, value,
                                   op.filter, fill)
  raise ValueError(f"unknown operation {op.name!r}")
