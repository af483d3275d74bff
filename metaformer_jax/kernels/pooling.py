"""A block's pooling branch: norm, pooling, LayerScale, drop path, shortcut.

  y = x + keep s (P n - n),  n = scale (x - mean) / sqrt(var + eps) + bias

P is the mean over the valid pixels of a window. Of an image, the kernel reads x
and writes y; backward, it reads x and dy and writes dx.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from metaformer_jax.kernels import branch, folding, grid
from metaformer_jax.ops import pooling

Array = jax.Array
F32 = jnp.float32


class Settings(NamedTuple):
  """What does not change with the data.

  Attributes:
    size: of a window, odd.
    subtract: whether n is subtracted from its mean.
    eps: of the norm.
    interpret: whether the kernels run interpreted, on any platform.
    mesh: over whose axes the batch is split; None for one device.
  """

  size: int
  subtract: bool
  eps: float
  interpret: bool
  mesh: AbstractMesh | None = None


def problem(shape: Sequence[int], dtype: DTypeLike, size: int) -> str | None:
  """Why images [B, H, W, C] cannot use the kernels; None if they can."""
  fold = folding.of(shape, dtype)
  calls = (call(fold, dtype, size) for call in (forward_call, backward_call))
  return fold.problem(dtype) or grid.too_large(*calls)


def pooling_branch(x: Array, keep: Array | None, norm_scale: Array,
                   norm_bias: Array | None, layer_scale: Array | None, *,
                   size: int, subtract: bool = True, eps: float = 1e-5,
                   interpret: bool = False) -> Array:
  """x + keep layer_scale (P n - n), by kernels in a program for a TPU.

  Elsewhere, and for shapes that have a `problem`, it is `plain`.

  Args:
    x: [B, H, W, C], float32 or bfloat16.
    keep: float32 [B], the factor of each image's branch, which has no gradient;
      None for 1.
    norm_scale: float32 [C].
    norm_bias: float32 [C]; None for no bias. With `subtract`, it cancels: the
      kernel's gradient is 0, that of `plain` is rounding noise.
    layer_scale: float32 [C]; None for 1.
    size: of a window, odd.
    subtract: whether n is subtracted from its mean.
    eps: of the norm.
    interpret: runs the kernels interpreted, for tests.

  Returns:
    Like x.
  """
  n = x.shape[-1]
  args = (x, branch.vector(keep, len(x), 1), branch.vector(norm_scale, n, 1),
          branch.vector(norm_bias, n, 0), branch.vector(layer_scale, n, 1))
  settings = Settings(size, subtract, eps, interpret, branch.mesh())
  local = branch.local_shape(x.shape)
  if not interpret and (local is None or problem(local, x.dtype, size)):
    return plain(settings, *args)
  return _branch(settings, *args)


def plain(settings: Settings, x: Array, keep: Array, norm_scale: Array,
          norm_bias: Array, layer_scale: Array) -> Array:
  """The branch by XLA, rounded to the dtype of x as a block's modules do it."""
  n = branch.group_norm(x, norm_scale, norm_bias, settings.eps)
  rows, columns = (_counts(n, settings.size) for n in x.shape[1:3])
  count = jnp.asarray(np.outer(rows, columns)[None, :, :, None], x.dtype)
  mixed = pooling.window_sum(n, settings.size) / count
  return branch.add(x, mixed - n if settings.subtract else mixed, keep,
                    layer_scale)


