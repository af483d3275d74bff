"""RandAugment, 3-Augment and ColorJitter on the device, an image at a time.

The host's policies (`config.policies`), with draws of the distributions of
`data.augment.draw`. They are made for the whole batch, from a key of the step,
so that they do not depend on the number of devices; each device then applies
them to its own images.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.config import policies, tasks
from metaformer_jax.ops import augment as ops
from metaformer_jax.ops import images as image_ops


class Drawn(NamedTuple):
  """The operations of n images, up to k for each, in their order.

  Attributes:
    number: int32 [n, k], in `ops.augment.NAMES`; 0 for none.
    argument: float32 [n, k].
    bicubic: bool [n, k], the filter of those that move pixels.
  """

  number: jax.Array
  argument: jax.Array
  bicubic: jax.Array


def argument(name: str, magnitude: jax.Array, sign: jax.Array) -> jax.Array:
  """The argument of a RandAugment operation, as by `draw.argument`.

  Args:
    name: of the operation.
    magnitude: float32, any shape.
    sign: 1 or -1, of the same shape.
  """
  m = magnitude
  match name:
    case "rotate":
      return sign * 3 * m
    # Divided last: tenths that are whole stay so in float32.
    case "posterize":
      return jnp.maximum(0, 4 - jnp.floor(4 * m / 10))
    case "solarize":
      return 256 - jnp.minimum(256, jnp.floor(256 * m / 10))
    case "solarize_add":
      return jnp.minimum(128, jnp.floor(110 * m / 10))
    case "color" | "contrast" | "brightness" | "sharpness":
      return jnp.maximum(0.1, 1 + sign * 0.09 * m)
    case "shear_x" | "shear_y":
      return sign * 0.03 * m
    case "translate_x" | "translate_y":
      return sign * 0.045 * m
  return jnp.zeros_like(m)  # auto_contrast, equalize, invert.


def draw_rand(rng: jax.Array, n: int, policy: policies.RandAugment,
              interpolation: str) -> Drawn:
  """RandAugment's operations; those skipped by chance are none."""
  keys = jax.random.split(rng, 5)
  shape = (n, policy.n_ops)
  choice = jax.random.randint(keys[0], shape, 0, len(policies.RAND_OPS))
  applied = jax.random.uniform(keys[1], shape) < policy.prob
  if policy.std == math.inf:
    magnitude = jax.random.uniform(keys[2], shape, maxval=policy.magnitude)
  else:
    magnitude = policy.magnitude + policy.std * jax.random.normal(
        keys[2], shape)
  magnitude = magnitude.clip(0, policy.limit)
  sign = jax.random.rademacher(keys[3], shape, jnp.float32)
  arguments = jnp.stack([argument(name, magnitude, sign)
                         for name in policies.RAND_OPS])
  bicubic = (jax.random.bernoulli(keys[4], shape=shape)
             if interpolation == "random" else
             jnp.full(shape, interpolation == "bicubic"))
  return Drawn(
      jnp.where(applied, _numbers(policies.RAND_OPS)[choice], 0),
      jnp.take_along_axis(arguments, choice[None], 0)[0], bicubic)


def _numbers(names: tuple[str, ...]) -> jax.Array:
  return jnp.array([ops.NAMES.index(name) for name in names], jnp.int32)


def draw_three(rng: jax.Array, n: int) -> Drawn:
  """3-Augment: always one of three."""
  key_which, key_blur = jax.random.split(rng)
  choice = jax.random.randint(key_which, (n, 1), 0, 3)
  radius = jax.random.uniform(key_blur, (n, 1), minval=0.1,
                              maxval=ops.MAX_BLUR)
  arguments = jnp.stack([jnp.full((n, 1), 128.0), jnp.zeros((n, 1)), radius])
  return _still(_numbers(("solarize", "color", "blur"))[choice],
                jnp.take_along_axis(arguments, choice[None], 0)[0])


def draw_jitter(rng: jax.Array, n: int, strength: float) -> Drawn:
  """ColorJitter: all three, in random order, by factors around 1."""
  key_order, key_factor = jax.random.split(rng)
  order = jnp.argsort(jax.random.uniform(key_order, (n, 3)), axis=1)
  factor = jax.random.uniform(key_factor, (n, 3), maxval=1 + strength,
                              minval=max(0.0, 1 - strength))
  return _still(_numbers(("brightness", "contrast", "color"))[order], factor)


def _still(number: jax.Array, argument: jax.Array) -> Drawn:
  return Drawn(number, argument, jnp.zeros(number.shape, bool))


def draw(rng: jax.Array, n: int, task: tasks.Classification) -> Drawn | None:
  """The operations for n pictures; with RandAugment there is no jitter.

  Returns:
    None if the task has no augmentation.
  """
  policy = policies.parse(task.auto_augment)
  if isinstance(policy, policies.RandAugment):
    return draw_rand(rng, n, policy, task.train_interpolation)
  key_three, key_jitter = jax.random.split(rng)
  parts = [draw_three(key_three, n)] if policy else []
  if task.color_jitter:
    parts.append(draw_jitter(key_jitter, n, task.color_jitter))
  if not parts:
    return None
  return Drawn(*(jnp.concatenate(v, axis=1) for v in zip(*parts)))


def apply(images: jax.Array, drawn: Drawn, fill: tuple[int, ...]) -> jax.Array:
  """Applies the drawn operations to uint8 [B, H, W, 3].

  Images come one after the other, so that only what was drawn is computed: all
  operations for all images would take longer than a small model's step.
  """

  def step(image, operation):
    return ops.apply(image, *operation, fill=fill), None

  return image_ops.one_by_one(
      lambda image, drawn: lax.scan(step, image, drawn)[0], images, drawn)
