"""A block's MLP branch: norm, two products, LayerScale, drop path, shortcut.

  y = x + keep s (f(n W1 + b1) W2 + b2),  n = scale (x - mean) / sqrt(var + eps)
                                              + bias

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

from metaformer_jax.kernels import branch, folding, grid
from metaformer_jax.ops import activations

Array = jax.Array
F32 = jnp.float32
ACTIVATIONS = {"gelu": activations.GELU, "relu": activations.RELU,
               "squared_relu": activations.SQUARED_RELU}
# Pixels of a group, at most, if it can be.
_PIXELS = 512
# Bytes of the hidden activations in float32 that are computed at a time.
_HIDDEN = 2**20


class Settings(NamedTuple):
  """What does not change with the data.

  Attributes:
    activation: a name in `ACTIVATIONS`.
    eps: of the norm.
    interpret: whether the kernels run interpreted, on any platform.
    mesh: over whose axes the batch is split; None for one device.
  """

  activation: str
  eps: float
  interpret: bool
  mesh: AbstractMesh | None = None


def fold_of(shape: Sequence[int]) -> folding.Fold:
  """How images [B, H, W, C] are folded: groups of several pixels."""
  return folding.of(shape, _PIXELS)


def problem(shape: Sequence[int], dtype: DTypeLike, hidden: int,
            activation: str) -> str | None:
  """Why images [B, H, W, C] cannot use the kernels; None if they can."""
  if activation not in ACTIVATIONS:
    return f"there is no kernel with the activation {activation}"
  if hidden % grid.LANES:
    return (f"{hidden} hidden channels are not a multiple of {grid.LANES} "
            "lanes")
  fold = fold_of(shape)
  calls = (call(fold, dtype, hidden) for call in (forward_call, backward_call))
  return fold.problem(dtype) or grid.too_large(*calls)


def mlp_branch(x: Array, keep: Array | None, norm_scale: Array,
               norm_bias: Array | None, kernel1: Array, bias1: Array | None,
               kernel2: Array, bias2: Array | None, layer_scale: Array | None,
               *, activation: str = "gelu", eps: float = 1e-5,
               interpret: bool = False) -> Array:
  """x + keep layer_scale MLP(norm(x)), by kernels in a program for a TPU.

  Elsewhere, and for what has a `problem`, it is `plain`. Products are of x's
  dtype and accumulate in float32.

  Args:
    x: [B, H, W, C], float32 or bfloat16.
    keep: float32 [B], the factor of each image's branch, which has no gradient;
      None for 1.
    norm_scale, norm_bias: float32 [C]; None for no bias.
    kernel1, bias1: float32 [C, F] and [F]; None for no bias.
    kernel2, bias2: float32 [F, C] and [C]; None for no bias.
    layer_scale: float32 [C]; None for 1.
    activation: a name in `ACTIVATIONS`.
    eps: of the norm.
    interpret: runs the kernels interpreted, for tests.

  Returns:
    Like x.

  Raises:
    KeyError: there is no such activation.
  """
  n, hidden = kernel1.shape
  args = (x, branch.vector(keep, len(x), 1), branch.vector(norm_scale, n, 1),
          branch.vector(norm_bias, n, 0), kernel1.astype(F32),
          branch.vector(bias1, hidden, 0), kernel2.astype(F32),
          branch.vector(bias2, n, 0), branch.vector(layer_scale, n, 1))
  settings = Settings(activation, eps, interpret, branch.mesh())
  local = branch.local_shape(x.shape)
  if not interpret and (local is None or problem(
      local, x.dtype, hidden, activation)):
    return plain(settings, *args)
  return _branch(settings, *args)


def plain(settings: Settings, x: Array, keep: Array, norm_scale: Array,
          norm_bias: Array, kernel1: Array, bias1: Array, kernel2: Array,
          bias2: Array, layer_scale: Array) -> Array:
  """The branch by XLA, rounded to the dtype of x as a block's modules do it."""
  n = branch.group_norm(x, norm_scale, norm_bias, settings.eps)
  h = n @ kernel1.astype(x.dtype)
  h = h + branch.spread(bias1, h)
  g = ACTIVATIONS[settings.activation].apply(h)
  y = g @ kernel2.astype(x.dtype)
  return branch.add(x, y + branch.spread(bias2, y), keep, layer_scale)


