"""Images on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec


def one_by_one(fn: Callable[..., jax.Array], images: jax.Array,
               *args: Any) -> jax.Array:
  """Results of `fn` for each image of a batch, one after the other.

  Each device has its own part of a batch that is divided over all axes of a
  mesh.

  Args:
    fn: (image, *args) -> an array. Its branches that are not taken cost
      nothing, unlike under `jax.vmap`.
    images: [B, ...].
    *args: trees of arrays [B, ...].
  """

  def each(*batch):
    return lax.map(lambda one: fn(*one), batch)

  mesh = jax.typeof(images).sharding.mesh
  if mesh.empty:
    return each(images, *args)
  split = PartitionSpec(mesh.axis_names)
  return jax.shard_map(each, mesh=mesh, in_specs=split, out_specs=split)(
      images, *args)


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
