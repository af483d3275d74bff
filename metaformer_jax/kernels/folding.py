"""Images [B, H, W, C] as [H, B, W C]: the blocks that kernels work on.

A row of pixels lies along the lanes, so that none is padding: a tile has 128
lanes, of which C = 64 would fill half. The images lie along its 8 rows: sums
over an image, and shifts along its height, stay within a row of the tile.
Between the layouts that XLA gives to convolutions and this one lies a single
transposition. Loops over a block take a group of columns of pixels at a time,
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

F32 = jnp.float32
# Mean and 1 / standard deviation of each image, or two sums: [1, n_images, 1].
Pair = tuple[jax.Array, jax.Array]


class Fold(NamedTuple):
  """A batch of images, cut into blocks of images and groups of columns.

  Attributes:
    shape: [B, H, W, C].
    n_images: of a block.
    n_pixels: columns of a group.
  """

  shape: tuple[int, int, int, int]
  n_images: int
  n_pixels: int

  @property
  def n_steps(self) -> int:
    return self.shape[0] // self.n_images

  @property
  def rows(self) -> int:
    """Rows of a block: those of its images."""
    return self.n_images * self.shape[1]

  @property
  def lanes(self) -> int:
    """Lanes of a row: W C."""
    return self.shape[2] * self.shape[3]

  @property
  def group(self) -> int:
    """Lanes of a group of columns."""
    return self.n_pixels * self.shape[3]

  def array(self, dtype: DTypeLike) -> grid.Array:
    """The images as an array of a call."""
    return grid.Array((self.shape[1], self.shape[0], self.lanes), dtype,
                      self.n_images)

  def block(self, dtype: DTypeLike = F32, pad: int = 0) -> grid.Array:
    """A scratch array for a block, with lanes on both sides."""
    return grid.Array((self.shape[1], self.n_images, self.lanes + 2 * pad),
                      dtype)

  def group_bytes(self, pad: int = 0) -> int:
    """Bytes of a group in float32, with lanes on both sides."""
    return grid.padded_bytes((self.rows, self.group + 2 * pad), F32)

  def problem(self, dtype: DTypeLike) -> str | None:
    """Why blocks of this shape do not fit a TPU's tiles; None if they do."""
    if dtype not in (jnp.float32, jnp.bfloat16):
      return f"there is no kernel for {jnp.dtype(dtype)}"
    if self.n_images % grid.ROWS:
      return f"{self.shape[0]} images are not a multiple of {grid.ROWS}"
    if self.group % grid.LANES:
      return (f"{self.shape[2]} pixels of {self.shape[3]} channels are not a "
              f"multiple of {grid.LANES} lanes")
    return None


def of(shape: Sequence[int], most_rows: int = 0) -> Fold:
  """How to fold images [B, H, W, C].

  Args:
    shape: of the images.
    most_rows: a group has as many columns as this number of rows of single
      pixels allows, but at least those that fill whole tiles.
  """
  batch, height, width, channels = shape
  n_images = batch if batch % grid.ROWS else grid.ROWS
  least = grid.LANES // math.gcd(grid.LANES, channels)
  if width % least:
    least = 1
  n_pixels = max((n for n in range(least, width + 1, least) if width % n == 0
                  and n * n_images * height <= most_rows), default=least)
  return Fold(tuple(shape), n_images, n_pixels)


def fold_images(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [H, B, W C]."""
  b, h, w, c = x.shape
  return x.transpose(1, 2, 3, 0).reshape(h, w * c, b).transpose(0, 2, 1)


def unfold_images(x: jax.Array, shape: Sequence[int]) -> jax.Array:
  """The reverse, step by step, so that XLA sees that they cancel."""
  b, h, w, c = shape
  return x.transpose(0, 2, 1).reshape(h, w, c, b).transpose(3, 0, 1, 2)


def along_lanes(fold: Fold, vector: jax.Array) -> jax.Array:
  """A vector over channels, for each pixel of a row: [C] -> [1, W C]."""
  return jnp.tile(vector, fold.shape[2])[None]


def loop(fold: Fold, body: Callable[..., Any], init: Any = 0) -> Any:
  """Calls body(i, carry) -> carry for each group i."""
  return lax.fori_loop(0, fold.shape[2] // fold.n_pixels, body, init)


def lanes_of(fold: Fold, i: Any, offset: int = 0, more: int = 0) -> pl.Slice:
  """The lanes of group i, from `offset` on, and more lanes after them."""
  return slice_of(i * fold.group + offset, fold.group + more,
                  fold.group % grid.LANES == 0)


def slice_of(start: Any, size: int, aligned: bool) -> pl.Slice:
  """A slice of lanes or rows; aligned: that starts with a tile of lanes."""
  return pl.ds(pl.multiple_of(start, grid.LANES) if aligned else start, size)


def read(ref: Any, lanes: pl.Slice) -> jax.Array:
  """Lanes of a block in float32: [H, n_images, lanes]."""
  return ref[:, :, lanes].astype(F32)


def total(x: jax.Array) -> jax.Array:
  """Sums over each image: [H, n_images, lanes] -> [1, n_images, 1]."""
  return x.sum(0, keepdims=True).sum(2, keepdims=True)


def zeros(fold: Fold) -> jax.Array:
  """Where sums over images start."""
  return jnp.zeros((1, fold.n_images, 1), F32)


def statistics(fold: Fold, x_ref: Any, eps: float) -> Pair:
  """Mean and 1 / sqrt(variance + eps) of each image."""
  n = math.prod(fold.shape[1:])

  def add(i, carry):
    return carry + total(read(x_ref, lanes_of(fold, i)))

  mean = loop(fold, add, zeros(fold)) / n

  def add_square(i, carry):
    x = read(x_ref, lanes_of(fold, i)) - mean
    return carry + total(x * x)

  return mean, lax.rsqrt(loop(fold, add_square, zeros(fold)) / n + eps)


def factors(fold: Fold, keep_ref: Any) -> jax.Array:
  """Scalars of the batch's images [1, B], those of the block's."""
  image = lax.broadcasted_iota(jnp.int32, (1, fold.n_images, 1), 1)
  first = pl.program_id(0) * fold.n_images
  values = zeros(fold)
  for i in range(fold.n_images):
    values = jnp.where(image == i, keep_ref[0, first + i], values)
  return values


def write_norm_gradient(fold: Fold, sums: Pair, statistics: Pair, x_ref: Any,
                        dy_ref: Any, dz_ref: Any, dx_ref: Any) -> None:
  """Writes dx of y = x + f(z), z = (x - mean) inverse, from f's gradient dz.

  Args:
    fold: of the images.
    sums: of dz and of dz z over each image.
    statistics: mean and inverse.
    x_ref, dy_ref, dz_ref: read.
    dx_ref: written.
  """
  mean, inverse = statistics
  first, second = (v / math.prod(fold.shape[1:]) for v in sums)

  def write(i, carry):
    lanes = lanes_of(fold, i)
    z = (read(x_ref, lanes) - mean) * inverse
    dx = inverse * (dz_ref[:, :, lanes] - first - z * second)
    dx_ref[:, :, lanes] = (read(dy_ref, lanes) + dx).astype(dx_ref.dtype)
    return carry

  loop(fold, write)


def start_at_zero(*refs: Any) -> None:
  """Zeroes sums over the grid at its first step."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in refs:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)
