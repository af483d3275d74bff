"""Activations with their slopes, as kernels compute them: in float32."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


class Activation(NamedTuple):
  """A function of float32 values, and with it its derivative."""

  value: Callable[[Array], Array]
  value_and_slope: Callable[[Array], tuple[Array, Array]]


def _normal_cdf(z):
  return 0.5 * (1 + lax.erf(z * 0.5**0.5))


def _gelu(z):
  cdf = _normal_cdf(z)
  pdf = jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5
  return z * cdf, cdf + z * pdf


def _relu(z):
  return jnp.maximum(z, 0), (z > 0).astype(z.dtype)


def _squared_relu(z):
  positive = jnp.maximum(z, 0)
  return positive * positive, 2 * positive


# The exact GELU, by erf as in `models.activations`.
ACTIVATIONS = {
    "gelu": Activation(lambda z: z * _normal_cdf(z), _gelu),
    "relu": Activation(lambda z: jnp.maximum(z, 0), _relu),
    "squared_relu": Activation(lambda z: _squared_relu(z)[0], _squared_relu),
}


def apply(name: str, x: Array) -> Array:
  """An activation of x, in the dtype of x; its gradient needs x alone.

  Raises:
    KeyError: there is no such activation.
  """
  return _apply(name, x)


def _value(name, x):
  return ACTIVATIONS[name].value(x.astype(jnp.float32)).astype(x.dtype)


def _fwd(name, x):
  return _value(name, x), x


def _bwd(name, x, dy):
  slope = ACTIVATIONS[name].value_and_slope(x.astype(jnp.float32))[1]
  return ((dy.astype(jnp.float32) * slope).astype(x.dtype),)


_apply = jax.custom_vjp(_value, nondiff_argnums=(0,))
_apply.defvjp(_fwd, _bwd)
