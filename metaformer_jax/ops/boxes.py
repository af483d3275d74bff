"""Boxes [x1, y1, x2, y2] in pixels, with x2 = x1 + width.

The formulas are those of mmdetection 2.19 (core/bbox), in float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A box's sides differ from its anchor's by at most this factor.
_MAX_LOG_RATIO = abs(math.log(16 / 1000))


def iou(a: jax.Array, b: jax.Array, *, min_union: float = 1e-6) -> jax.Array:
  """Intersection over union of all pairs.

  Each operation is rounded to float32, as in PyTorch, so that pairs that tie
  there tie here, and a pair has one value in all programs.

  Args:
    a: float32 [..., N, 4].
    b: float32 [..., M, 4].
    min_union: in square pixels; a smaller union is taken for this one.

  Returns:
    float32 [..., N, M]; 0 if both boxes are empty.
  """
  # Coordinate by coordinate: arrays of [N, M, 2] would be made in memory.
  low, high = (
      [pick(a[..., :, None, i], b[..., None, :, i]) for i in corner]
      for pick, corner in ((jnp.maximum, (0, 1)), (jnp.minimum, (2, 3))))
  width, height = (jnp.maximum(end - start, 0)
                   for start, end in zip(low, high))
  both = _rounded(width * height)
  union = _area(a)[..., :, None] + _area(b)[..., None, :] - both
  return both / jnp.maximum(union, min_union)


def _area(boxes: jax.Array) -> jax.Array:
  x1, y1, x2, y2 = jnp.moveaxis(boxes, -1, 0)
  return _rounded((x2 - x1) * (y2 - y1))


def _rounded(product: jax.Array) -> jax.Array:
  """Of the same value, but no part of a fused multiply-add.

  XLA fuses a product with the sum that follows, or does not, from program to
  program; `lax.optimization_barrier` does not prevent it on a CPU.
  """
  return jnp.minimum(product, jnp.finfo(product.dtype).max)


def _center_and_sides(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
  low, high = boxes[..., :2], boxes[..., 2:]
  return (low + high) * 0.5, high - low


def encode(anchors: jax.Array, boxes: jax.Array,
           stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
  """Boxes as differences from anchors; mmdetection's DeltaXYWHBBoxCoder.

  Args:
    anchors: float32 [..., 4]; their sides are not 0.
    boxes: float32 [..., 4]; their sides are above 0.
    stds: what the four differences are divided by.

  Returns:
    float32 [..., 4]: offsets of the centre in sides of the anchor, x and y, and
    logarithms of the sides' ratios, of width and height.
  """
  anchor_center, anchor_sides = _center_and_sides(anchors)
  center, sides = _center_and_sides(boxes)
  deltas = jnp.concatenate([(center - anchor_center) / anchor_sides,
                            jnp.log(sides / anchor_sides)], -1)
  return deltas / _last_axis(stds, deltas.ndim)


def decode(anchors: jax.Array, deltas: jax.Array, size: jax.Array | None = None,
           stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> jax.Array:
  """Inverse of `encode`; ratios of sides are limited to 16 / 1000 and back.

  Args:
    anchors: float32 [..., N, 4].
    deltas: float32 [..., N, 4].
    size: [..., 2], height and width that the boxes are clipped to, or None.
    stds: as in `encode`.

  Returns:
    float32 [..., N, 4].
  """
  deltas = deltas * _last_axis(stds, deltas.ndim)
  center, sides = _center_and_sides(anchors)
  center = center + sides * deltas[..., :2]
  sides = sides * jnp.exp(
      jnp.clip(deltas[..., 2:], -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
  boxes = jnp.concatenate([center - sides * 0.5, center + sides * 0.5], -1)
  return boxes if size is None else clip(boxes, size)


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
  """Boxes [..., N, 4] within images of these heights and widths, [..., 2]."""
  limits = jnp.tile(jnp.flip(size, -1), 2)[..., None, :].astype(boxes.dtype)
  return jnp.clip(boxes, 0, limits)


def _last_axis(values: Sequence[float], ndim: int) -> jax.Array:
  return jnp.array(values, jnp.float32).reshape((1,) * (ndim - 1) + (-1,))
