"""The head of RetinaNet (arXiv 1708.02002), as mmdetection's RetinaHead."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import convs
from metaformer_jax.models import layers

# Initial probability of each class at each anchor.
_PRIOR = 0.01


class RetinaNet(nn.Module):
  """Two towers of 3x3 convolutions and ReLU, the same ones for all levels.

  maps, masks -> by level, in float32: logits [B, h w A, num_classes], and the
  boxes relative to the anchors, [B, h w A, 4]; both undefined in the padding.
  Anchors are in the order of `ops.anchors.grid`: rows, columns, then the A
  anchors of a place.

  Attributes:
    n_anchors: A, of each place.
    dim: channels of the towers.
    depth: their convolutions, without the last one, which is in float32.
  """

  num_classes: int
  n_anchors: int = 9
  dim: int = 256
  depth: int = 4
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, maps: Sequence[jax.Array],
               masks: Sequence[jax.Array | None],
               ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    conv = functools.partial(
        convs.conv, kernel_size=3, kernel_init=nn.initializers.normal(0.01))

    def tower(kind: str, n_outputs: int, bias: float):
      hidden = [conv(self.dim, dtype=self.dtype, name=f"{kind}_conv{i}")
                for i in range(1, self.depth + 1)]
      last = conv(self.n_anchors * n_outputs, dtype=jnp.float32,
                  bias_init=nn.initializers.constant(bias), name=f"{kind}_out")

      def apply(x, mask):
        for layer in hidden:
          x = nn.relu(layer(layers.apply_mask(x, mask)))
        x = last(layers.apply_mask(x, mask))
        return x.reshape(len(x), -1, n_outputs)

      return tuple(map(apply, maps, masks))

    prior = -math.log((1 - _PRIOR) / _PRIOR)
    return tower("class", self.num_classes, prior), tower("box", 4, 0)
