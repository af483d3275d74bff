"""A block's branch with a separable convolution: norm, mixer, scales, shortcut.

  y = r x + keep s (D(f(n W1)) W2),
  n = scale (x - mean) / sqrt(var + eps) + bias

D is a depthwise convolution that keeps height and width. The hidden channels
never leave VMEM: `grid.LANES` of them are computed at a time, for whole images,
of which D needs the pixels around each one. Of an image, the kernel reads x and
writes y; backward, it reads x and dy and writes dx.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.typing import DTypeLike

from metaformer_jax.kernels import branch, depthwise, folding, grid, norms
from metaformer_jax.ops import convolution

Array = jax.Array
F32 = jnp.float32


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


def problem(shape: Sequence[int], dtype: DTypeLike, hidden: int, kernel: int,
            activation: str, norm: str = "layer_norm") -> str | None:
  """Why images [B, H, W, C] cannot use the kernels; None if they can."""
  if activation not in branch.ACTIVATIONS:
    return f"there is no kernel with the activation {activation}"
  sizes = depthwise.sizes_of(shape, hidden, kernel)
  return sizes.fold.problem(dtype) or grid.too_large(
      forward_call(sizes, dtype), backward_call(sizes, dtype, norm))


def sepconv_branch(x: Array, keep: Array | None, norm_scale: Array,
                   norm_bias: Array | None, kernel1: Array,
                   act_scale: Array | None, act_bias: Array | None,
                   taps: Array, kernel2: Array, layer_scale: Array | None,
                   res_scale: Array | None, *, norm: str = "layer_norm",
                   activation: str = "star_relu", eps: float = 1e-6,
                   interpret: bool = False) -> Array:
  """The branch, by kernels in a program for a TPU.

  Elsewhere, and for what has a `problem`, it is `plain`. Products are of x's
  dtype, the convolution of float32; both accumulate in float32.

  Args:
    x: [B, H, W, C], float32 or bfloat16.
    keep: float32 [B], the factor of each image's branch, which has no gradient;
      None for 1.
    norm_scale, norm_bias: float32 [C]; None for no bias.
    kernel1: float32 [C, F].
    act_scale, act_bias: float32 [1], of the activation's values; both None for
      1 and 0.
    taps: float32 [k, k, 1, F], D's kernel, k odd.
    kernel2: float32 [F, C].
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
          branch.vector(norm_bias, n, 0), kernel1.astype(F32), affine,
          taps.astype(F32).reshape(-1, hidden), kernel2.astype(F32),
          branch.vector(layer_scale, n, 1), branch.vector(res_scale, n, 1))
  settings = Settings(norm, activation, eps, interpret, branch.mesh())
  of_images = functools.partial(
      problem, dtype=x.dtype, hidden=hidden, kernel=len(taps),
      activation=activation, norm=norm)
  if not interpret and branch.problem(x.shape, of_images):
    return plain(settings, *args)
  return _branch(settings, *args)


