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
# Rows of images in a block of rows, at most.
_ROWS = 64


class Fold(NamedTuple):
  """A batch of images, cut into blocks of images and groups of columns.

  Attributes:
    shape: [B, H, W, C]; of rows of images, [B H, 1, W, C].
    n_images: of a block.
    n_pixels: columns of a group.
    batch: number of images.
  """

  shape: tuple[int, int, int, int]
  n_images: int
  n_pixels: int
  batch: int

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

  def factors(self) -> grid.Array:
    """A scalar for each image of the batch."""
    return grid.Array((1, self.batch), scalars=True)

  def fold(self, x: jax.Array) -> jax.Array:
    """Images [B, H, W, C] as this array."""
    return fold_images(x).reshape(self.shape[1], self.shape[0], self.lanes)

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
      return f"{self.n_images} images are not a multiple of {grid.ROWS}"
    return None


def of(shape: Sequence[int], most_pixels: int = 0) -> Fold:
  """How to fold images [B, H, W, C] into blocks of whole images.

  Args:
    shape: of the images.
    most_pixels: a group has as many columns as this number of its pixels
      allows, but at least those that fill whole tiles.
  """
  batch, height, width, channels = shape
  n_images = batch if batch % grid.ROWS else grid.ROWS
  return Fold(tuple(shape), n_images, _columns(
      width, channels, n_images * height, most_pixels), batch)


def of_rows(shape: Sequence[int], most_pixels: int = 0) -> Fold:
  """Likewise, into rows of images: each row of each image counts as an image.

  The rows at the same height lie next to each other, in the images' order.
  Blocks are such that the groups have about `most_pixels`.
  """
  batch, height, width, channels = shape
  sizes = [n for n in range(_ROWS, 0, -grid.ROWS) if batch % n == 0]
  folds = [Fold((batch * height, 1, width, channels), n,
                _columns(width, channels, n, most_pixels), batch)
           for n in sizes or [batch]]
  return min(folds, key=lambda fold: abs(
      most_pixels - fold.rows * fold.n_pixels))


def _columns(width, channels, rows, most_pixels):
  """Columns of a group: they divide all, and fill tiles if they are not all."""
  least = grid.LANES // math.gcd(grid.LANES, channels)
  if width % least:
    return width
  return max((n for n in range(least, width + 1, least)
              if width % n == 0 and n * rows <= most_pixels), default=least)


def fold_images(x: jax.Array) -> jax.Array:
  """[B, H, W, C] -> [H, B, W C]."""
  b, h, w, c = x.shape
  return x.transpose(1, 2, 3, 0).reshape(h, w * c, b).transpose(0, 2, 1)


def unfold_images(x: jax.Array, shape: Sequence[int]) -> jax.Array:
  """The reverse of `fold_images` and of `Fold.fold`.

  Step by step, so that XLA sees that they cancel.
  """
  b, h, w, c = shape
  x = x.reshape(h, b, w * c)
  return x.transpose(0, 2, 1).reshape(h, w, c, b).transpose(3, 0, 1, 2)


def along_lanes(fold: Fold, vector: jax.Array) -> jax.Array:
  """A vector over channels, for each pixel of a row: [C] -> [1, W C]."""
  return jnp.tile(vector, fold.shape[2])[None]


def loop(fold: Fold, body: Callable[..., Any], init: Any = 0) -> Any:
  """Calls body(i, carry) -> carry for each group i."""
  if fold.n_pixels == fold.shape[2]:
    return body(0, init)
  return lax.fori_loop(0, fold.shape[2] // fold.n_pixels, body, init)


def lanes_of(fold: Fold, i: Any, offset: int = 0) -> pl.Slice:
  """The lanes of group i, from `offset` on."""
  return slice_of(i * fold.group + offset, fold.group,
                  fold.group % grid.LANES == 0)


def slice_of(start: Any, size: int, aligned: bool) -> pl.Slice:
  """A slice of lanes or rows; aligned: that starts with a tile of lanes."""
  if aligned and not isinstance(start, int):
    start = pl.multiple_of(start, grid.LANES)
  return pl.ds(start, size)


def read(ref: Any, lanes: pl.Slice) -> jax.Array:
  """Lanes of a block in float32: [H, n_images, lanes]."""
  return ref[:, :, lanes].astype(F32)


def split(fold: Fold, group: jax.Array) -> jax.Array:
  """Columns of pixels below each other: [H, n, n_pixels C] -> [pixels, C]."""
  c, group = fold.shape[3], group.reshape(fold.rows, -1)
  return jnp.concatenate([group[:, i * c:(i + 1) * c]
                          for i in range(fold.n_pixels)], 0)


def join(fold: Fold, pixels: jax.Array) -> jax.Array:
  """The reverse of `split`."""
  n = fold.rows
  joined = jnp.concatenate([pixels[i * n:(i + 1) * n]
                            for i in range(fold.n_pixels)], 1)
  return joined.reshape(fold.shape[1], fold.n_images, fold.group)


def dot(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
  """The product of matrices over an axis of each, summed in float32."""
  return lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((), ())),
                         preferred_element_type=F32)


def total(x: jax.Array) -> jax.Array:
  """Sums over each image: [H, n_images, lanes] -> [1, n_images, 1]."""
  return x.sum(0, keepdims=True).sum(2, keepdims=True)


def zeros(fold: Fold) -> jax.Array:
  """Where sums over images start."""
  return jnp.zeros((1, fold.n_images, 1), F32)


def factors(fold: Fold, keep_ref: Any) -> jax.Array:
  """Scalars of the batch's images [1, B], those of the block's."""
  image = lax.broadcasted_iota(jnp.int32, (1, fold.n_images, 1), 1)
  first = lax.rem(pl.program_id(0) * fold.n_images, fold.batch)
  values = zeros(fold)
  for i in range(fold.n_images):
    values = jnp.where(image == i, keep_ref[0, first + i], values)
  return values


def write_shortcut_gradient(x_ref: Any, dy_ref: Any, scale_ref: Any,
                            dx_ref: Any, dscale_ref: Any, lanes: pl.Slice,
                            dx: jax.Array) -> None:
  """Writes the gradients of y = scale x + f(x), of some lanes.

  Args:
    x_ref, dy_ref: read.
    scale_ref: likewise, for each pixel of a row [1, W C].
    dx_ref: written.
    dscale_ref: to which the sums over images and rows are added, [1, W C].
    lanes: which.
    dx: through f.
  """
  dy = read(dy_ref, lanes)
  dscale = (dy * read(x_ref, lanes)).sum(0).sum(0, keepdims=True)
  dscale_ref[:, lanes] += dscale
  dx = scale_ref[:, lanes][None] * dy + dx
  dx_ref[:, :, lanes] = dx.astype(dx_ref.dtype)


def start_at_zero(*refs: Any) -> None:
  """Zeroes sums over the grid at its first step."""

  @pl.when(pl.program_id(0) == 0)
  def _():
    for ref in refs:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)
