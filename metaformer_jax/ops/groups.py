"""Means over groups of images, as the losses of detection have them."""

import jax
import jax.numpy as jnp


def mean(sums: jax.Array, numbers: jax.Array, size: int | None) -> jax.Array:
  """The mean over the groups of a group's sum, divided by its number.

  A number of 0 is taken for 1. mmdetection's groups are the images of a GPU.

  Args:
    sums: float32 [B], of each image.
    numbers: integers [B], of each image.
    size: images of a group, one after the other; it divides B. None: all.

  Returns:
    float32 [].
  """
  sums, numbers = (x.reshape(-1, size or len(x)).sum(1)
                   for x in (sums, numbers))
  return (sums / jnp.maximum(numbers, 1)).mean()
