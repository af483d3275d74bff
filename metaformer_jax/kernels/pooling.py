"""A block's pooling branch: norm, pooling, scales, drop path, shortcut.

  y = r x + keep s (P n - n),  n = scale (x - mean) / sqrt(var + eps) + bias

P is the mean over the valid pixels of a window. Of an image, the kernel reads x
and writes y; backward, it reads x and dy and writes dx.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from metaformer_jax.kernels import branch, folding, grid, norms
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
  fold = folding.of(shape)
  if fold.group % grid.LANES:
    return (f"{shape[2]} pixels of {shape[3]} channels are not a multiple of "
            f"{grid.LANES} lanes")
  calls = (call(fold, dtype, size) for call in (forward_call, backward_call))
  return fold.problem(dtype) or grid.too_large(*calls)


def pooling_branch(x: Array, keep: Array | None, norm_scale: Array,
                   norm_bias: Array | None, layer_scale: Array | None,
                   res_scale: Array | None, *, size: int,
                   subtract: bool = True, eps: float = 1e-5,
                   interpret: bool = False) -> Array:
  """The branch after a GroupNorm, by kernels in a program for a TPU.

  Elsewhere, and for shapes that have a `problem`, it is `plain`.

  Args:
    x: [B, H, W, C], float32 or bfloat16.
    keep: float32 [B], the factor of each image's branch, which has no gradient;
      None for 1.
    norm_scale: float32 [C].
    norm_bias: float32 [C]; None for no bias. With `subtract`, it cancels: the
      kernel's gradient is 0, that of `plain` is rounding noise.
    layer_scale, res_scale: float32 [C], of the branch and of the shortcut; None
      for 1.
    size: of a window, odd.
    subtract: whether n is subtracted from its mean.
    eps: of the norm.
    interpret: runs the kernels interpreted, for tests.

  Returns:
    Like x.
  """
  n = x.shape[-1]
  args = (x, branch.vector(keep, len(x), 1), branch.vector(norm_scale, n, 1),
          branch.vector(norm_bias, n, 0), branch.vector(layer_scale, n, 1),
          branch.vector(res_scale, n, 1))
  settings = Settings(size, subtract, eps, interpret, branch.mesh())
  of_images = functools.partial(problem, dtype=x.dtype, size=size)
  if not interpret and branch.problem(x.shape, of_images):
    return plain(settings, *args)
  return _branch(settings, *args)


def plain(settings: Settings, x: Array, keep: Array, norm_scale: Array,
          norm_bias: Array, layer_scale: Array, res_scale: Array) -> Array:
  """The branch by XLA, rounded to the dtype of x as a block's modules do it."""
  n = branch.norm(x, norm_scale, norm_bias, norms.PerImage.axes, settings.eps)
  rows, columns = (_counts(n, settings.size) for n in x.shape[1:3])
  count = jnp.asarray(np.outer(rows, columns)[None, :, :, None], x.dtype)
  mixed = pooling.window_sum(n, settings.size) / count
  return branch.add(x, mixed - n if settings.subtract else mixed, keep,
                    layer_scale, res_scale)


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


def _call(fold, dtype, size, n_images, outputs=(), scratch=()):
  """A call with keep, images and what is the same for all blocks as inputs."""
  x, vector = fold.array(dtype), grid.Array((1, fold.lanes))
  pad = _pad(fold, size)
  return grid.Call(
      fold.n_steps, (fold.factors(), *(x,) * n_images, *(vector,) * 4),
      (x, *outputs), (fold.block(pad=pad), *scratch),
      values=12 * fold.group_bytes(pad))


def forward_call(fold: folding.Fold, dtype: DTypeLike, size: int) -> grid.Call:
  """The grid of the forward kernel."""
  return _call(fold, dtype, size, 1)


def backward_call(fold: folding.Fold, dtype: DTypeLike, size: int) -> grid.Call:
  """The grid of the backward kernel; it also gives sums over images."""
  sums = grid.Array((fold.n_images, fold.lanes))
  return _call(fold, dtype, size, 2, (sums, sums, grid.Array((1, fold.lanes))),
               norms.PerImage.scratch(fold))


def _inputs(settings, x, keep, parameters):
  """The fold, keep, and what is the same for all images, along the lanes.

  That are a, c, ResScale, and 1 over the number of columns in a window.
  """
  fold, (*inner, res_scale) = folding.of(x.shape), parameters
  vectors = [folding.along_lanes(fold, v)
             for v in (*_vectors(settings, *inner), res_scale)]
  columns = np.repeat(1 / _counts(x.shape[2], settings.size), x.shape[3])
  return fold, keep[None], (*vectors, jnp.asarray(columns[None], F32))


def _forward(settings, x, keep, *parameters):
  fold, keep, shared = _inputs(settings, x, keep, parameters)
  kernel = functools.partial(_forward_kernel, settings, fold)
  y, = forward_call(fold, x.dtype, settings.size)(
      kernel, keep, folding.fold_images(x), *shared,
      interpret=settings.interpret)
  return folding.unfold_images(y, x.shape)


