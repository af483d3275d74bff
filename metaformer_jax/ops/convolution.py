"""2-D convolutions, channels last, in the form that is fast on the platform.

`conv_general_dilated` stands in for `lax.conv_general_dilated` in `nn.Conv`. On
a CPU, XLA computes four kinds at a fraction of the speed of a matrix product,
forward or backward; for these there are forms of the same sum that are as fast.
On a GPU, one kind of gradient has a faster form.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import dense, platforms, winograd

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Of the pixels that `_patches_kernel_gradient` copies at once, unless a row has
# more: what stays in the processor's cache, and needs no new pages of memory.
_BAND_BYTES = 8 * 2**20
# Pixels of a row that `_depthwise_kernel_gradient` sums in one expression.
_LONGEST_ROW = 64
# With fewer, the transforms take more time than the products that they save.
_FEWEST_WINOGRAD_CHANNELS = 32


class Window(NamedTuple):
  """How a kernel is moved over an image.

  Attributes:
    strides: of rows and columns.
    padding: ((top, bottom), (left, right)).
    groups: of channels, each convolved by itself.
  """

  strides: tuple[int, int]
  padding: tuple[tuple[int, int], tuple[int, int]]
  groups: int


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides, padding,
    lhs_dilation=None, rhs_dilation=None, dimension_numbers=None,
    feature_group_count: int = 1, precision=None, **kwargs) -> jax.Array:
  """As `lax.conv_general_dilated`, of which it takes all arguments.

  Args:
    lhs: x [B, H, W, C].
    rhs: the kernel [h, w, C / feature_group_count, C'].
    window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
      feature_group_count, precision: see there.
    **kwargs: its other arguments.

  Returns:
    [B, H', W', C'].
  """
  plain = functools.partial(
      lax.conv_general_dilated, lhs, rhs, window_strides, padding, lhs_dilation,
      rhs_dilation, dimension_numbers, feature_group_count, precision=precision,
      **kwargs)
  dilations = (*(lhs_dilation or (1,)), *(rhs_dilation or (1,)))
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  if (lhs.ndim != 4 or set(dilations) != {1} or precision is not None or
      any(v is not None for v in kwargs.values()) or
      numbers != lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)):
    return plain()
  strides = tuple(window_strides)
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides,
                                  padding)
  window = Window(strides, tuple(map(tuple, padding)), feature_group_count)
  return conv(lhs, rhs, window)


def conv(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
  """[B, H, W, C] and [h, w, C / groups, C'] -> [B, H', W', C']."""
  forms = platforms.Platforms(
      cpu=cpu_forms(kernel.shape, window).bind(window=window),
      cuda=cuda_forms(x.shape, kernel.shape, window).bind(window=window))
  plain = functools.partial(_plain, window=window)
  if not any(map(any, forms)):
    return plain(x, kernel)
  return platforms.bilinear(plain, forms, x, kernel)


def cpu_forms(kernel_shape: tuple[int, ...], window: Window) -> platforms.Forms:
  """Those of a convolution's kind, which take the window as well."""
  *size, in_channels, out_channels = kernel_shape
  if window.groups == 1 and max(size) == 1 and not any(
      map(any, window.padding)):
    return platforms.Forms(_pointwise, _pointwise_input_gradient,
                           _pointwise_kernel_gradient)
  if window.groups == 1 and max(window.strides) > 1:
    return platforms.Forms(kernel_gradient=_patches_kernel_gradient)
  if (size == [3, 3] and window.strides == (1, 1) and window.groups == 1
      and min(in_channels, out_channels) >= _FEWEST_WINOGRAD_CHANNELS):
    return platforms.Forms(_winograd, _winograd_input_gradient,
                           _winograd_kernel_gradient)
  if _is_depthwise(kernel_shape, window):
    return platforms.Forms(_depthwise, _depthwise_input_gradient,
                           _depthwise_kernel_gradient)
  return platforms.Forms()


def cuda_forms(shape: tuple[int, ...], kernel_shape: tuple[int, ...],
               window: Window) -> platforms.Forms:
  """As `cpu_forms`, of images [B, H, W, C]."""
  if _is_depthwise(kernel_shape, window) and any(
      _missing(shape, kernel_shape, window)):
    return platforms.Forms(kernel_gradient=_padded_kernel_gradient)
  return platforms.Forms()


def _is_depthwise(kernel_shape, window) -> bool:
  """Whether each channel is convolved by itself, at every pixel."""
  _, _, in_channels, out_channels = kernel_shape
  return (in_channels == 1 and window.groups == out_channels
          and window.strides == (1, 1))


def _missing(shape, kernel_shape, window) -> list[int]:
  """By how many pixels the result is not larger than the kernel, by axis."""
  return [max(0, 2 * size - n - sum(pad)) for n, size, pad in zip(
      shape[1:3], kernel_shape, window.padding)]


def _plain(x, kernel, window):
  return lax.conv_general_dilated(
      x, kernel, window.strides, window.padding, dimension_numbers=_LAYOUT,
      feature_group_count=window.groups)


def _every(x, strides):
  """The pixels at which a kernel of 1 x 1 is applied."""
  return x[:, ::strides[0], ::strides[1]]


def _pointwise(x, kernel, window):
  return _every(x, window.strides) @ kernel[0, 0]


def _pointwise_input_gradient(dy, kernel, shape, window):
  dx = dy @ kernel[0, 0].T
  return _pad(dx, *((0, n - (m - 1) * s - 1, s - 1) for n, m, s in zip(
      shape[1:3], dy.shape[1:3], window.strides)))


def _pad(x, rows, columns):
  """Adds zeros before, after and between rows and columns; or removes some."""
  edges = [(*edge, 0)[:3] for edge in (rows, columns)]
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def _pointwise_kernel_gradient(x, dy, shape, window):
  return dense.outer(_every(x, window.strides), dy, shape)


def _taps(x, size, window, out):
  """For each position in the kernel, in order, the pixels that it meets."""
  (height, width), (down, right) = out, window.strides
  x = _pad(x, *window.padding)
  return [x[:, i:i + (height - 1) * down + 1:down,
            j:j + (width - 1) * right + 1:right]
          for i in range(size[0]) for j in range(size[1])]


def _patches_kernel_gradient(x, dy, shape, window):
  """Matrix products with all pixels that meet the kernel, of bands of rows.

  A batch is not cut, since it may be divided among devices.
  """
  height, width = dy.shape[1:3]
  down = window.strides[0]
  row_bytes = 4 * len(x) * width * math.prod(shape[:3])
  n_bands = math.ceil(height / max(1, _BAND_BYTES // row_bytes))
  rows = math.ceil(height / n_bands)
  needed = (n_bands * rows - 1) * down + shape[0]
  (top, _), columns = window.padding
  bottom = needed - x.shape[1] - top
  padded = _pad(x.astype(jnp.float32), (top, bottom), columns)
  dy = _pad(dy.astype(jnp.float32), (0, n_bands * rows - height), (0, 0))
  unpadded = window._replace(padding=((0, 0), (0, 0)))

  def add_band(i, total):
    pixels = lax.dynamic_slice_in_dim(
        padded, i * rows * down, (rows - 1) * down + shape[0], 1)
    taps = _taps(pixels, shape[:2], unpadded, (rows, width))
    return total + dense.outer(
        jnp.concatenate(taps, -1),
        lax.dynamic_slice_in_dim(dy, i * rows, rows, 1), shape)

  return lax.fori_loop(0, n_bands, add_band,
                       jnp.zeros(shape, jnp.float32)).astype(x.dtype)


def _winograd(x, kernel, window):
  return winograd.forward(x, kernel, window.padding)


def _winograd_input_gradient(dy, kernel, shape, window):
  del shape
  return winograd.input_gradient(dy, kernel, window.padding)


def _winograd_kernel_gradient(x, dy, shape, window):
  del shape
  return winograd.kernel_gradient(x, dy, window.padding)


def _depthwise(x, kernel, window):
  """`_weighted_taps`, of one more row, which is cut off.

  XLA joins the product of matrices that follows with the last terms of a sum,
  each of which it then computes by itself; but not with a slice.
  """
  rows, columns = window.padding
  more = window._replace(padding=((rows[0], rows[1] + 1), columns))
  return _weighted_taps(x, kernel, more)[:, :-1]


def _weighted_taps(x, kernel, window):
  """The sum of shifted images, each weighted by its part of the kernel."""
  size = kernel.shape[:2]
  out = [n + sum(pad) - k + 1
         for n, pad, k in zip(x.shape[1:3], window.padding, size)]
  weights = kernel.reshape(-1, 1, 1, 1, kernel.shape[-1]).astype(jnp.float32)
  taps = _taps(x, size, window, out)
  return sum(tap.astype(jnp.float32) * weight
             for tap, weight in zip(taps, weights)).astype(x.dtype)


def _depthwise_input_gradient(dy, kernel, shape, window):
  """The convolution of dy with the flipped kernel."""
  del shape
  padding = tuple(tuple(k - 1 - pad for pad in pads)
                  for k, pads in zip(kernel.shape, window.padding))
  return _weighted_taps(dy, kernel[::-1, ::-1],
                        window._replace(padding=padding))


def _depthwise_kernel_gradient(x, dy, shape, window):
  """Row by row of dy: its pixels times the windows of x around them.

  The window is a part of a row of windows, so that the sum over the pixels of a
  row is one expression over slices. Long rows are cut into pieces, which go
  with the batch.
  """
  h, w, _, dim = shape
  height, width = dy.shape[1:3]
  dtype = dy.dtype
  length = min(width, _LONGEST_ROW)
  n_pieces = -(-width // length)
  beyond = n_pieces * length - width
  (rows, (left, right)) = window.padding
  x = _pad(x.astype(jnp.float32), rows, (left, right + beyond))
  dy = _pad(dy.astype(jnp.float32), (0, 0), (0, beyond))

  def pieces(image, more):
    return jnp.concatenate([
        image[:, :, i * length:(i + 1) * length + more]
        for i in range(n_pieces)])

  x, dy = pieces(x, w - 1), pieces(dy, 0)

  def add_row(i, total):
    rows = lax.dynamic_slice_in_dim(x, i, h, axis=1)
    row = lax.dynamic_slice_in_dim(dy, i, 1, axis=1)
    return total + sum(rows[:, :, j:j + w] * row[:, :, j:j + 1]
                       for j in range(length))

  total = lax.fori_loop(0, height, add_row,
                        jnp.zeros((len(x), h, w, dim), jnp.float32))
  return total.sum(0).reshape(shape).astype(dtype)


def _padded_kernel_gradient(x, dy, shape, window):
  """That of `_plain`, of images that zeros make larger than the kernel.

  The gradient is a convolution of x with dy. XLA computes it by cuDNN's
  function for gradients only if dy is larger than the result in both
  directions, and else by that for convolutions, in 10 times the time.
  """
  rows, columns = ((0, n) for n in _missing(x.shape, shape, window))
  x, dy = (_pad(v, rows, columns) for v in (x, dy))
  kernel = jnp.zeros(shape, dy.dtype)
  return jax.linear_transpose(
      lambda kernel: _plain(x, kernel, window), kernel)(dy)[0]