def _counts(n: int, size: int) -> np.ndarray:
  """How many of n pixels in a row are in the window around each of them."""
  i = np.arange(n)
  return np.minimum(i + size // 2, n - 1) - np.maximum(i - size // 2, 0) + 1


def _vectors(settings, norm_scale, norm_bias, layer_scale):
  """(a, c) with which the branch is keep (a (P z - z) + c), of normalised x z.

  The norm's bias is its own mean over a window.
  """
  bias = jnp.zeros_like(norm_bias) if settings.subtract else norm_bias
  return layer_scale * norm_scale, layer_scale * bias


def _pad(fold: folding.Fold, size: int) -> int:
  """Lanes beside a block of sums over columns: half a window, in whole tiles.

  Without whole tiles in a group (interpreted only), half a window.
  """
  half = size // 2 * fold.shape[3]
  tile = 1 if fold.group % grid.LANES else grid.LANES
  return -(-half // tile) * tile


def _call(fold, dtype, size, n_images, outputs, n_blocks):
  """A call with keep, images and what is the same for all blocks as inputs."""
  x, vector = fold.array(dtype), grid.Array((1, fold.lanes))
  keep = grid.Array((1, fold.shape[0]), scalars=True)
  counts = (grid.Array((fold.rows, 1)), vector)
  scratch = (fold.block(pad=_pad(fold, size)), fold.block())[:n_blocks]
  return grid.Call(
      fold.n_steps, (keep, *(x,) * n_images, vector, vector, *counts),
      (x, *(vector,) * outputs), scratch,
      values=12 * grid.padded_bytes((fold.rows, fold.group + 2 * _pad(
          fold, size)), F32))


def forward_call(fold: folding.Fold, dtype: DTypeLike, size: int) -> grid.Call:
  """The grid of the forward kernel."""
  return _call(fold, dtype, size, n_images=1, outputs=0, n_blocks=1)


def backward_call(fold: folding.Fold, dtype: DTypeLike, size: int) -> grid.Call:
  """The grid of the backward kernel; it also gives sums over rows."""
  return _call(fold, dtype, size, n_images=2, outputs=2, n_blocks=2)


def _inputs(settings, x, keep, parameters):
  """The fold, and what the kernels take: keep, vectors along the lanes, counts.

  Counts are 1 over the number of valid rows, and of columns, in a window.
  """
  fold = folding.of(x.shape, x.dtype)
  _, height, width, _ = x.shape
  a, c = (folding.along_lanes(fold, v)
          for v in _vectors(settings, *parameters))
  rows = np.tile(1 / _counts(height, settings.size), fold.n_images)
  columns = np.repeat(1 / _counts(width, settings.size), x.shape[3])
  return fold, keep[None], (a, c, jnp.asarray(rows[:, None], F32),
                            jnp.asarray(columns[None], F32))


def _forward(settings, x, keep, *parameters):
  fold, keep, shared = _inputs(settings, x, keep, parameters)
  kernel = functools.partial(_forward_kernel, settings, fold)
  y, = forward_call(fold, x.dtype, settings.size)(
      kernel, keep, folding.fold_images(fold, x), *shared,
      interpret=settings.interpret)
  return y.reshape(x.shape)


def _backward(settings, dy, x, keep, *parameters):
  fold, keep, shared = _inputs(settings, x, keep, parameters)
  kernel = functools.partial(_backward_kernel, settings, fold)
  dx, da, dc = backward_call(fold, x.dtype, settings.size)(
      kernel, keep, *(folding.fold_images(fold, v) for v in (x, dy)), *shared,
      interpret=settings.interpret)
  _, pull = jax.vjp(functools.partial(_vectors, settings), *parameters)
  da, dc = (v.reshape(x.shape[2:]).sum(0) for v in (da, dc))
  return dx.reshape(x.shape), *pull((da, dc))


_branch = branch.differentiable(plain, _forward, _backward)


def _sum_columns(settings, fold, row, values):
  """Sums of values [rows, lanes] over the rows of each window in the image."""
  total = values
  for d in range(1, settings.size // 2 + 1):
    above, below = (pltpu.roll(values, shift % fold.rows, 0)
                    for shift in (d, -d))
    total += jnp.where(row >= d, above, 0)
    total += jnp.where(row < fold.shape[1] - d, below, 0)
  return total


def _write_columns(settings, fold, sums_ref, of_group):
  """Writes sums over columns of `of_group(lanes)`, and zeros on both sides."""
  pad, row = _pad(fold, settings.size), folding.row_in_image(fold)
  if pad:
    zero = jnp.zeros((fold.rows, pad), F32)
    sums_ref[:, :pad] = zero
    sums_ref[:, pad + fold.lanes:] = zero

  def write(i, carry):
    value = of_group(folding.lanes_of(fold, i))
    sums_ref[:, folding.lanes_of(fold, i, offset=pad)] = _sum_columns(
        settings, fold, row, value)
    return carry

  folding.loop(fold, write)


def _window(settings, fold, sums_ref, i):
  """Sums of windows around the pixels of group i, from sums over columns."""
  pad, channels = _pad(fold, settings.size), fold.shape[3]
  sums = sums_ref[:, folding.lanes_of(fold, i, more=2 * pad)]
  half = settings.size // 2
  return sum(sums[:, start:start + fold.group] for start in (
      pad + d * channels for d in range(-half, half + 1)))


def _forward_kernel(settings, fold, keep_ref, x_ref, a_ref, c_ref, rows_ref,
                    columns_ref, y_ref, sums_ref):
  mean, inverse = folding.statistics(fold, x_ref, settings.eps)
  keep = folding.of_rows(fold, keep_ref)

  def normalised(lanes):
    return (x_ref[:, lanes].astype(F32) - mean) * inverse

  _write_columns(settings, fold, sums_ref, normalised)

  def write(i, carry):
    lanes = folding.lanes_of(fold, i)
    mixed = _window(settings, fold, sums_ref, i) * rows_ref[...] * (
        columns_ref[:, lanes])
    if settings.subtract:
      mixed = mixed - normalised(lanes)
    y = mixed * a_ref[:, lanes] + c_ref[:, lanes]
    y_ref[:, lanes] = (x_ref[:, lanes].astype(F32) + keep * y).astype(
        y_ref.dtype)
    return carry

  folding.loop(fold, write)


def _backward_kernel(settings, fold, keep_ref, x_ref, dy_ref, a_ref, c_ref,
                     rows_ref, columns_ref, dx_ref, da_ref, dc_ref, sums_ref,
                     dz_ref):
  del c_ref
  folding.start_at_zero(da_ref, dc_ref)
  mean, inverse = folding.statistics(fold, x_ref, settings.eps)
  keep = folding.of_rows(fold, keep_ref)

  def du(lanes):
    return keep * dy_ref[:, lanes].astype(F32)

  def normalised(lanes):
    return (x_ref[:, lanes].astype(F32) - mean) * inverse

  # P^T divides by the counts, then sums over windows.
  _write_columns(settings, fold, sums_ref, lambda lanes: (
      du(lanes) * rows_ref[...] * columns_ref[:, lanes]))

  def differentiate(i, carry):
    lanes = folding.lanes_of(fold, i)
    z, e = normalised(lanes), _window(settings, fold, sums_ref, i)
    if settings.subtract:
      e = e - du(lanes)
    else:
      dc_ref[:, lanes] += du(lanes).sum(0, keepdims=True)
    da_ref[:, lanes] += (e * z).sum(0, keepdims=True)
    dz_ref[:, lanes] = e * a_ref[:, lanes]
    return folding.add_moments(carry, dz_ref[:, lanes], z)

  moments = folding.loop(fold, differentiate, folding.no_moments(fold))
  folding.write_norm_gradient(fold, moments, (mean, inverse), x_ref, dy_ref,
                              dz_ref, dx_ref)
