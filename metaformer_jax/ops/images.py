"""Images on the device."""

import jax
import jax.numpy as jnp


def normalize(image: jax.Array, mean, std) -> jax.Array:
  """uint8 [..., 3] -> float32, with mean 0 and deviation 1 on the data set."""
  shape = (1,) * (image.ndim - 1) + (-1,)
  mean, std = (jnp.reshape(jnp.array(v, jnp.float32), shape)
               for v in (mean, std))
  return (image.astype(jnp.float32) / 255 - mean) / std


def denormalize(image: jax.Array, mean, std) -> jax.Array:
  """The inverse of `normalize`, rounded to uint8 and clipped."""
  shape = (1,) * (image.ndim - 1) + (-1,)
  mean, std = (jnp.reshape(jnp.array(v, jnp.float32), shape)
               for v in (mean, std))
  return jnp.clip(jnp.round(255 * (image * std + mean)), 0, 255).astype(
      jnp.uint8)