def plain(settings: Settings, x: Array, keep: Array, norm_scale: Array,
          norm_bias: Array, kernel1: Array, affine: tuple[Array, ...],
          taps: Array, kernel2: Array, layer_scale: Array,
          res_scale: Array) -> Array:
  """The branch by XLA, rounded to the dtype of x as a block's modules do it."""
  n = branch.norm(x, norm_scale, norm_bias, norms.NORMS[settings.norm].axes,
                  settings.eps)
  g = branch.ACTIVATIONS[settings.activation].apply(n @ kernel1.astype(x.dtype))
  if affine:
    scale, bias = (branch.spread(v, g) for v in affine)
    g = scale * g + bias
  size, hidden = _size(taps), g.shape[-1]
  window = convolution.Window((1, 1), ((size // 2,) * 2,) * 2, hidden)
  v = convolution.conv(g, taps.astype(x.dtype).reshape(
      size, size, 1, hidden), window)
  return branch.add(x, v @ kernel2.astype(x.dtype), keep, layer_scale,
                    res_scale)


def _size(taps):
  return round(len(taps) ** 0.5)


def _inner(kernel1, affine, taps, kernel2, layer_scale):
  """What lies between the norm and the shortcut, with whole tiles of channels.

  The activation's scale and bias become vectors; LayerScale becomes a part of
  the second kernel. Channels that are added are 0 everywhere.
  """
  n = kernel1.shape[1]
  scale, bias = (jnp.broadcast_to(v, (1, n)) for v in affine or (1.0, 0.0))
  added = -n % grid.LANES
  kernel2 = jnp.pad(kernel2 * layer_scale[None], ((0, added), (0, 0)))
  return *(jnp.pad(v, ((0, 0), (0, added)))
           for v in (kernel1, scale, bias, taps)), kernel2


def _call(sizes, dtype, n_images, outputs, scratch):
  """A call with keep, images, vectors and matrices as inputs."""
  fold, hidden, kernel = sizes
  channels, images = fold.shape[3], fold.array(dtype)
  vector, wide = grid.Array((1, channels)), grid.Array((1, hidden))
  n_hidden = math.prod(fold.shape[:3]) * hidden
  # Backward, the hidden activations are computed twice: for D, and after it.
  products, convolutions = (2, 1) if n_images == 1 else (6, 3)
  return grid.Call(
      fold.n_steps,
      (fold.factors(), *(images,) * n_images, vector, vector,
       grid.Array((channels, hidden), dtype), wide, wide,
       grid.Array((kernel**2, hidden)), grid.Array((hidden, channels), dtype),
       grid.Array((1, fold.lanes))),
      (images, *outputs), (fold.block(), sizes.padded(dtype), *scratch),
      values=12 * (sizes.group().block_bytes + fold.group_bytes())
      + 2 * grid.padded_bytes((channels, grid.LANES), F32),
      flops=2 * n_hidden * (products * channels + convolutions * kernel**2))


def forward_call(sizes: depthwise.Sizes, dtype: DTypeLike) -> grid.Call:
  """The grid of the forward kernel."""
  return _call(sizes, dtype, 1, (), (sizes.group(),))


def backward_call(sizes: depthwise.Sizes, dtype: DTypeLike, norm: str,
                  ) -> grid.Call:
  """The grid of the backward kernel; it also gives the parameters' sums."""
  fold, hidden, kernel = sizes
  channels = fold.shape[3]
  vector, wide = grid.Array((1, channels)), grid.Array((1, hidden))
  matrix = grid.Array((channels, hidden))
  return _call(sizes, dtype, 2,
               (vector, vector, matrix, wide, wide,
                grid.Array((kernel**2, fold.n_images, hidden)), matrix,
                grid.Array((1, fold.lanes))),
               (sizes.padded(dtype), sizes.group(), sizes.group(),
                *norms.NORMS[norm].scratch(fold)))


def _inputs(x, keep, norm_scale, norm_bias, *inner, res_scale):
  """Sizes, keep, and what the kernels take after the images."""
  kernel1, scale, bias, taps, kernel2 = _inner(*inner)
  sizes = depthwise.sizes_of(x.shape, kernel1.shape[1], _size(taps))
  return sizes, keep[None], (
      norm_scale[None], norm_bias[None], kernel1.astype(x.dtype), scale, bias,
      taps, kernel2.astype(x.dtype), folding.along_lanes(
          sizes.fold, res_scale))


def _forward(settings, x, *args):
  sizes, keep, parameters = _inputs(x, *args[:-1], res_scale=args[-1])
  kernel = functools.partial(_forward_kernel, settings, sizes)
  y, = forward_call(sizes, x.dtype)(
      kernel, keep, sizes.fold.fold(x), *parameters,
      interpret=settings.interpret)
  return folding.unfold_images(y, x.shape)


def _backward(settings, dy, x, *args):
  sizes, keep, parameters = _inputs(x, *args[:-1], res_scale=args[-1])
  kernel = functools.partial(_backward_kernel, settings, sizes)
  dx, dscale, dbias, *dinner, dtaps, dw2, dres_scale = backward_call(
      sizes, x.dtype, settings.norm)(
          kernel, keep, *(sizes.fold.fold(v) for v in (x, dy)), *parameters,
          interpret=settings.interpret)
  _, pull = jax.vjp(_inner, *args[3:-1])
  return (folding.unfold_images(dx, x.shape), dscale[0], dbias[0],
          *pull((*dinner, dtaps.sum(1), dw2.T)),
          dres_scale.reshape(-1, x.shape[-1]).sum(0))


_branch = branch.differentiable(plain, _forward, _backward)


def _for_each_part(sizes, body):
  """Calls body(channels) for each tile of hidden channels."""

  def step(i, carry):
    body(folding.slice_of(i * grid.LANES, grid.LANES, True))
    return carry

  lax.fori_loop(0, sizes.hidden // grid.LANES, step, 0)


def _for_each_group(sizes, body):
  """Calls body(i, lanes) for each group of columns."""

  def step(i, carry):
    body(i, folding.lanes_of(sizes.fold, i))
    return carry

  folding.loop(sizes.fold, step)


def _forward_kernel(settings, sizes, keep_ref, x_ref, scale_ref, bias_ref,
                    w1_ref, act_scale_ref, act_bias_ref, taps_ref, w2_ref,
                    res_scale_ref, y_ref, sum_ref, g_ref, v_ref):
  fold, dtype = sizes.fold, x_ref.dtype
  value = branch.ACTIVATIONS[settings.activation].value
  norm = norms.NORMS[settings.norm](fold, settings.eps, x_ref)
  keep = folding.factors(fold, keep_ref)
  folding.start_at_zero(g_ref)
  sum_ref[...] = jnp.zeros(sum_ref.shape, F32)

  def add(part):

    def expand(i, lanes):
      n = norm.pixels(lanes) * scale_ref[...] + bias_ref[...]
      h = folding.dot(n.astype(dtype), w1_ref[:, part], (1, 0))
      depthwise.write_group(
          sizes, g_ref, i,
          value(h) * act_scale_ref[:, part] + act_bias_ref[:, part])

    def mix(i, lanes):
      depthwise.convolve(sizes, i, g_ref, taps_ref.at[:, part], v_ref)
      v = v_ref[...].reshape(-1, grid.LANES).astype(dtype)
      sum_ref[:, :, lanes] += folding.join(
          fold, folding.dot(v, w2_ref[part, :], (1, 0)))

    _for_each_group(sizes, expand)
    _for_each_group(sizes, mix)

  _for_each_part(sizes, add)

  def write(i, lanes):
    del i
    x = folding.read(x_ref, lanes) * res_scale_ref[:, lanes][None]
    y_ref[:, :, lanes] = (x + keep * sum_ref[:, :, lanes]).astype(y_ref.dtype)

  _for_each_group(sizes, write)


def _backward_kernel(settings, sizes, keep_ref, x_ref, dy_ref, scale_ref,
                     bias_ref, w1_ref, act_scale_ref, act_bias_ref, taps_ref,
                     w2_ref, res_scale_ref, dx_ref, dscale_ref, dbias_ref,
                     dw1_ref, dact_scale_ref, dact_bias_ref, dtaps_ref,
                     dw2_ref, dres_scale_ref, dn_ref, g_ref, dv_ref, v_ref,
                     dg_ref, *scratch):
  fold, dtype = sizes.fold, x_ref.dtype
  folding.start_at_zero(dscale_ref, dbias_ref, dw1_ref, dact_scale_ref,
                        dact_bias_ref, dtaps_ref, dw2_ref, dres_scale_ref,
                        g_ref, dv_ref)
  both = branch.ACTIVATIONS[settings.activation].value_and_slope
  norm = norms.NORMS[settings.norm](fold, settings.eps, x_ref, *scratch)
  keep = folding.factors(fold, keep_ref)
  dn_ref[...] = jnp.zeros(dn_ref.shape, F32)

  def expand(lanes, part):
    """n and du of a group, and its hidden channels before the activation."""
    n = norm.pixels(lanes) * scale_ref[...] + bias_ref[...]
    n = n.astype(dtype)
    du = folding.split(fold, keep * folding.read(dy_ref, lanes)).astype(dtype)
    return n, du, folding.dot(n, w1_ref[:, part], (1, 0))

  def add(part):

    def fill(i, lanes):
      _, du, h = expand(lanes, part)
      g, _ = both(h)
      depthwise.write_group(
          sizes, g_ref, i, g * act_scale_ref[:, part] + act_bias_ref[:, part])
      depthwise.write_group(
          sizes, dv_ref, i, folding.dot(du, w2_ref[part, :], (1, 1)))

    def mix(i, lanes):
      depthwise.differentiate(
          sizes, i, g_ref, dv_ref, taps_ref.at[:, part], v_ref, dg_ref,
          dtaps_ref.at[:, :, part])
      v, dg = (ref[...].reshape(-1, grid.LANES) for ref in (v_ref, dg_ref))
      n, du, h = expand(lanes, part)
      dw2_ref[:, part] += folding.dot(du, v.astype(dtype), (0, 0))
      g, slope = both(h)
      dact_scale_ref[:, part] += (dg * g).sum(0, keepdims=True)
      dact_bias_ref[:, part] += dg.sum(0, keepdims=True)
      dh = (dg * act_scale_ref[:, part] * slope).astype(dtype)
      dw1_ref[:, part] += folding.dot(n, dh, (0, 0))
      dn_ref[:, :, lanes] += folding.join(
          fold, folding.dot(dh, w1_ref[:, part], (1, 1)))

    _for_each_group(sizes, fill)
    _for_each_group(sizes, mix)

  _for_each_part(sizes, add)

  _write_gradient(fold, norm, dn_ref, scale_ref, dscale_ref, dbias_ref,
                  functools.partial(
                      folding.write_shortcut_gradient, x_ref, dy_ref,
                      res_scale_ref, dx_ref, dres_scale_ref))


def _write_gradient(fold, norm, dn_ref, scale_ref, dscale_ref, dbias_ref,
                    write):
  """Writes the gradient of x from dn, and adds those of scale and bias."""

  def gradient(lanes, z):
    dn = folding.split(fold, dn_ref[:, :, lanes])
    dscale_ref[...] += (dn * z).sum(0, keepdims=True)
    dbias_ref[...] += dn.sum(0, keepdims=True)
    return dn * scale_ref[...]

  norm.write_gradient(gradient, write)
