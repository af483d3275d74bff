"""ResNet (arXiv 1512.03385), the "v1.5" of torchvision and timm.

A strided bottleneck has its stride in the 3x3 convolution, not in the first
1x1. Initial weights are those of timm's resnet.py, with which the weights of
arXiv 2110.00476, "ResNet strikes back", were trained.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import layers, norms, settings, windows
from metaformer_jax.ops import pooling

kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

# With this as the last norm, a block is initialised to its shortcut.
ZeroBatchNorm = functools.partial(norms.BatchNorm,
                                  scale_init=nn.initializers.zeros)


def conv_norm(x: jax.Array, mask, dim: int, kernel_size: int, stride: int = 1,
              *, norm=norms.BatchNorm, dtype: DTypeLike | None, train: bool,
              suffix: str | int = ""):
  """Convolution, padded by half its kernel, and BatchNorm; with the new mask.

  [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), dim]. Adds "conv" and
  "norm", with the suffix, to the module that calls it.
  """
  k, s, p = kernel_size, stride, kernel_size // 2
  x = layers.Conv(dim, (k, k), strides=(s, s), padding=((p, p), (p, p)),
                  use_bias=False, kernel_init=kaiming_fan_out, dtype=dtype,
                  name=f"conv{suffix}")(layers.apply_mask(x, mask))
  mask = layers.downsample_mask(mask, *x.shape[1:3], kernel_size=k, stride=s,
                                padding=p)
  x = norm(dtype=dtype, name=f"norm{suffix}")(x, mask=mask, train=train)
  return x, mask


def max_pool(x: jax.Array, mask):
  """Maxima of 3x3 windows at stride 2, without the padding; and the mask.

  [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C], zero in the padding.
  """
  if mask is not None:
    x = jnp.where(mask[..., None].astype(bool), x, -jnp.inf)
  x = pooling.max_pool(x, 3, stride=2, padding=1)
  mask = layers.downsample_mask(mask, *x.shape[1:3], kernel_size=3, stride=2,
                                padding=1)
  if mask is not None:  # Not a product: 0 * infinity is NaN.
    x = jnp.where(mask[..., None].astype(bool), x, 0)
  return x, mask


class Stem(nn.Module):
  """Convolutions, then max pooling: [B, H, W, 3] -> stride 4, mask.

  Attributes:
    dim: channels of the last convolution.
    kind: a name in `windows.RESNET_STEMS`.
  """

  dim: int
  kind: str = "7x7"
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    stem = layers.lookup(windows.RESNET_STEMS, "stem", self.kind)
    for i, (window, width) in enumerate(zip(stem.convs, stem.widths), 1):
      x, mask = conv_norm(
          x, mask, int(width * self.dim), window.kernel_size, window.stride,
          dtype=self.dtype, train=train, suffix=i if stem.convs[1:] else "")
      x = nn.relu(x)
    return max_pool(x, mask)


class Projection(nn.Module):
  """The shortcut where the stride or the channels change."""

  dim: int
  stride: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return conv_norm(x, mask, self.dim, 1, self.stride, dtype=self.dtype,
                     train=train)[0]


class Block(nn.Module):
  """relu(Shortcut(X) + Norm(Conv(... relu(Norm(Conv(X)))))), and its mask.

  [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C']; C' is `width`, or
  four times that for a bottleneck.

  Attributes:
    kind: a name in `settings.RESNET_BLOCKS`.
    width: channels of its 3x3 convolutions.
    drop_path_rate: probability of dropping all but the shortcut.
  """

  kind: str
  width: int
  stride: int = 1
  drop_path_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    kernel_sizes, widths, strided = layers.lookup(
        settings.RESNET_BLOCKS, "block", self.kind)
    y, y_mask = x, mask
    for i, (kernel_size, width) in enumerate(zip(kernel_sizes, widths), 1):
      last = i == len(widths)
      y, y_mask = conv_norm(
          y, y_mask, width * self.width, kernel_size,
          self.stride if i == strided else 1, dtype=self.dtype, train=train,
          norm=ZeroBatchNorm if last else norms.BatchNorm, suffix=i)
      if not last:
        y = nn.relu(y)
    y = layers.DropPath(self.drop_path_rate, name="drop_path")(y, train=train)
    if self.stride != 1 or x.shape[-1] != y.shape[-1]:
      x = Projection(y.shape[-1], self.stride, dtype=self.dtype,
                     name="downsample")(x, mask=mask, train=train)
    return nn.relu(x + y), y_mask


class Stage(nn.Module):
  """Blocks in turn, each with the mask of the one before."""

  blocks: Sequence[Callable[..., nn.Module]]

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    for i, block in enumerate(self.blocks, 1):
      x, mask = block(name=f"block{i}")(x, mask=mask, train=train)
    return x, mask


class ResNet(settings.ResNet, layers.Features, nn.Module):
  """A stem, stages of residual blocks, mean over the pixels, a linear head.

  `settings.ResNet` declares the hyper-parameters.

  Attributes:
    drop_rate: dropout before the head.
    drop_path_rate: of the last block; linear from 0 at the first.
    num_classes: outputs of the head; 0 for the pooled features.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  num_classes: int = 1000
  dtype: DTypeLike | None = None

  def setup(self):
    self.require_structure()
    _, (*_, expansion), _ = layers.lookup(
        settings.RESNET_BLOCKS, "block", self.block)
    self.entry = Stem(self.widths[0], self.stem, dtype=self.dtype, name="stem")
    rates = layers.drop_path_rates(self.drop_path_rate, self.depths)
    self.stages = [self._stage(i, rates[i]) for i in range(len(self.depths))]
    self.dropout = nn.Dropout(self.drop_rate, name="drop")
    if self.num_classes:
      fan_in = self.widths[-1] * expansion
      self.classifier = layers.Dense(
          self.num_classes, kernel_init=layers.torch_conv_kernel,
          bias_init=layers.torch_conv_bias(fan_in), dtype=self.dtype,
          name="head")

  def _stage(self, i: int, drop_path_rates: Sequence[float]) -> Stage:
    return Stage([
        functools.partial(
            Block, self.block, self.widths[i], stride=2 if i and not j else 1,
            drop_path_rate=rate, dtype=self.dtype)
        for j, rate in enumerate(drop_path_rates)], name=f"stage{i + 1}")

  def _stages(self, x, mask, train) -> Iterator[tuple[jax.Array, Any]]:
    layers.check_images(self, x, "stem",
                        "conv" if self.stem == "7x7" else "conv1")
    x, mask = self.entry(x, mask=mask, train=train)
    for stage in self.stages:
      x, mask = stage(x, mask=mask, train=train)
      yield x, mask

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the stages' outputs.

    Args:
      x: normalised images [B, H, W, 3].
      mask: [B, H, W], true for pixels of the image, false for padding; None if
        there is no padding. See `layers`.
      train: whether dropout and drop path are on, and BatchNorm uses the
        batch's statistics; "batch_stats" must then be mutable.

    Returns:
      {"stage1": [B, H/4, W/4, C1], ..., "stage4": [B, H/32, W/32, C4]}, sides
      rounded up; zero in the padding.
    """
    return {
        f"stage{i}": layers.apply_mask(y, m)
        for i, (y, m) in enumerate(self._stages(x, mask, train), 1)}

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] for images and mask as in `features`."""
    for y, m in self._stages(x, mask, train):
      x, mask = y, m
    x = layers.global_average_pool(x, mask)
    if not self.num_classes:
      return x
    return self.classifier(self.dropout(x, deterministic=not train))
