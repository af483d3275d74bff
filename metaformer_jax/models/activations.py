"""Activations as modules: `activation(name=...)(x)`, for x of any shape."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from metaformer_jax.models import norms


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x), as in PyTorch; not the tanh approximation.

  The gradient is computed from x alone. Automatic differentiation would keep a
  second array of x's size, the largest size in the model.
  """
  z = x.astype(jnp.float32)
  return (z * _normal_cdf(z)).astype(x.dtype)


def _normal_cdf(z):
  """Phi, by erf as in PyTorch: erfc has two branches, of which XLA takes both.

  Phi is wrong by up to 6e-8, which erfc would not be for z < -5, where GELU
  vanishes: its largest error over [-12, 12] is 1.2e-6, as PyTorch's.
  """
  return 0.5 * (1 + lax.erf(z * 0.5**0.5))


def _gelu_fwd(x):
  return gelu(x), x


def _gelu_bwd(x, dy):
  z = x.astype(jnp.float32)
  pdf = jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5
  slope = _normal_cdf(z) + z * pdf
  return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


@jax.custom_vjp
def squared_relu(x: jax.Array) -> jax.Array:
  """relu(x)^2 (arXiv 2109.08668); its gradient is computed from x alone."""
  return jnp.square(jax.nn.relu(x))


def _squared_relu_fwd(x):
  return squared_relu(x), x


def _squared_relu_bwd(x, dy):
  return (2 * jax.nn.relu(x) * dy,)


squared_relu.defvjp(_squared_relu_fwd, _squared_relu_bwd)


class Elementwise(nn.Module):
  """A module that applies a function without parameters."""

  fn: Callable[[jax.Array], jax.Array]

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.fn(x)


class StarReLU(nn.Module):
  """s relu(x)^2 + b with one learned s and b (arXiv 2210.13452, eq. 7).

  They are initialised to 1 and 0, as in the official code; the paper's 0.8944
  and -0.4472 only motivate the scale and the bias.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (1,))
    bias = self.param("bias", nn.initializers.zeros, (1,))
    scale, bias = (norms.spread(v, x, x.dtype) for v in (scale, bias))
    return scale * squared_relu(x) + bias


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": functools.partial(Elementwise, gelu),
    "relu": functools.partial(Elementwise, jax.nn.relu),
    "silu": functools.partial(Elementwise, jax.nn.silu),
    "squared_relu": functools.partial(Elementwise, squared_relu),
    "star_relu": StarReLU,
}
