"""The feature pyramid (arXiv 1612.03144), as mmdetection's FPN."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import convs
from metaformer_jax.models import layers
from metaformer_jax.ops import resize


def top_down(maps: Sequence[jax.Array], masks: Sequence[jax.Array | None],
             method: str) -> list[jax.Array]:
  """Adds to each map the one after it, which has got its own, resized."""
  found = [maps[-1]]
  for fine, fine_mask, coarse_mask in zip(
      maps[-2::-1], masks[-2::-1], masks[:0:-1]):
    found.append(fine + resize.by_masks(
        found[-1], coarse_mask, fine.shape[1:3], fine_mask, method=method))
  return found[::-1]


class Pyramid(nn.Module):
  """1x1 convolutions, nearest top-down addition, 3x3 convolutions.

  maps -> maps of `dim` channels. No norm, no activation.
  """

  dim: int = 256
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None]) -> list[jax.Array]:
    laterals = [
        convs.conv(self.dim, 1, dtype=self.dtype, name=f"lateral{i}")(x)
        for i, x in enumerate(maps, 1)]
    return [
        convs.conv(self.dim, 3, dtype=self.dtype, name=f"output{i}")(
            layers.apply_mask(x, mask))
        for i, (x, mask) in enumerate(
            zip(top_down(laterals, masks, "nearest"), masks), 1)]
