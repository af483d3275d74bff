"""Images [B, H, W, C] as rows [B H, W C]: the blocks that kernels work on.

A row is a row of pixels, so that few lanes are padding: a TPU's tile has 128
lanes, of which C = 64 would fill half. A block has the rows of whole images.
Loops over a block take a group of pixels at a time: those columns of pixels
whose channels fill whole tiles.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from metaformer_jax.kernels import grid

# Rows of a block, at least, if the batch has as many: a block should take
# longer than a step of the grid costs, and fill a matrix unit of 128 rows.
_ROWS = 96


class Fold(NamedTuple):
  """A batch of images as rows.

  Attributes:
    shape: [B, H, W, C].
    n_images: of a block.
    n_pixels: of a group: columns of pixels of the block.
  """

  shape: tuple[int, int, int, int]
  n_images: int
  n_pixels: int

  @property
  def n_steps(self) -> int:
    return self.shape[0] // self.n_images

  @property
  def rows(self) -> int:
    """Rows of a block."""
    return self.n_images * self.shape[1]

  @property
  def lanes(self) -> int:
    """Lanes of a row: W C."""
    return self.shape[2] * self.shape[3]

  @property
  def group(self) -> int:
    """Lanes of a group of pixels."""
    return self.n_pixels * self.shape[3]

  @property
  def n_groups(self) -> int:
    return self.shape[2] // self.n_pixels

  def array(self, dtype: DTypeLike) -> grid.Array:
    """The images as an array of a call."""
    return grid.Array((self.shape[0] * self.shape[1], self.lanes), dtype,
                      self.rows)

  def block(self, dtype: DTypeLike = jnp.float32, pad: int = 0) -> grid.Array:
    """A scratch array for a block, with lanes on both sides."""
    return grid.Array((self.rows, self.lanes + 2 * pad), dtype)

  def problem(self, dtype: DTypeLike) -> str | None:
    """Why blocks of this shape do not fit a TPU's tiles; None if they do."""
    if self.rows % grid.tile_rows(dtype):
      return (f"{self.rows} rows of {self.n_images} images are not a multiple "
              f"of {grid.tile_rows(dtype)}")
    if self.group % grid.LANES:
      return (f"{self.shape[2]} pixels of {self.shape[3]} channels are not a "
              f"multiple of {grid.LANES} lanes")
    return None


def of(shape: Sequence[int], dtype: DTypeLike, *, widest: int = 1) -> Fold:
  """How to fold images [B, H, W, C].

  Args:
    shape: of the images.
    dtype: of the images.
    widest: a group may have this many pixels, if they divide the width.
  """
  batch, height, width, channels = shape
  fitting = [n for n in range(1, batch + 1) if batch % n == 0
             and n * height % grid.tile_rows(dtype) == 0] or [batch]
  n_images = next((n for n in fitting if n * height >= _ROWS), fitting[-1])
  n_pixels = grid.LANES // math.gcd(grid.LANES, channels)
  if width % n_pixels:
    n_pixels = 1
  while 2 * n_pixels <= widest and width % (2 * n_pixels) == 0:
    n_pixels *= 2
  return Fold(tuple(shape), n_images, n_pixels)