def _call(fold, dtype, hidden, n_images, outputs, scratch):
  """A call with keep, images, vectors and matrices as inputs."""
  channels, images = fold.shape[3], fold.array(dtype)
  vector, wide = grid.Array((1, channels)), grid.Array((1, hidden))
  keep = grid.Array((1, fold.shape[0]), scalars=True)
  rows, part = fold.rows * fold.n_pixels, _part(fold, hidden)
  products = 2 if n_images == 1 else 5
  n_hidden = fold.shape[0] * fold.shape[1] * fold.shape[2] * hidden
  return grid.Call(
      fold.n_steps,
      (keep, *(images,) * n_images, vector, vector,
       grid.Array((channels, hidden), dtype), wide,
       grid.Array((hidden, channels), dtype), vector, vector),
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
                  ) -> grid.Call:
  """The grid of the backward kernel; it also gives the parameters' sums."""
  channels = fold.shape[3]
  vector, matrix = grid.Array((1, channels)), grid.Array((channels, hidden))
  wide = grid.Array((1, hidden))
  return _call(fold, dtype, hidden, 2,
               (vector, vector, matrix, wide, matrix, vector),
               (fold.block(),))


def _part(fold, hidden):
  """Hidden channels at a time: they divide all, in whole tiles."""
  most = _HIDDEN // (4 * fold.rows * fold.n_pixels)
  return max((n for n in range(grid.LANES, most + 1, grid.LANES)
              if hidden % n == 0),
             default=hidden if hidden % grid.LANES else grid.LANES)


def _inputs(x, keep, norm_scale, norm_bias, kernel1, bias1, kernel2, bias2,
            layer_scale):
  """What the kernels take after x, and before: keep."""
  return keep[None], (norm_scale[None], norm_bias[None],
                      kernel1.astype(x.dtype), bias1[None],
                      kernel2.astype(x.dtype), bias2[None], layer_scale[None])


def _forward(settings, x, *args):
  keep, parameters = _inputs(x, *args)
  hidden = args[3].shape[1]
  fold = fold_of(x.shape)
  kernel = functools.partial(_forward_kernel, settings, fold)
  y, = forward_call(fold, x.dtype, hidden)(
      kernel, keep, folding.fold_images(x), *parameters,
      interpret=settings.interpret)
  return folding.unfold_images(y, x.shape)


def _backward(settings, dy, x, *args):
  keep, parameters = _inputs(x, *args)
  kernel1, kernel2, bias2, layer_scale = args[3], args[5], args[6], args[7]
  fold = fold_of(x.shape)
  kernel = functools.partial(_backward_kernel, settings, fold)
  dx, dscale, dbias, dw1, db1, raw2, du = backward_call(
      fold, x.dtype, kernel1.shape[1])(
          kernel, keep, *(folding.fold_images(v) for v in (x, dy)),
          *parameters, interpret=settings.interpret)
  # Of the second product's output, only what it is multiplied by is known.
  rounded = kernel2.astype(x.dtype).astype(F32)
  dlayer_scale = (rounded.T * raw2).sum(1) + bias2 * du[0]
  dw2 = raw2.T * layer_scale[None]
  return (folding.unfold_images(dx, x.shape), dscale[0], dbias[0], dw1, db1[0],
          dw2, layer_scale * du[0], dlayer_scale)


_branch = branch.differentiable(plain, _forward, _backward)


def _dot(a, b, contracted):
  return lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((), ())),
                         preferred_element_type=F32)


