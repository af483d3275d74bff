"""Position embeddings on a grid, resized to the image at hand."""


import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


def resize(grid: jax.Array, height: int, width: int, *, method: str = "cubic",
           antialias: bool = True) -> jax.Array:
  """[H, W, C] -> [height, width, C], in float32.

  The defaults are timm's for vision transformers; method="linear" without
  antialias is PyTorch's bilinear F.interpolate.
  """
  if grid.shape[:2] == (height, width):
    return grid
  return jax.image.resize(grid.astype(jnp.float32),
                          (height, width, grid.shape[-1]), method, antialias)


def resize_to_mask(grid: jax.Array, mask: jax.Array, *, method: str = "cubic",
                   antialias: bool = True) -> jax.Array:
  """Resizes the grid to the valid part of each image's canvas.

  [H, W, C] and a mask [B, height, width], one rectangle per image, give
  [B, height, width, C]: the result of `resize` for the image alone, at its
  place, and zero elsewhere.
  """
  height, width = mask.shape[1:]

  def place(mask):
    sides, starts = [], []
    for axis in (1, 0):
      line = mask.any(axis)
      sides.append(line.sum())
      starts.append(line.argmax())
    scale = (jnp.maximum(jnp.stack(sides), 1)
             / jnp.array(grid.shape[:2], jnp.float32))
    return jax.image.scale_and_translate(
        grid.astype(jnp.float32), (height, width, grid.shape[-1]), (0, 1),
        scale, jnp.stack(starts).astype(jnp.float32), method,
        antialias=antialias)

  return jax.vmap(place)(mask.astype(bool)) * mask[..., None].astype(
      jnp.float32)


class PositionEmbedding(nn.Module):
  """Adds a learned [H, W, C] to x; H and W are those of the first x.

  For other sizes it is resized; with a mask, to the valid part of the canvas.
  """

  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None):
    shape = (x.shape[1:] if self.is_initializing()
             else self.get_variable("params", "embedding").shape)
    grid = self.param("embedding", nn.initializers.zeros, shape)
    if mask is None:
      added = resize(grid, *x.shape[1:3])[None]
    else:
      added = resize_to_mask(grid, mask)
    # Cast last, so that the gradients are summed over the batch in float32.
    return x + jnp.broadcast_to(added, x.shape).astype(
        self.dtype or jnp.float32)
