"""Sliding windows over images whose sizes differ, with static shapes."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import resize


def starts(sides: jax.Array, canvas: int, window: int,
           stride: int) -> tuple[jax.Array, jax.Array]:
  """Where windows begin along one axis.

  They are `stride` apart; the last one is moved back to end with the image
  (mmseg/models/segmentors/encoder_decoder.py, `slide_inference`).

  Args:
    sides: int [B], of the images.
    canvas: the largest possible side.
    window: side of the windows; an image may be smaller.
    stride: from one window to the next.

  Returns:
    int32 [B, N], and bool [B, N]: which of them the image has.
  """
  def count(side):
    return -(-jnp.maximum(side - window, 0) // stride) + 1

  n = -(-max(canvas - window, 0) // stride) + 1
  i = jnp.arange(n, dtype=jnp.int32)[None]
  sides = sides[:, None]
  last = jnp.maximum(sides - window, 0)
  return jnp.minimum(i * stride, last), i < count(sides)


def average(fn: Callable[[jax.Array, jax.Array], jax.Array], images: jax.Array,
            sizes: jax.Array, window: tuple[int, int],
            stride: tuple[int, int]) -> jax.Array:
  """The mean of a function's results on all windows that cover a pixel.

  Args:
    fn: windows [B, h, w, C] and the sizes [B, 2] of their valid parts ->
      float32 [B, h, w, D].
    images: [B, H, W, C], each at the top left of its canvas.
    sizes: int [B, 2], theirs.
    window: (h, w).
    stride: rows and columns between windows.

  Returns:
    float32 [B, H, W, D], zero in the padding.
  """
  height, width = images.shape[1:3]
  canvas = tuple(map(max, images.shape[1:3], window))
  images = _padded(images, canvas)
  (rows, has_row), (columns, has_column) = (
      starts(sizes[:, axis], canvas[axis], window[axis], stride[axis])
      for axis in (0, 1))
  within = jnp.minimum(sizes, jnp.array([window], sizes.dtype))
  inside = resize.mask(within, *window)[..., None]

  def add(total, index):
    i, j = index
    used = inside & (has_row[:, i] & has_column[:, j])[:, None, None, None]
    corner = rows[:, i], columns[:, j]
    found = jnp.where(used, fn(_slices(images, *corner, window), within), 0)
    # The weights are the last channel.
    found = jnp.concatenate([found, used.astype(jnp.float32)], -1)
    return _added(total, found, *corner), None

  n_outputs = jax.eval_shape(
      fn, jax.ShapeDtypeStruct((len(images), *window, images.shape[-1]),
                               images.dtype), within).shape[-1]
  total = jnp.zeros((len(images), *canvas, n_outputs + 1), jnp.float32)
  grid = jnp.indices((rows.shape[1], columns.shape[1])).reshape(2, -1)
  total, _ = lax.scan(add, total, (grid[0], grid[1]))
  total = total[:, :height, :width]
  return total[..., :-1] / jnp.maximum(total[..., -1:], 1)


def _padded(images: jax.Array, canvas: tuple[int, int]) -> jax.Array:
  after = [(0, to - side) for to, side in zip(canvas, images.shape[1:3])]
  return jnp.pad(images, ((0, 0), *after, (0, 0)))


@jax.vmap
def _added(total: jax.Array, part: jax.Array, y: jax.Array, x: jax.Array):
  """Adds [h, w, D] to [H, W, D] at row y and column x."""
  old = lax.dynamic_slice(total, (y, x, 0), part.shape)
  return lax.dynamic_update_slice(total, old + part, (y, x, 0))


def _slices(images: jax.Array, ys: jax.Array, xs: jax.Array,
            window: tuple[int, int]) -> jax.Array:
  """The window of each image that begins at its row and column."""
  return jax.vmap(lambda image, y, x: lax.dynamic_slice(
      image, (y, x, 0), (*window, image.shape[-1])))(images, ys, xs)


def mirrored(images: jax.Array, widths: jax.Array) -> jax.Array:
  """Exchanges left and right of the valid columns; [B, H, W, C], int [B].

  The padding, which must be zero, stays on the right.
  """
  width = images.shape[2]

  def one(image, valid_width):
    return jnp.roll(image[:, ::-1], valid_width - width, axis=1)

  return jax.vmap(one)(images, widths)
