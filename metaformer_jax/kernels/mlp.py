"""A block's MLP branch: norm, two products, scales, drop path, shortcut.

  y = r x + keep s (f(n W1 + b1) W2 + b2),
  n = scale (x - mean) / sqrt(var + eps) + bias

The hidden activations, the model's largest arrays, are never in HBM: backward,
the kernel computes them again. Of an image, it reads x and writes y; backward,
it reads x and dy and writes dx.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from metaformer_jax.kernels import branch, folding, grid, norms

Array = jax.Array
F32 = jnp.float32
# Pixels of a group, at most, if it can be.
_PIXELS = 512
# Bytes of the hidden activations in float32 that are computed at a time.
_HIDDEN = 2**20


class Settings(NamedTuple):
  """What does not change with the data.

  Attributes:
    norm: a name in `norms.NORMS`.
    activation: a name in `branch.ACTIVATIONS`.
    eps: of the norm.
    interpret: whether the kernels run interpreted, on any platform.
    mesh: over whose axes the batch is split; None for one device.
  """

  norm: str
  activation: str
  eps: float
  interpret: bool
  mesh: AbstractMesh | None = None


def fold_of(shape: Sequence[int], norm: str) -> folding.Fold:
  """How images [B, H, W, C] are folded: groups of several pixels."""
  return norms.NORMS[norm].fold(shape, _PIXELS)


def problem(shape: Sequence[int], dtype: DTypeLike, hidden: int,
            activation: str, norm: str = "group_norm") -> str | None:
  """Why images [B, H, W, C] cannot use the kernels; None if they can."""
  if activation not in branch.ACTIVATIONS:
    return f"there is no kernel with the activation {activation}"
  if hidden % grid.LANES:
    return (f"{hidden} hidden channels are not a multiple of {grid.LANES} "
            "lanes")
  fold = fold_of(shape, norm)
  return fold.problem(dtype) or grid.too_large(
      forward_call(fold, dtype, hidden),
      backward_call(fold, dtype, hidden, norm))


def mlp_branch(x: Array, keep: Array | None, norm_scale: Array,
               norm_bias: Array | None, kernel1: Array, bias1: Array | None,
               act_scale: Array | None, act_bias: Array | None, kernel2: Array,
               bias2: Array | None, layer_scale: Array | None,
               res_scale: Array | None, *, norm: str = "group_norm",
               activation: str = "gelu", eps: float = 1e-5,
               interpret: bool = False) -> Array:
  """The branch, by kernels in a program for a TPU.

  Elsewhere, and for what has a `problem`, it is `plain`. Products are of x's
  dtype and accumulate in float32.

  Args:
    x: [B, H, W, C], float32 or bfloat16.
    keep: float32 [B], the factor of each image's branch, which has no gradient;
      None for 1.
    norm_scale, norm_bias: float32 [C]; None for no bias.
    kernel1, bias1: float32 [C, F] and [F]; None for no bias.
    act_scale, act_bias: float32 [1], of the activation's values; both None for
      1 and 0.
    kernel2, bias2: float32 [F, C] and [C]; None for no bias.
    layer_scale, res_scale: float32 [C], of the branch and of the shortcut; None
      for 1.
    norm: a name in `norms.NORMS`.
    activation: a name in `branch.ACTIVATIONS`.
    eps: of the norm.
    interpret: runs the kernels interpreted, for tests.

  Returns:
    Like x.

  Raises:
    KeyError: there is no such norm or activation.
  """
  n, hidden = kernel1.shape
  affine = () if act_scale is None else (
      branch.vector(act_scale, 1, 1), branch.vector(act_bias, 1, 0))
  args = (x, branch.vector(keep, len(x), 1), branch.vector(norm_scale, n, 1),
          branch.vector(norm_bias, n, 0), kernel1.astype(F32),
          branch.vector(bias1, hidden, 0), affine, kernel2.astype(F32),
          branch.vector(bias2, n, 0), branch.vector(layer_scale, n, 1),
          branch.vector(res_scale, n, 1))
  settings = Settings(norm, activation, eps, interpret, branch.mesh())
  of_images = functools.partial(problem, dtype=x.dtype, hidden=hidden,
                                activation=activation, norm=norm)
  if not interpret and branch.problem(x.shape, of_images):
    return plain(settings, *args)
  return _branch(settings, *args)


def plain(settings: Settings, x: Array, keep: Array, norm_scale: Array,
          norm_bias: Array, kernel1: Array, bias1: Array,
          affine: tuple[Array, ...], kernel2: Array, bias2: Array,
          layer_scale: Array, res_scale: Array) -> Array:
  """The branch by XLA, rounded to the dtype of x as a block's modules do it."""
  n = branch.norm(x, norm_scale, norm_bias, norms.NORMS[settings.norm].axes,
                  settings.eps)
  h = n @ kernel1.astype(x.dtype)
  h = h + branch.spread(bias1, h)
  g = branch.ACTIVATIONS[settings.activation].apply(h)
  if affine:
    scale, bias = (branch.spread(v, g) for v in affine)
    g = scale * g + bias
  y = g @ kernel2.astype(x.dtype)
  return branch.add(x, y + branch.spread(bias2, y), keep, layer_scale,
                    res_scale)


