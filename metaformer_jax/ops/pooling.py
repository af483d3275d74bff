"""Pooling of images [B, H, W, C]."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metaformer_jax.ops import platforms


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def window_sum(x: jax.Array, size: int) -> jax.Array:
  """Sums of size x size windows around each pixel, zero outside the image.

  On a GPU, the barrier keeps XLA from computing each sum again within the
  reductions that follow, those of a norm.

  Args:
    x: [B, H, W, C].
    size: odd.
  """
  return platforms.choose(
      functools.partial(_reduce_window, size=size), x,
      cpu=functools.partial(_shifted, size=size),
      cuda=lambda x: lax.optimization_barrier(_shifted(x, size)))


def _reduce_window(x, size):
  return lax.reduce_window(
      x, np.zeros((), x.dtype), lax.add, window_dimensions=(1, size, size, 1),
      window_strides=(1, 1, 1, 1), padding="SAME")


def _shifted(x, size):
  """Sums of shifted columns, then of shifted rows of these."""
  for axis in (2, 1):
    n, pad = x.shape[axis], [(0, 0)] * 4
    pad[axis] = (size // 2, size // 2)
    padded = jnp.pad(x, pad)
    x = sum(lax.slice_in_dim(padded, i, i + n, axis=axis) for i in range(size))
  return x


def _fwd(x, size):
  return window_sum(x, size), None


def _bwd(size, _, dy):
  # A pixel is in the windows of the pixels of its own window.
  return (window_sum(dy, size),)


window_sum.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x: jax.Array, size: int, stride: int, padding: int) -> jax.Array:
  """Maxima of size x size windows; the gradient goes to the first one of each.

  Args:
    x: [B, H, W, C], floats.
    size: of the windows.
    stride: between them, in both directions.
    padding: pixels around the image that are below every value.

  Returns:
    [B, floor((H + 2 padding - size) / stride) + 1, ..., C].
  """
  return lax.reduce_window(
      x, np.array(-np.inf, x.dtype), lax.max,
      window_dimensions=(1, size, size, 1),
      window_strides=(1, stride, stride, 1),
      padding=((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _max_fwd(x, size, stride, padding):
  return max_pool(x, size, stride, padding), x


def _max_bwd(size, stride, padding, x, dy):
  window = {"size": size, "stride": stride, "padding": padding}
  return (platforms.choose(
      lambda x, dy: jax.vjp(functools.partial(
          max_pool.fun, **window), x)[1](dy)[0], x, dy,
      cpu=functools.partial(_max_gradient, **window)),)


def _max_gradient(x, dy, size, stride, padding):
  """Gives each window's gradient to its first maximum.

  Pixels of the same remainder by the stride, a phase of the image, are in
  windows at the same offsets: a phase's gradient is a sum of shifted windows.
  """
  place = _place_of_maximum(x, size, stride, padding, dy.shape[1:3])
  before = (size - 1) // stride
  side = [-(-(n + 2 * padding) // stride) for n in x.shape[1:3]]
  around = [(0, 0, 0), *((before, n - m, 0) for n, m in zip(
      side, dy.shape[1:3])), (0, 0, 0)]
  # Without the barrier, XLA finds the place again for each of its uses.
  place, dy = lax.optimization_barrier((
      lax.pad(place, np.int32(-1), around),
      lax.pad(dy, jnp.zeros((), dy.dtype), around)))

  def phase(row, column):
    total = jnp.zeros((len(x), *side, x.shape[3]), dy.dtype)
    for i in range(row, size, stride):
      for j in range(column, size, stride):
        windows = tuple(
            slice(before - k // stride, before - k // stride + n)
            for k, n in zip((i, j), side))
        total += jnp.where(place[:, *windows] == i * size + j, dy[:, *windows],
                           0)
    return total

  whole = jnp.stack([
      jnp.stack([phase(row, column) for column in range(stride)], 3)
      for row in range(stride)], 2)
  whole = whole.reshape(len(x), *(stride * n for n in side), x.shape[3])
  return whole[:, padding:padding + x.shape[1], padding:padding + x.shape[2]]


def _place_of_maximum(x, size, stride, padding, out):
  """Which pixel of each window, row by row, is its first maximum."""
  edges = [(0, 0, 0), (padding, padding, 0), (padding, padding, 0), (0, 0, 0)]
  x = lax.pad(x, jnp.array(-jnp.inf, x.dtype), edges)
  best = place = None
  for n, (i, j) in enumerate(itertools.product(range(size), repeat=2)):
    ends = [k + (m - 1) * stride + 1 for k, m in zip((i, j), out)]
    value = x[:, i:ends[0]:stride, j:ends[1]:stride]
    if best is None:
      best, place = value, jnp.zeros(value.shape, jnp.int32)
      continue
    larger = value > best
    best = jnp.where(larger, value, best)
    place = jnp.where(larger, n, place)
  return place


max_pool.defvjp(_max_fwd, _max_bwd)
