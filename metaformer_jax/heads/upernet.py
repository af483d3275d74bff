"""UPerNet (arXiv 1807.10221), as mmsegmentation's UPerHead, and its FCNHead."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import convs, fpn
from metaformer_jax.ops import resize


class PyramidPooling(nn.Module):
  """Means over grids of several sizes, and a convolution (arXiv 1612.01105).

  [B, h, w, C] -> [B, h, w, dim].

  Attributes:
    pool_sizes: sides of the grids.
  """

  dim: int
  pool_sizes: Sequence[int] = (1, 2, 3, 6)
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    sizes = None if mask is None else resize.sizes(mask)
    found = [x]
    for i, side in enumerate(self.pool_sizes, 1):
      y = resize.adaptive_average_pool(x, side, sizes)
      # The grid of an image is full; that of no image is padding.
      full = None if mask is None else jnp.broadcast_to(
          mask.any((1, 2), keepdims=True), y.shape[:3])
      y = convs.ConvNormRelu(self.dim, 1, dtype=self.dtype, name=f"pool{i}")(
          y, mask=full, train=train)
      found.append(resize.by_masks(y, full, x.shape[1:3], mask))
    return convs.ConvNormRelu(self.dim, dtype=self.dtype, name="bottleneck")(
        jnp.concatenate(found, -1), mask=mask, train=train)


class UPerNet(nn.Module):
  """Pyramid pooling of the coarsest map, a pyramid, and their fusion.

  maps -> float32 logits [B, h, w, num_classes] of the finest map's size.

  Attributes:
    drop_rate: probability that a channel is dropped before the classifier.
  """

  num_classes: int
  dim: int = 512
  pool_sizes: Sequence[int] = (1, 2, 3, 6)
  drop_rate: float = 0.1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None], *, train: bool = False):

    def conv(kernel_size, name, x, mask):
      return convs.ConvNormRelu(self.dim, kernel_size, dtype=self.dtype,
                                name=name)(x, mask=mask, train=train)

    laterals = [
        *(conv(1, f"lateral{i}", x, mask)
          for i, (x, mask) in enumerate(zip(maps[:-1], masks), 1)),
        PyramidPooling(self.dim, self.pool_sizes, dtype=self.dtype,
                       name="pyramid_pooling")(
            maps[-1], mask=masks[-1], train=train)]
    *fine, coarsest = fpn.top_down(laterals, masks, "bilinear")
    outputs = [
        *(conv(3, f"output{i}", x, mask)
          for i, (x, mask) in enumerate(zip(fine, masks), 1)),
        coarsest]
    fused = conv(3, "fusion", jnp.concatenate([
        resize.by_masks(x, mask, maps[0].shape[1:3], masks[0])
        for x, mask in zip(outputs, masks)], -1), masks[0])
    return convs.Classifier(self.num_classes, self.drop_rate,
                            name="classifier")(fused, train=train)


class Fcn(nn.Module):
  """One 3x3 convolution and a classifier: [B, h, w, C] -> float32 logits.

  The auxiliary head of UPerNet, on the backbone's last output but one.
  """

  num_classes: int
  dim: int = 256
  drop_rate: float = 0.1
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x = convs.ConvNormRelu(self.dim, dtype=self.dtype, name="conv1")(
        x, mask=mask, train=train)
    return convs.Classifier(self.num_classes, self.drop_rate,
                            name="classifier")(x, train=train)
