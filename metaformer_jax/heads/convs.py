"""What decoders consist of: mmcv's ConvModule, and the classifier."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import layers, resnet


class ConvNormRelu(nn.Module):
  """Convolution without bias, BatchNorm, ReLU: [B, H, W, C] -> [B, H, W, dim].

  Initialised as mmcv's ConvModule: Kaiming normal, fan out.
  """

  dim: int
  kernel_size: int = 3
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, _ = resnet.conv_norm(x, mask, self.dim, self.kernel_size,
                            dtype=self.dtype, train=train)
    return nn.relu(x)


class Classifier(nn.Module):
  """Drops whole channels, then a linear layer for each pixel; in float32.

  [B, H, W, C] -> [B, H, W, num_classes]; mmsegmentation's `cls_seg`, with its
  initial values: normal(0.01) and zeros.
  """

  num_classes: int
  drop_rate: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    x = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2), name="drop")(
        x, deterministic=not train)
    return layers.Dense(
        self.num_classes, kernel_init=nn.initializers.normal(0.01),
        dtype=jnp.float32, name="conv")(x)


def conv(dim: int, kernel_size: int, stride: int = 1, *,
         dtype: DTypeLike | None, name: str,
         kernel_init: nn.initializers.Initializer | None = None,
         bias_init: nn.initializers.Initializer = nn.initializers.zeros,
         ) -> nn.Conv:
  """A convolution padded by half its kernel, with a bias; Xavier uniform."""
  k, s, p = kernel_size, stride, kernel_size // 2
  return layers.Conv(
      dim, (k, k), strides=(s, s), padding=((p, p), (p, p)),
      kernel_init=kernel_init or nn.initializers.xavier_uniform(),
      bias_init=bias_init, dtype=dtype, name=name)