def _backward(settings, dy, x, keep, *parameters):
  fold, keep, shared = _inputs(settings, x, keep, parameters)
  kernel = functools.partial(_backward_kernel, settings, fold)
  dx, *sums = backward_call(fold, x.dtype, settings.size)(
      kernel, keep, *(folding.fold_images(v) for v in (x, dy)), *shared,
      interpret=settings.interpret)
  _, pull = jax.vjp(functools.partial(_vectors, settings), *parameters[:-1])
  da, dc, dres_scale = (v.reshape(-1, x.shape[-1]).sum(0) for v in sums)
  return folding.unfold_images(dx, x.shape), *pull((da, dc)), dres_scale


_branch = branch.differentiable(plain, _forward, _backward)


def _sum_columns(settings, x):
  """Sums of x [H, n, lanes] over the rows of each window in the image."""
  total, zero = x, jnp.zeros_like(x)
  for d in range(1, min(settings.size // 2, len(x) - 1) + 1):
    total = total + jnp.concatenate([zero[:d], x[:-d]], 0)
    total = total + jnp.concatenate([x[d:], zero[:d]], 0)
  return total


def _over_rows(settings, x):
  """x [H, n, lanes] over the number of rows in the window around each row."""
  counts, rows = _counts(len(x), settings.size), range(len(x))
  parts = [(count, list(same)) for count, same in itertools.groupby(
      rows, key=lambda row: counts[row])]
  return jnp.concatenate([x[same[0]:same[-1] + 1] * (1 / float(count))
                          for count, same in parts], 0)


def _write_columns(settings, fold, sums_ref, of_group):
  """Writes sums over columns of `of_group(lanes)`, and zeros on both sides."""
  pad = _pad(fold, settings.size)
  if pad:
    zero = jnp.zeros((fold.shape[1], fold.n_images, pad), F32)
    sums_ref[:, :, :pad] = zero
    sums_ref[:, :, pad + fold.lanes:] = zero

  def write(i, carry):
    value = of_group(folding.lanes_of(fold, i))
    sums_ref[:, :, folding.lanes_of(fold, i, offset=pad)] = _sum_columns(
        settings, value)
    return carry

  folding.loop(fold, write)


def _window(settings, fold, sums_ref, lanes):
  """Sums of windows around the pixels of a group, from sums over columns."""
  pad, channels = _pad(fold, settings.size), fold.shape[3]
  sums = sums_ref[:, :, pl.ds(lanes.start, fold.group + 2 * pad)]
  half = settings.size // 2
  return sum(sums[:, :, start:start + fold.group] for start in (
      pad + d * channels for d in range(-half, half + 1)))


def _forward_kernel(settings, fold, keep_ref, x_ref, a_ref, c_ref,
                    res_scale_ref, columns_ref, y_ref, sums_ref):
  norm = norms.PerImage(fold, settings.eps, x_ref)
  keep = folding.factors(fold, keep_ref)
  _write_columns(settings, fold, sums_ref, norm.folded)

  def write(i, carry):
    lanes = folding.lanes_of(fold, i)
    mixed = _over_rows(settings, _window(settings, fold, sums_ref, lanes))
    mixed = mixed * columns_ref[:, lanes][None]
    if settings.subtract:
      mixed = mixed - norm.folded(lanes)
    y = keep * (mixed * a_ref[:, lanes][None] + c_ref[:, lanes][None])
    x = folding.read(x_ref, lanes) * res_scale_ref[:, lanes][None]
    y_ref[:, :, lanes] = (x + y).astype(y_ref.dtype)
    return carry

  folding.loop(fold, write)


def _backward_kernel(settings, fold, keep_ref, x_ref, dy_ref, a_ref, c_ref,
                     res_scale_ref, columns_ref, dx_ref, da_ref, dc_ref,
                     dres_scale_ref, sums_ref, *scratch):
  del c_ref
  folding.start_at_zero(da_ref, dc_ref, dres_scale_ref)
  norm = norms.PerImage(fold, settings.eps, x_ref, *scratch)
  keep = folding.factors(fold, keep_ref)

  def du(lanes):
    return keep * folding.read(dy_ref, lanes)

  # P^T divides by the counts, then sums over windows.
  _write_columns(settings, fold, sums_ref, lambda lanes: _over_rows(
      settings, du(lanes)) * columns_ref[:, lanes][None])

  def gradient(lanes, z):
    e = _window(settings, fold, sums_ref, lanes)
    if settings.subtract:
      e = e - du(lanes)
    else:
      dc_ref[:, lanes] += du(lanes).sum(0)
    da_ref[:, lanes] += (e * z).sum(0)
    return e * a_ref[:, lanes][None]

  norm.write_folded_gradient(gradient, functools.partial(
      folding.write_shortcut_gradient, x_ref, dy_ref, res_scale_ref, dx_ref,
      dres_scale_ref))
