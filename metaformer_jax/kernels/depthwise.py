"""Depthwise convolutions of a block of images in VMEM, a tile of channels each.

Columns of pixels are the first axis and rows the second, so that neither the
windows nor their shifts move anything within a tile of images and channels. A
border of zeros around the images stands for what is outside of them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from metaformer_jax.kernels import folding, grid

F32 = jnp.float32
# Pixels of a group of columns, at most, if it can be.
_PIXELS = 512
# Rows of pixels that are convolved at a time, at most.
_ROWS = 8


class Sizes(NamedTuple):
  """Of the images, and of the convolution.

  Attributes:
    fold: the images.
    hidden: channels that are convolved, in whole tiles.
    kernel: height and width of the convolution's kernel, odd.
  """

  fold: folding.Fold
  hidden: int
  kernel: int

  @property
  def pad(self) -> int:
    return self.kernel // 2

  def padded(self, dtype: DTypeLike) -> grid.Array:
    """A tile of channels, with a border: [W', H', n_images, lanes]."""
    _, h, w, _ = self.fold.shape
    return grid.Array((w + 2 * self.pad, h + 2 * self.pad, self.fold.n_images,
                       grid.LANES), dtype)

  def group(self) -> grid.Array:
    """A tile of a group of columns: [n_pixels, H, n_images, lanes]."""
    return grid.Array((self.fold.n_pixels, self.fold.shape[1],
                       self.fold.n_images, grid.LANES))


def sizes_of(shape: Sequence[int], hidden: int, kernel: int) -> Sizes:
  """Of images [B, H, W, C] with so many hidden channels."""
  return Sizes(folding.of(shape, _PIXELS),
               -(-hidden // grid.LANES) * grid.LANES, kernel)


def write_group(sizes: Sizes, ref: Any, i: Any, pixels: jax.Array) -> None:
  """Writes group i's [pixels, lanes] inside the border of a `padded` array."""
  n, pad = sizes.fold.n_pixels, sizes.pad
  ref[pl.ds(i * n + pad, n), pad:pad + sizes.fold.shape[1]] = pixels.reshape(
      sizes.group().shape).astype(ref.dtype)


def convolve(sizes: Sizes, i: Any, x_ref: Any, taps_ref: Any,
             y_ref: Any) -> None:
  """Computes y, the convolution of x, at the columns of group i.

  Args:
    sizes: of the images.
    i: which group.
    x_ref: read, a `padded` array.
    taps_ref: read, the convolution's kernel: [k k, lanes].
    y_ref: written, a `group`.
  """

  def write(column, row, n_rows):
    y_ref[column, pl.ds(row, n_rows)] = sum(
        pixels * taps_ref[tap:tap + 1][None] for tap, pixels in _windows(
            sizes, x_ref, i * sizes.fold.n_pixels + column, row, n_rows))

  _for_each_piece(sizes, write)


def differentiate(sizes: Sizes, i: Any, x_ref: Any, dy_ref: Any, taps_ref: Any,
                  y_ref: Any, dx_ref: Any, dtaps_ref: Any) -> None:
  """Computes y again, and the gradients at the columns of group i.

  That of x is the convolution of dy with the mirrored kernel.

  Args:
    sizes, i, x_ref, taps_ref, y_ref: as of `convolve`.
    dy_ref: read, a `padded` array.
    dx_ref: written, a `group`.
    dtaps_ref: to which sums are added: [k k, n_images, lanes].
  """

  def write(column, row, n_rows):
    place = i * sizes.fold.n_pixels + column, row, n_rows
    dy = dy_ref[place[0] + sizes.pad, pl.ds(row + sizes.pad, n_rows)]
    dy = dy.astype(F32)
    y = dx = jnp.zeros(dy.shape, F32)
    for (tap, x), (_, near) in zip(_windows(sizes, x_ref, *place),
                                   _windows(sizes, dy_ref, *place)):
      mirrored = sizes.kernel**2 - 1 - tap
      y = y + x * taps_ref[tap:tap + 1][None]
      dx = dx + near * taps_ref[mirrored:mirrored + 1][None]
      dtaps_ref[tap] += (x * dy).sum(0)
    y_ref[column, pl.ds(row, n_rows)] = y
    dx_ref[column, pl.ds(row, n_rows)] = dx

  _for_each_piece(sizes, write)


def _for_each_piece(sizes: Sizes, body: Callable[[Any, Any, int], None],
                    ) -> None:
  """Calls body(column of the group, first row, number of rows)."""
  height = sizes.fold.shape[1]
  n = max(n for n in range(1, _ROWS + 1) if height % n == 0)
  pieces = height // n

  def step(i, carry):
    body(lax.div(i, pieces), lax.rem(i, pieces) * n, n)
    return carry

  lax.fori_loop(0, sizes.fold.n_pixels * pieces, step, 0)


def _windows(sizes: Sizes, ref: Any, column: Any, row: Any, n_rows: int,
             ) -> Iterator[tuple[int, jax.Array]]:
  """Yields (tap, pixels [n_rows, n_images, lanes] that the tap weights).

  Args:
    sizes: of the images.
    ref: a `padded` array.
    column, row, n_rows: the pixels of the result, counted without the border.
  """
  for j in range(sizes.kernel):
    pixels = ref[column + j, pl.ds(row, n_rows + 2 * sizes.pad)].astype(F32)
    for i in range(sizes.kernel):
      yield i * sizes.kernel + j, pixels[i:i + n_rows]