def _parts(fold, hidden, body, init):
  """Calls body(lanes of hidden channels, carry) for each part of them."""
  size = _part(fold, hidden)
  aligned = size % grid.LANES == 0

  def step(i, carry):
    return body(folding.slice_of(i * size, size, aligned), carry)

  return lax.fori_loop(0, hidden // size, step, init)


def _split(fold, group):
  """Columns of pixels below each other: [H, n, n_pixels C] -> [pixels, C]."""
  c, group = fold.shape[3], group.reshape(fold.rows, -1)
  return jnp.concatenate([group[:, i * c:(i + 1) * c]
                          for i in range(fold.n_pixels)], 0)


def _join(fold, pixels):
  """The reverse of `_split`."""
  n = fold.rows
  joined = jnp.concatenate([pixels[i * n:(i + 1) * n]
                            for i in range(fold.n_pixels)], 1)
  return joined.reshape(fold.shape[1], fold.n_images, fold.group)


def _forward_kernel(settings, fold, keep_ref, x_ref, scale_ref, bias_ref,
                    w1_ref, b1_ref, w2_ref, b2_ref, layer_scale_ref, y_ref):
  value = ACTIVATIONS[settings.activation].value
  mean, inverse = folding.statistics(fold, x_ref, settings.eps)
  keep = folding.factors(fold, keep_ref)

  def write(i, carry):
    lanes = folding.lanes_of(fold, i)
    x = folding.read(x_ref, lanes)
    z = _split(fold, (x - mean) * inverse)
    n = (z * scale_ref[...] + bias_ref[...]).astype(x_ref.dtype)

    def add(part, total):
      h = _dot(n, w1_ref[:, part], (1, 0)) + b1_ref[:, part]
      g = value(h).astype(x_ref.dtype)
      return total + _dot(g, w2_ref[part, :], (1, 0))

    y = _parts(fold, w1_ref.shape[1], add, jnp.zeros(n.shape, F32))
    y = (y + b2_ref[...]) * layer_scale_ref[...]
    y_ref[:, :, lanes] = (x + keep * _join(fold, y)).astype(y_ref.dtype)
    return carry

  folding.loop(fold, write)


def _backward_kernel(settings, fold, keep_ref, x_ref, dy_ref, scale_ref,
                     bias_ref, w1_ref, b1_ref, w2_ref, b2_ref, layer_scale_ref,
                     dx_ref, dscale_ref, dbias_ref, dw1_ref, db1_ref, raw2_ref,
                     du_ref, dz_ref):
  del b2_ref
  folding.start_at_zero(dscale_ref, dbias_ref, dw1_ref, db1_ref, raw2_ref,
                        du_ref)
  both = ACTIVATIONS[settings.activation].value_and_slope
  mean, inverse = folding.statistics(fold, x_ref, settings.eps)
  keep = folding.factors(fold, keep_ref)
  dtype = x_ref.dtype

  def differentiate(i, sums):
    lanes = folding.lanes_of(fold, i)
    folded = (folding.read(x_ref, lanes) - mean) * inverse
    z = _split(fold, folded)
    n = (z * scale_ref[...] + bias_ref[...]).astype(dtype)
    du = _split(fold, keep * folding.read(dy_ref, lanes))
    du_ref[...] += du.sum(0, keepdims=True)
    dv = (du * layer_scale_ref[...]).astype(dtype)
    du = du.astype(dtype)

    def add(part, total):
      h = _dot(n, w1_ref[:, part], (1, 0)) + b1_ref[:, part]
      g, slope = both(h)
      dh = _dot(dv, w2_ref[part, :], (1, 1)) * slope
      db1_ref[:, part] += dh.sum(0, keepdims=True)
      dh = dh.astype(dtype)
      raw2_ref[:, part] += _dot(du, g.astype(dtype), (0, 0))
      dw1_ref[:, part] += _dot(n, dh, (0, 0))
      return total + _dot(dh, w1_ref[:, part], (1, 1))

    dn = _parts(fold, w1_ref.shape[1], add, jnp.zeros(n.shape, F32))
    dscale_ref[...] += (dn * z).sum(0, keepdims=True)
    dbias_ref[...] += dn.sum(0, keepdims=True)
    dz = _join(fold, dn * scale_ref[...])
    dz_ref[:, :, lanes] = dz
    return sums[0] + folding.total(dz), sums[1] + folding.total(dz * folded)

  sums = folding.loop(fold, differentiate, (folding.zeros(fold),) * 2)
  folding.write_norm_gradient(fold, sums, (mean, inverse), x_ref, dy_ref,
                              dz_ref, dx_ref)
