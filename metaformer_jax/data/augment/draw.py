"""Random choice of the augmentations that timm uses in the published recipes.

`draw` returns a list of operations, which `pixels.apply` applies to a picture.
With the two separate, tests compare the distributions drawn with timm's, and
each operation with timm's pixel by pixel.

Sources: timm 1.0, `data/auto_augment.py` (RandAugment, arXiv 1909.13719, with
timm's noise and its increasing set; 3-Augment) and torchvision's ColorJitter.
"""

import dataclasses
import math

import numpy as np

from metaformer_jax.config import policies, tasks


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation and its argument; the filter is for those that move pixels.

  Arguments: rotate: degrees; posterize: bits to keep; solarize: the first value
  to be inverted; solarize_add: what is added to values below 128; shear,
  translate: relative to the picture's side; blur: the radius in pixels; the
  enhancements: 1 changes nothing.
  """

  name: str
  argument: float = 0.0
  filter: str = "bilinear"


def _either_way(rng: np.random.Generator, value: float) -> float:
  return value if rng.random() < 0.5 else -value


def argument(name: str, magnitude: float, rng: np.random.Generator) -> float:
  """The argument of a RandAugment operation (timm's level_fn)."""
  level = magnitude / 10
  match name:
    case "rotate":
      return _either_way(rng, 30 * level)
    case "posterize":
      return max(0, 4 - int(4 * level))
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
  """RandAugment's operations in order, without those skipped by chance."""
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
  """3-Augment: always one of three."""
  return [(Op("solarize", 128), Op("color", 0.0),
           Op("blur", rng.uniform(0.1, 2.0)))[rng.integers(3)]]


def draw_jitter(strength: float, rng: np.random.Generator) -> list[Op]:
  """ColorJitter: all three, in random order, by factors around 1."""
  names = ("brightness", "contrast", "color")
  return [Op(names[i], rng.uniform(max(0.0, 1 - strength), 1 + strength))
          for i in rng.permutation(3)]


def draw(task: tasks.Classification, rng: np.random.Generator) -> list[Op]:
  """The operations for one picture; with RandAugment there is no jitter."""
  policy = policies.parse(task.auto_augment)
  if isinstance(policy, policies.RandAugment):
    return draw_rand(policy, task.train_interpolation, rng)
  ops = draw_three(rng) if policy else []
  if task.color_jitter:
    ops += draw_jitter(task.color_jitter, rng)
  return ops
