"""Semantic FPN (arXiv 1901.02446), as mmsegmentation's FPNHead."""

from collections.abc import Sequence

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import convs
from metaformer_jax.models import resnet
from metaformer_jax.ops import resize


class Level(nn.Module):
  """Convolutions with BatchNorm and ReLU; each doubles all but the finest map.

  [B, h, w, C] -> [B, H, W, dim], by `n_doublings` bilinear doublings, and
  resizing to the size of the finest map, `to_mask` [B, H, W], if they miss it.
  """

  dim: int
  n_doublings: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, shape: tuple[int, int],
               to_mask=None, train: bool = False):
    last = max(self.n_doublings, 1)
    for i in range(1, last + 1):
      x, _ = resnet.conv_norm(x, mask, self.dim, 3, dtype=self.dtype,
                              train=train, suffix=i)
      x = nn.relu(x)
      if i < last:
        x, mask = resize.enlarge(x, mask)
    if not self.n_doublings:
      return x
    return resize.double_to(x, mask, shape, to_mask)


class SemanticFpn(nn.Module):
  """Levels at the finest size, their sum, and a classifier.

  maps -> float32 logits [B, h, w, num_classes] of the finest map's size.

  Attributes:
    drop_rate: probability that a channel is dropped before the classifier.
  """

  num_classes: int
  dim: int = 128
  drop_rate: float = 0.1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None], *, train: bool = False):
    total = 0
    for i, (x, mask) in enumerate(zip(maps, masks)):
      total += Level(self.dim, i, dtype=self.dtype, name=f"level{i + 1}")(
          x, mask=mask, shape=maps[0].shape[1:3], to_mask=masks[0],
          train=train)
    return convs.Classifier(self.num_classes, self.drop_rate,
                            name="classifier")(total, train=train)