def _second(affine, kernel2, bias2, layer_scale):
  """Kernel and bias of the second product with the affine maps around it."""
  if affine:
    scale, bias = affine
    bias2 = bias2 + bias * kernel2.sum(0)
    kernel2 = scale[None] * kernel2
  return kernel2 * layer_scale[None], bias2 * layer_scale


def _call(fold, dtype, hidden, n_images, outputs, scratch):
  """A call with keep, images, vectors and matrices as inputs."""
  channels, images = fold.shape[3], fold.array(dtype)
  vector, wide = grid.Array((1, channels)), grid.Array((1, hidden))
  rows, part = fold.rows * fold.n_pixels, _part(fold, hidden)
  products = 2 if n_images == 1 else 5
  n_hidden = fold.shape[0] * fold.shape[1] * fold.shape[2] * hidden
  return grid.Call(
      fold.n_steps,
      (fold.factors(), *(images,) * n_images, vector, vector,
       grid.Array((channels, hidden), dtype), wide,
       grid.Array((hidden, channels), dtype), vector,
       grid.Array((1, fold.lanes))),
      (images, *outputs), scratch,
      values=12 * (grid.padded_bytes((rows, part), F32)
                   + fold.group_bytes())
      + 2 * grid.padded_bytes((channels, part), F32),
      flops=2 * products * n_hidden * channels,
      transcendentals=n_images * n_hidden)


def forward_call(fold: folding.Fold, dtype: DTypeLike, hidden: int,
                 ) -> grid.Call:
  """The grid of the forward kernel."""
  return _call(fold, dtype, hidden, 1, (), ())


def backward_call(fold: folding.Fold, dtype: DTypeLike, hidden: int,
                  norm: str) -> grid.Call:
  """The grid of the backward kernel; it also gives the parameters' sums."""
  channels = fold.shape[3]
  vector, matrix = grid.Array((1, channels)), grid.Array((channels, hidden))
  return _call(fold, dtype, hidden, 2,
               (vector, vector, matrix, grid.Array((1, hidden)), matrix, vector,
                grid.Array((1, fold.lanes))),
               norms.NORMS[norm].scratch(fold))


def _part(fold, hidden):
  """Hidden channels at a time: they divide all, in whole tiles."""
  most = _HIDDEN // (4 * fold.rows * fold.n_pixels)
  return max((n for n in range(grid.LANES, most + 1, grid.LANES)
              if hidden % n == 0),
             default=hidden if hidden % grid.LANES else grid.LANES)


def _inputs(fold, dtype, keep, norm_scale, norm_bias, kernel1, bias1, affine,
            kernel2, bias2, layer_scale, res_scale):
  """What the kernels take after x, and before: keep."""
  kernel2, bias2 = _second(affine, kernel2, bias2, layer_scale)
  return keep[None], (
      norm_scale[None], norm_bias[None], kernel1.astype(dtype), bias1[None],
      kernel2.astype(dtype), bias2[None], folding.along_lanes(fold, res_scale))


def _forward(settings, x, *args):
  fold, hidden = fold_of(x.shape, settings.norm), args[3].shape[1]
  keep, parameters = _inputs(fold, x.dtype, *args)
  kernel = functools.partial(_forward_kernel, settings, fold)
  y, = forward_call(fold, x.dtype, hidden)(
      kernel, keep, fold.fold(x), *parameters, interpret=settings.interpret)
  return folding.unfold_images(y, x.shape)


