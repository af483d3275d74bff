"""The feature pyramid (arXiv 1612.03144), as mmdetection's FPN."""

import functools
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

  maps, masks -> maps of `dim` channels and their masks. No norm, no activation.

  Attributes:
    n_extra: levels that follow, each half as large (arXiv 1708.02002, without
      its ReLU): a 3x3 convolution with stride 2 of the last of `maps`, then of
      the extra level before (mmdetection's add_extra_convs="on_input").
  """

  dim: int = 256
  n_extra: int = 0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None],
               ) -> tuple[list[jax.Array], list[jax.Array | None]]:
    conv = functools.partial(convs.conv, self.dim, dtype=self.dtype)
    laterals = [conv(1, name=f"lateral{i}")(x) for i, x in enumerate(maps, 1)]
    outputs = [
        conv(3, name=f"output{i}")(layers.apply_mask(x, mask))
        for i, (x, mask) in enumerate(
            zip(top_down(laterals, masks, "nearest"), masks), 1)]
    x, masks = maps[-1], list(masks)
    for i in range(1, self.n_extra + 1):
      x = conv(3, stride=2, name=f"extra{i}")(layers.apply_mask(x, masks[-1]))
      masks.append(layers.downsample_mask(
          masks[-1], *x.shape[1:3], kernel_size=3, stride=2, padding=1))
      outputs.append(x)
    return outputs, masks
