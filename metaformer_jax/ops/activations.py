"""Activations, and their slopes: as layers and as kernels compute them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import platforms

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
  """Exact GELU, x * Phi(x), as in PyTorch; not the tanh approximation.

  The gradient is computed from x alone. Automatic differentiation would keep a
  second array of x's size, the largest size in the model.
  """
  return _gelu(x.astype(jnp.float32)).astype(x.dtype)


def _normal_cdf(z):
  """Phi, by erf as in PyTorch: erfc has two branches, of which XLA takes both.

  Phi is wrong by up to 6e-8, which erfc would not be for z < -5, where GELU
  vanishes: its largest error over [-12, 12] is 1.2e-6, as PyTorch's.
  """
  return 0.5 * (1 + lax.erf(z * 0.5**0.5))


def _gelu(z):
  return z * _normal_cdf(z)


def _gelu_and_slope(z):
  pdf = jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5
  cdf = _normal_cdf(z)
  return z * cdf, cdf + z * pdf


def _gelu_fwd(x):
  return gelu(x), x


def _gelu_bwd(x, dy):
  z = platforms.computed_again(x).astype(jnp.float32)
  _, slope = _gelu_and_slope(z)
  return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def squared_relu(x: Array) -> Array:
  """relu(x)^2 (arXiv 2109.08668); its gradient is computed from x alone."""
  return jnp.square(jax.nn.relu(x))


def _squared_relu_fwd(x):
  return squared_relu(x), x


def _squared_relu_bwd(x, dy):
  return (2 * jax.nn.relu(x) * dy,)


squared_relu.defvjp(_squared_relu_fwd, _squared_relu_bwd)


@jax.custom_vjp
def star_relu(x: Array, scale: Array, bias: Array) -> Array:
  """scale relu(x)^2 + bias (arXiv 2210.13452, eq. 7), of arrays of one shape.

  The gradient is computed from x and scale alone, as that of `gelu`.
  """
  return scale * squared_relu(x) + bias


def _star_relu_fwd(x, scale, bias):
  return star_relu(x, scale, bias), (x, scale)


def _star_relu_bwd(kept, dy):
  return *platforms.choose(_star_relu_gradients, *kept, dy,
                           cpu=_star_relu_gradients_on_cpu), dy


def _star_relu_gradients(x, scale, dy):
  y, pull = jax.vjp(squared_relu, x)
  return *pull(dy * scale), dy * y


def _star_relu_gradients_on_cpu(x, scale, dy):
  """The same without relu(x), which XLA would write in the forward pass."""
  dy = jnp.where(x > 0, dy, 0)
  return 2 * x * (dy * scale), dy * x * x


star_relu.defvjp(_star_relu_fwd, _star_relu_bwd)


def _relu(z):
  return jnp.maximum(z, 0)


def _squared_relu_and_slope(z):
  positive = _relu(z)
  return positive * positive, 2 * positive


class Activation(NamedTuple):
  """An activation in the forms that layers and kernels need.

  Attributes:
    apply: of x of any dtype; its gradient needs x alone.
    value: of float32 values.
    value_and_slope: of float32 values, with the derivative.
  """

  apply: Callable[[Array], Array]
  value: Callable[[Array], Array]
  value_and_slope: Callable[[Array], tuple[Array, Array]]


GELU = Activation(gelu, _gelu, _gelu_and_slope)
RELU = Activation(
    jax.nn.relu, _relu, lambda z: (_relu(z), (z > 0).astype(z.dtype)))
SQUARED_RELU = Activation(
    squared_relu, lambda z: _squared_relu_and_slope(z)[0],
    _squared_relu_and_slope)