def fold_images(fold: Fold, x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [B H, W C]."""
  return x.reshape(fold.array(x.dtype).shape)


def along_lanes(fold: Fold, vector: jax.Array) -> jax.Array:
  """A vector over channels, for each pixel of a row: [C] -> [1, W C]."""
  return jnp.tile(vector, fold.shape[2])[None]


def loop(fold: Fold, body: Callable[..., Any], init: Any = 0) -> Any:
  """Calls body(i, carry) -> carry for each group i."""
  return lax.fori_loop(0, fold.n_groups, body, init)


def lanes_of(fold: Fold, i: Any, offset: int = 0, more: int = 0) -> pl.Slice:
  """The lanes of group i, from `offset` on, and more lanes after them."""
  return slice_of(i * fold.group + offset, fold.group + more,
                  fold.group % grid.LANES == 0)


def slice_of(start: Any, size: int, aligned: bool) -> pl.Slice:
  """A slice of lanes or rows; aligned: that starts with a tile of lanes."""
  return pl.ds(pl.multiple_of(start, grid.LANES) if aligned else start, size)


def row_in_image(fold: Fold) -> jax.Array:
  """int32 [rows, 1]: which row of its image each row is."""
  rows = lax.broadcasted_iota(jnp.int32, (fold.rows, 1), 0)
  return lax.rem(rows, jnp.int32(fold.shape[1]))


def image_of_row(fold: Fold, axis: int = 0, n: int = 1) -> jax.Array:
  """int32 [rows, n], or [n, rows]: which image of the block a row is of."""
  shape = (fold.rows, n) if axis == 0 else (n, fold.rows)
  rows = lax.broadcasted_iota(jnp.int32, shape, axis)
  return lax.div(rows, jnp.int32(fold.shape[1]))


def total(fold: Fold, rows: jax.Array) -> jax.Array:
  """Sums over each image, at all its rows: float32 [rows, 1] -> [rows, 1]."""
  n = fold.rows
  if fold.n_images == 1:
    return jnp.broadcast_to(rows.sum(0, keepdims=True), rows.shape)
  same = image_of_row(fold, 0, n) == image_of_row(fold, 1, n)
  sums = jnp.where(same, rows, 0).sum(0, keepdims=True)  # Along the lanes.
  own = (lax.broadcasted_iota(jnp.int32, (n, n), 0)
         == lax.broadcasted_iota(jnp.int32, (n, n), 1))
  return jnp.where(own, sums, 0).sum(1, keepdims=True)


def statistics(fold: Fold, x_ref: Any, eps: float,
               ) -> tuple[jax.Array, jax.Array]:
  """Mean and 1 / sqrt(variance + eps) of each image: float32 [rows, 1] each."""
  n = math.prod(fold.shape[1:])
  zero = jnp.zeros((fold.rows, 1), jnp.float32)

  def add(i, carry):
    x = x_ref[:, lanes_of(fold, i)].astype(jnp.float32)
    return carry + x.sum(1, keepdims=True)

  mean = total(fold, loop(fold, add, zero)) / n

  def add_square(i, carry):
    x = x_ref[:, lanes_of(fold, i)].astype(jnp.float32) - mean
    return carry + (x * x).sum(1, keepdims=True)

  variance = total(fold, loop(fold, add_square, zero)) / n
  return mean, lax.rsqrt(variance + eps)


def no_moments(fold: Fold) -> tuple[jax.Array, jax.Array]:
  """Where sums of `add_moments` start."""
  zero = jnp.zeros((fold.rows, 1), jnp.float32)
  return zero, zero


def add_moments(moments: tuple[jax.Array, jax.Array], dz: jax.Array,
                z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Adds the sums of dz and of dz z over the lanes."""
  return (moments[0] + dz.sum(1, keepdims=True),
          moments[1] + (dz * z).sum(1, keepdims=True))


def write_norm_gradient(
    fold: Fold, moments: tuple[jax.Array, jax.Array],
    statistics: tuple[jax.Array, jax.Array], x_ref: Any, dy_ref: Any,
    dz_ref: Any, dx_ref: Any) -> None:
  """Writes dx of y = x + f(z), z = (x - mean) inverse, from f's gradient dz.

  Args:
    fold: of the images.
    moments: sums of dz and dz z over each row.
    statistics: mean and inverse.
    x_ref, dy_ref, dz_ref: read.
    dx_ref: written.
  """
  n = math.prod(fold.shape[1:])
  mean, inverse = statistics
  first, second = (total(fold, rows) / n for rows in moments)

  def write(i, carry):
    lanes = lanes_of(fold, i)
    z = (x_ref[:, lanes].astype(jnp.float32) - mean) * inverse
    dx = inverse * (dz_ref[:, lanes] - first - z * second)
    dx_ref[:, lanes] = (dy_ref[:, lanes].astype(jnp.float32) + dx).astype(
        dx_ref.dtype)
    return carry

  loop(fold, write)


def start_at_zero(*refs: Any) -> None:
  """Zeroes sums over the grid at its first step."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in refs:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)


def of_rows(fold: Fold, per_image_ref: Any) -> jax.Array:
  """Values of the images, at their rows: [1, B] of scalars -> [rows, 1]."""
  image = image_of_row(fold)
  first = pl.program_id(0) * fold.n_images
  values = jnp.zeros((fold.rows, 1), jnp.float32)
  for i in range(fold.n_images):
    values = jnp.where(image == i, per_image_ref[0, first + i], values)
  return values