def _backward(settings, dy, x, *args):
  fold, hidden = fold_of(x.shape, settings.norm), args[3].shape[1]
  keep, parameters = _inputs(fold, x.dtype, *args)
  kernel = functools.partial(_backward_kernel, settings, fold)
  dx, dscale, dbias, dw1, db1, dw2, db2, dres_scale = backward_call(
      fold, x.dtype, hidden, settings.norm)(
          kernel, keep, *(fold.fold(v) for v in (x, dy)), *parameters,
          interpret=settings.interpret)
  _, pull = jax.vjp(_second, *args[5:9])
  affine, *second = pull((dw2.T, db2[0]))
  return (folding.unfold_images(dx, x.shape), dscale[0], dbias[0], dw1, db1[0],
          affine, *second, dres_scale.reshape(-1, x.shape[-1]).sum(0))


_branch = branch.differentiable(plain, _forward, _backward)


def _parts(fold, hidden, body, init):
  """Calls body(lanes of hidden channels, carry) for each part of them."""
  size = _part(fold, hidden)
  aligned = size % grid.LANES == 0

  def step(i, carry):
    return body(folding.slice_of(i * size, size, aligned), carry)

  return lax.fori_loop(0, hidden // size, step, init)


def _forward_kernel(settings, fold, keep_ref, x_ref, scale_ref, bias_ref,
                    w1_ref, b1_ref, w2_ref, b2_ref, res_scale_ref, y_ref):
  value = branch.ACTIVATIONS[settings.activation].value
  norm = norms.NORMS[settings.norm](fold, settings.eps, x_ref)
  keep = folding.factors(fold, keep_ref)

  def write(i, carry):
    lanes = folding.lanes_of(fold, i)
    n = norm.pixels(lanes) * scale_ref[...] + bias_ref[...]
    n = n.astype(x_ref.dtype)

    def add(part, total):
      h = folding.dot(n, w1_ref[:, part], (1, 0)) + b1_ref[:, part]
      g = value(h).astype(x_ref.dtype)
      return total + folding.dot(g, w2_ref[part, :], (1, 0))

    y = _parts(fold, w1_ref.shape[1], add, jnp.zeros(n.shape, F32))
    y = keep * folding.join(fold, y + b2_ref[...])
    x = folding.read(x_ref, lanes) * res_scale_ref[:, lanes][None]
    y_ref[:, :, lanes] = (x + y).astype(y_ref.dtype)
    return carry

  folding.loop(fold, write)


def _backward_kernel(settings, fold, keep_ref, x_ref, dy_ref, scale_ref,
                     bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, res_scale_ref,
                     dx_ref, dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref,
                     db2_ref, dres_scale_ref, *scratch):
  del b2_ref
  folding.start_at_zero(dscale_ref, dbias_ref, dw1_ref, db1_ref, dw2_ref,
                        db2_ref, dres_scale_ref)
  both = branch.ACTIVATIONS[settings.activation].value_and_slope
  norm = norms.NORMS[settings.norm](fold, settings.eps, x_ref, *scratch)
  keep = folding.factors(fold, keep_ref)
  dtype = x_ref.dtype

  def gradient(lanes, z):
    n = (z * scale_ref[...] + bias_ref[...]).astype(dtype)
    dv = folding.split(fold, keep * folding.read(dy_ref, lanes))
    db2_ref[...] += dv.sum(0, keepdims=True)
    dv = dv.astype(dtype)

    def add(part, total):
      h = folding.dot(n, w1_ref[:, part], (1, 0)) + b1_ref[:, part]
      g, slope = both(h)
      dh = folding.dot(dv, w2_ref[part, :], (1, 1)) * slope
      db1_ref[:, part] += dh.sum(0, keepdims=True)
      dh = dh.astype(dtype)
      dw2_ref[:, part] += folding.dot(dv, g.astype(dtype), (0, 0))
      dw1_ref[:, part] += folding.dot(n, dh, (0, 0))
      return total + folding.dot(dh, w1_ref[:, part], (1, 1))

    dn = _parts(fold, w1_ref.shape[1], add, jnp.zeros(n.shape, F32))
    dscale_ref[...] += (dn * z).sum(0, keepdims=True)
    dbias_ref[...] += dn.sum(0, keepdims=True)
    return dn * scale_ref[...]

  norm.write_gradient(gradient, functools.partial(
      folding.write_shortcut_gradient, x_ref, dy_ref, res_scale_ref, dx_ref,
      dres_scale_ref))
