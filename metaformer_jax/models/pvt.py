"""The Pyramid Vision Transformer (arXiv 2102.12122), as in its official code.

Sources: github.com/whai362/PVT, classification/pvt.py; without a class token,
segmentation/pvt.py.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import (
  layers,
  norms,
  parts,
  positions,
  settings,
)
from metaformer_jax.ops import attention


class Attention(nn.Module):
  """Attention to an image that a convolution has reduced: eq. 1 to 3.

  [B, N, dim] -> [B, N, dim]. The last height * width of the N tokens are the
  grid's pixels; if `sr_ratio` is 1, other tokens may come first.

  Attributes:
    n_heads: must divide dim.
    sr_ratio: kernel and stride of the convolution; 1 for none.
    qkv_bias: whether queries, keys and values have a bias.
    norm_eps: epsilon of the norm after the convolution.
    drop_rate: of its output.
  """

  n_heads: int
  sr_ratio: int = 1
  qkv_bias: bool = True
  norm_eps: float = 1e-5
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, grid: tuple[int, int], *, mask=None,
               train: bool = False):
    b, n, dim = x.shape
    r = self.sr_ratio
    if min(grid) < r:
      raise ValueError(f"{grid[0]} x {grid[1]} tokens are too few to reduce by "
                       f"{r}: the images are too small")
    dense = functools.partial(layers.Dense, dtype=self.dtype,
                              kernel_init=layers.trunc_normal_02)
    q = dense(dim, use_bias=self.qkv_bias, name="q")(x)
    y = x
    if r > 1:
      y = x.reshape(b, *grid, dim)
      if mask is not None:
        mask = mask.reshape(b, *grid)
      y = layers.Conv(dim, (r, r), strides=(r, r), padding="VALID",
                      kernel_init=layers.torch_conv_kernel,
                      bias_init=layers.torch_conv_bias(r * r * dim),
                      dtype=self.dtype, name="sr")(layers.apply_mask(y, mask))
      mask = layers.downsample_mask(mask, *y.shape[1:3], kernel_size=r,
                                    stride=r, padding=0)
      y = norms.LayerNorm(self.norm_eps, dtype=self.dtype, name="norm")(y)
    # The output channels are ordered (k v, head, channel of the head).
    kv = dense(2 * dim, use_bias=self.qkv_bias, name="kv")(y)
    kv = kv.reshape(b, -1, 2, self.n_heads, dim // self.n_heads)
    if mask is not None:
      mask = mask.reshape(b, -1).astype(bool)
    y = attention.dot_product_attention(
        q.reshape(b, n, self.n_heads, -1), kv[:, :, 0], kv[:, :, 1], mask=mask)
    if mask is not None:
      # An image on a canvas that is too small to reduce has no keys: zeros.
      y = y * mask.any(1).reshape(b, 1, 1, 1).astype(y.dtype)
    y = dense(dim, name="proj")(y.reshape(b, n, dim))
    return nn.Dropout(self.drop_rate, name="drop")(y, deterministic=not train)


class Block(parts.NormEps, parts.Dropout, nn.Module):
  """Y = X + Attention(Norm(X));  Z = Y + MLP(Norm(Y)); [B, N, dim]."""

  attention: Callable[..., nn.Module]
  mlp_ratio: float
  drop_path_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, grid: tuple[int, int], *, mask=None,
               train: bool = False):
    norm1, norm2 = (
        norms.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)
        for name in ("norm1", "norm2"))
    attn = functools.partial(
        self.attention(drop_rate=self.drop_rate, dtype=self.dtype, name="attn"),
        grid=grid, mask=mask, train=train)
    mlp = functools.partial(
        layers.Mlp(int(self.mlp_ratio * x.shape[-1]), drop_rate=self.drop_rate,
                   dtype=self.dtype, name="mlp"), train=train)
    drop_path1, drop_path2 = layers.drop_paths(self.drop_path_rate, train)

    x = x + drop_path1(attn(norm1(x)))
    return x + drop_path2(mlp(norm2(x)))


def on_grid(embedding: jax.Array, height: int, width: int, mask=None):
  """Position embeddings of a square, bilinearly resized to an image's size.

  [N, C] -> [1, height, width, C]; with a mask [B, height, width], one rectangle
  per image, [B, height, width, C] and zero elsewhere; float32.

  Raises:
    ValueError: N is neither a square number nor the image's number of pixels.
  """
  n, dim = embedding.shape
  side = math.isqrt(n)
  if side * side == n:
    grid = embedding.reshape(side, side, dim)
  elif n == height * width:
    grid = embedding.reshape(height, width, dim)
  else:
    raise ValueError(
        f"position embeddings of {n} patches, not a square number, cannot be "
        f"resized to {height} x {width}: initialise with square images")
  # PyTorch's F.interpolate by default.
  if mask is None:
    return positions.resize(grid, height, width, method="linear",
                            antialias=False)[None]
  return positions.resize_to_mask(grid, mask, method="linear", antialias=False)


class Stage(nn.Module):
  """Patches with their positions, then blocks.

  [B, H, W, C] -> [B, H / patch_size, W / patch_size, dim], sides rounded down,
  its mask, and the class token [B, 1, dim], or [B, 0, dim] without one.

  Attributes:
    class_token: whether a token that is learned comes before the patches.
    spare_position: whether the positions begin with that of a class token, but
      there is none.
  """

  dim: int
  patch_size: int
  blocks: Sequence[Callable[..., nn.Module]]
  class_token: bool = False
  spare_position: bool = False
  norm_eps: float = 1e-5
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, mask = layers.Downsample(
        self.dim, self.patch_size, self.patch_size, 0,
        post_norm=functools.partial(norms.LayerNorm, eps=self.norm_eps),
        dtype=self.dtype, name="patch_embed")(x, mask=mask, train=train)
    b, h, w, dim = x.shape
    # Index of the first patch's position.
    first = int(self.class_token or self.spare_position)
    shape = ((1, first + h * w, dim) if self.is_initializing()
             else self.get_variable("params", "pos_embed").shape)
    embedding = self.param("pos_embed", layers.trunc_normal_02, shape)
    x = x + on_grid(embedding[0, first:], h, w, mask).astype(x.dtype)
    x = x.reshape(b, h * w, dim)
    valid = None if mask is None else mask.reshape(b, h * w).astype(bool)
    if self.class_token:
      token = self.param("cls_token", layers.trunc_normal_02, (1, 1, dim))
      token = (token + embedding[:, :1]).astype(x.dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (b, 1, dim)), x], 1)
      if valid is not None:
        valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
    x = nn.Dropout(self.drop_rate, name="pos_drop")(
        x, deterministic=not train)
    for i, block in enumerate(self.blocks, 1):
      x = block(name=f"block{i}")(x, (h, w), mask=valid, train=train)
    token, x = jnp.split(x, [int(self.class_token)], 1)
    return x.reshape(b, h, w, dim), mask, token


class PyramidVisionTransformer(settings.PyramidVisionTransformer,
                               layers.Features, nn.Module):
  """Stages of transformer blocks, each on fewer tokens; a class token's head.

  `settings.PyramidVisionTransformer` declares the hyper-parameters.

  Attributes:
    sr_ratios: how much each stage reduces keys and values; 1 in the last, which
      has the class token.
    patch_size: of the first stage; it is 2 in the others.
    class_token: whether the last stage has one, which the head sees. False is
      the backbone of dense tasks: the position of the token stays as a
      parameter that nothing uses, so that the weights are those of the official
      code. A head sees the mean over the pixels.
    norm_eps: of the blocks' norms and the last; the others have
      `embed_norm_eps` (Hugging Face has one epsilon for all).
    drop_rate: dropout of the tokens with their positions, in the attention's
      output and in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    num_classes: outputs of the head; 0 for what the head would see.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  num_classes: int = 1000
  dtype: DTypeLike | None = None

  def setup(self):
    self.require_structure()
    rates = layers.drop_path_rates(self.drop_path_rate, self.depths)
    self.stages = [self._stage(i, rates[i]) for i in range(len(self.depths))]
    self.final_norm = norms.LayerNorm(self.norm_eps, dtype=self.dtype,
                                      name="norm")
    if self.num_classes:
      self.classifier = layers.Dense(self.num_classes, dtype=self.dtype,
                                     kernel_init=layers.trunc_normal_02,
                                     name="head")

  def _stage(self, i: int, drop_path_rates: Sequence[float]) -> Stage:
    last = i + 1 == len(self.depths)
    attention = functools.partial(
        Attention, self.n_heads[i], self.sr_ratios[i], self.qkv_bias,
        self.embed_norm_eps)
    return Stage(
        self.dims[i], patch_size=2 if i else self.patch_size,
        blocks=[
            functools.partial(
                Block, attention, self.mlp_ratios[i], rate, dtype=self.dtype,
                norm_eps=self.norm_eps, drop_rate=self.drop_rate)
            for rate in drop_path_rates],
        class_token=last and self.class_token,
        spare_position=last and not self.class_token,
        norm_eps=self.embed_norm_eps, drop_rate=self.drop_rate,
        dtype=self.dtype, name=f"stage{i + 1}")

  def _stages(self, x, mask, train) -> Iterator[tuple[jax.Array, Any, Any]]:
    layers.check_images(self, x, "stage1", "patch_embed", "conv")
    for stage in self.stages:
      x, mask, token = stage(x, mask=mask, train=train)
      yield x, mask, token

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the stages' outputs, before the norm, without the class token.

    Args:
      x: normalised images [B, H, W, 3], of at least 32 x 32 for the published
        sizes.
      mask: [B, H, W], true for pixels of the image, false for padding; None if
        there is no padding. See `layers`.
      train: whether dropout and drop path are on.

    Returns:
      {"stage1": [B, H/4, W/4, dims[0]], ..., "stage4": [B, H/32, W/32, ...]},
      sides rounded down; zero in the padding.
    """
    return {
        f"stage{i}": layers.apply_mask(y, m)
        for i, (y, m, _) in enumerate(self._stages(x, mask, train), 1)}

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] for images and mask as in `features`."""
    *_, (x, mask, token) = self._stages(x, mask, train)
    if self.class_token:
      x = self.final_norm(token[:, 0])
    else:
      x = layers.global_average_pool(self.final_norm(x), mask)
    return self.classifier(x) if self.num_classes else x
