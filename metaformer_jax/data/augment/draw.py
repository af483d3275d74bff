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

from metaformer_jax.config import policies
from metaformer_jax.config.schema import Data
from metaformer_jax.data.augment import pixels

_VALUES = np.arange(256)


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


def _blended(value: float, factor: float) -> np.ndarray:
  """A table from one value (at 0) to the identity (1), and beyond.

  In float32, as Pillow's.
  """
  rise = np.float32(factor) * (_VALUES - value).astype(np.float32)
  return (np.float32(value) + rise).clip(0, 255)


def _stretched(counts: np.ndarray) -> np.ndarray:
  """A table that spreads the values that come, of [256], over 0 to 255."""
  least, most = np.flatnonzero(counts)[[0, -1]]
  if least == most:
    return _VALUES
  scale = 255 / (most - least)
  return (_VALUES * scale - least * scale).clip(0, 255)


def _equalized(counts: np.ndarray) -> np.ndarray:
  """A table after which all values of a histogram [256] come as often."""
  step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
  if not step:
    return _VALUES
  return (step // 2 + np.cumsum(counts) - counts) // step


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
  """The matrix of a rotation about the centre, counter-clockwise.

  Rounded as Pillow's.
  """
  angle = -math.radians(degrees % 360)
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = width / 2, height / 2
  return cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y


def apply(image: np.ndarray, op: Op, fill: tuple[int, ...]) -> np.ndarray:
  """Does one operation to an RGB picture, uint8 [H, W, 3]."""
  value = op.argument
  height, width, _ = image.shape
  match op.name:
    case "auto_contrast":
      return pixels.look_up(
          image, [_stretched(counts) for counts in pixels.histogram(image)])
    case "equalize":
      return pixels.look_up(
          image, [_equalized(counts) for counts in pixels.histogram(image)])
    case "invert":
      return 255 - image
    case "posterize":  # To 0 bits, black.
      return image & np.uint8(0xFF00 >> int(value) & 0xFF)
    case "solarize":
      return pixels.look_up(
          image, np.where(value > _VALUES, _VALUES, 255 - _VALUES))
    case "solarize_add":
      return pixels.look_up(image, _VALUES + value * (_VALUES < 128))
    case "brightness":
      return pixels.look_up(image, _blended(0, value))
    case "contrast":
      gray = int(pixels.mean_gray(image) + 0.5)
      return pixels.look_up(image, _blended(gray, value))
    case "color":
      return pixels.color(image, value)
    case "sharpness":
      return pixels.sharpness(image, value)
    case "blur":
      return pixels.blur(image, value)
    case "rotate":
      matrix = _rotation(value, width, height)
    case "shear_x":
      matrix = (1, value, 0, 0, 1, 0)
    case "shear_y":
      matrix = (1, 0, 0, value, 1, 0)
    case "translate_x":
      matrix = (1, 0, value * width, 0, 1, 0)
    case "translate_y":
      matrix = (1, 0, 0, 0, 1, value * height)
    case _:
      raise ValueError(f"unknown operation {op.name!r}")
  return pixels.affine(image, matrix, op.filter, fill)
