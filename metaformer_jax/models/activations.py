"""Activations as modules: `activation(name=...)(x)`, for x of any shape."""

import functools
from collections.abc import Callable

import jax
from flax import linen as nn

from metaformer_jax.models import norms
from metaformer_jax.ops import activations


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
    return activations.star_relu(x, scale, bias)


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": functools.partial(Elementwise, activations.gelu),
    "relu": functools.partial(Elementwise, jax.nn.relu),
    "silu": functools.partial(Elementwise, jax.nn.silu),
    "squared_relu": functools.partial(Elementwise, activations.squared_relu),
    "star_relu": StarReLU,
}
