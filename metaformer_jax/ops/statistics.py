"""Means, variances and standardisation over some of an array's axes."""

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def standardize(x: Array, weight: Array | None, axes: tuple[int, ...],
                eps: float) -> Array:
  """(x - mean) / sqrt(variance + eps) over the axes; float32.

  The gradient has two sums over x, in one pass, and needs x and the statistics
  alone. That of automatic differentiation has a third one, after these: of the
  deviations from the mean, which is 0.

  Args:
    x: floats.
    weight: as of `count`; None if all values count.
    axes: of the statistics.
    eps: is added to the variance.
  """
  return _standardize_fwd(x, weight, axes, eps)[0]


def _standardize_fwd(x, weight, axes, eps):
  z = x.astype(jnp.float32)
  mean, var = moments(z, axes, weight)
  mean, scale = _unfused((mean, lax.rsqrt(var + eps)), axes)
  return (z - mean) * scale, (x, weight, mean, scale)


def _standardize_bwd(axes, eps, kept, dy):
  x, weight, mean, scale = kept
  dy = _unfused(dy, axes)
  y = (x.astype(jnp.float32) - mean) * scale
  n = x.size // mean.size if weight is None else count(x, axes, weight)
  means = [v.sum(axes, keepdims=True) / n for v in (dy, dy * y)]
  if axes == (-1,):
    # XLA's one kernel for both passes is slow on a GPU: it has a row at a time.
    means = platforms.choose(
        lambda *v: v, *means, cuda=lambda *v: lax.optimization_barrier(v))
  through_statistics = means[0] + y * means[1]
  if weight is not None:
    through_statistics *= weight
  dx = scale * _unfused(dy - through_statistics, axes)
  return dx.astype(x.dtype), None


def _unfused(values, axes):
  """`platforms.unfused` for statistics of pixels; those of images are few."""
  return platforms.unfused(values) if axes == (-1,) else values


standardize.defvjp(_standardize_fwd, _standardize_bwd)
