"""Means and variances over an array's axes, and normalisation by them."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import platforms

Array = jax.Array


def count(x: Array, axes: tuple[int, ...], weight: Array) -> Array:
  """How many values count, at least 1; the axes are kept with size 1.

  Args:
    x: any floats.
    axes: over which to count.
    weight: 1 for the values that count, else 0, of a shape that broadcasts to
      x's.
  """
  total = jnp.broadcast_to(weight, x.shape).sum(axes, keepdims=True)
  return jnp.maximum(total, 1)


def moments(x: Array, axes: tuple[int, ...], weight: Array | None = None,
            ) -> tuple[Array, Array]:
  """Mean and variance over the axes, which are kept with size 1.

  In two passes, as E[x^2] - E[x]^2 loses precision if the mean is large.

  Args:
    x: float32.
    axes: over which they are.
    weight: as of `count`; None if all values count.
  """
  if weight is None:
    mean = x.mean(axes, keepdims=True)
    return mean, jnp.square(x - mean).mean(axes, keepdims=True)
  n = count(x, axes, weight)
  mean = (x * weight).sum(axes, keepdims=True) / n
  return mean, (jnp.square(x - mean) * weight).sum(axes, keepdims=True) / n


def per_channel(vector: Array, x: Array) -> Array:
  """Shapes a vector over channels to multiply or add to x [..., C]."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def affine(x: Array, scale: Array, bias: Array | None) -> Array:
  """x [..., C] * scale [C] + bias [C]; without a bias if it is None."""
  y = x * per_channel(scale, x)
  return y if bias is None else y + per_channel(bias, x)


def normalize(x: Array, scale: Array, bias: Array | None,
              axes: tuple[int, ...], eps: float,
              weight: Array | None = None) -> Array:
  """(x - mean) / sqrt(variance + eps) * scale + bias; float32.

  Args:
    x: floats [..., C].
    scale: [C].
    bias: [C]; None for 0.
    axes: of the statistics: (-1,), or those of all pixels of an image or a
      batch, without C or with it.
    eps: is added to the variance.
    weight: as of `count`; None if all values count, as for (-1,).
  """
  if axes == (-1,):
    return affine(_standardize(x, eps), scale, bias)
  return _normalize(x, scale, bias, weight, axes, eps)


# The gradients of both need x and the statistics alone, and have one pass of
# sums. Those of automatic differentiation have another one after it: of the
# deviations from the mean, which is 0.


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _normalize(x, scale, bias, weight, axes, eps):
  return _normalize_fwd(x, scale, bias, weight, axes, eps)[0]


def _normalize_fwd(x, scale, bias, weight, axes, eps):
  z = x.astype(jnp.float32)
  mean, var = moments(z, axes, weight)
  inverse = lax.rsqrt(var + eps)
  y = affine((z - mean) * inverse, scale, bias)
  return y, (x, scale, bias, weight, mean, inverse)


def _normalize_bwd(axes, eps, kept, dy):
  x, scale, bias, weight, mean, inverse = kept
  mean, inverse = platforms.computed_again((mean, inverse))
  y = (x.astype(jnp.float32) - mean) * inverse
  # The sums of a channel's pixels serve the scale and the statistics as well.
  pixels = tuple(axis for axis in axes if axis != x.ndim - 1)
  sums = [v.sum(pixels, keepdims=True) for v in (dy, platforms.unfused(dy * y))]
  n = x.size // mean.size if weight is None else count(x, axes, weight)
  means = [affine(v, scale, None) / n for v in sums]
  if pixels != axes:
    means = [v.sum(-1, keepdims=True) for v in means]
  through_statistics = means[0] + y * means[1]
  if weight is not None:
    through_statistics *= weight
  dx = inverse * (affine(dy, scale, None) - through_statistics)
  d_bias, d_scale = (v.reshape(-1, v.shape[-1]).sum(0) for v in sums)
  return (dx.astype(x.dtype), d_scale, None if bias is None else d_bias, None)


_normalize.defvjp(_normalize_fwd, _normalize_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _standardize(x, eps):
  return _standardize_fwd(x, eps)[0]


def _standardize_fwd(x, eps):
  z = x.astype(jnp.float32)
  mean, var = moments(z, (-1,))
  mean, inverse = platforms.unfused((mean, lax.rsqrt(var + eps)))
  return (z - mean) * inverse, (x, mean, inverse)


def _standardize_bwd(eps, kept, dy):
  x, mean, inverse = kept
  dy = platforms.unfused(dy)
  y = (x.astype(jnp.float32) - mean) * inverse
  means = [v.mean(-1, keepdims=True) for v in (dy, dy * y)]
  # XLA's one kernel for both passes is slow on a GPU: it has a row at a time.
  means = platforms.choose(
      lambda *v: v, *means, cuda=lambda *v: lax.optimization_barrier(v))
  dx = inverse * platforms.unfused(dy - (means[0] + y * means[1]))
  return (dx.astype(x.dtype),)


_standardize.defvjp(_standardize_fwd, _standardize_bwd)
