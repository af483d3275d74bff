"""The Pyramid Vision Transformer (arXiv 2102.12122), as in its official code.

Source: github.com/whai362/PVT, classification/pvt.py.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax.models import layers, mixers, norms, positions

Dtype = Any


class Attention(nn.Module):
  """Attention to an image that a convolution has reduced: eq. 1 to 3.

  [B, N, dim] alike in and out. The last height times width of the N tokens are
  the grid's pixels; where `sr_ratio` is 1, others may come first.

  Attributes:
    n_heads: which divides dim.
    sr_ratio: kernel and stride of the convolution; 1 for none.
    qkv_bias: whether queries, keys and values have a bias.
    drop_rate: of its output.
  """

  n_heads: int
  sr_ratio: int = 1
  qkv_bias: bool = True
  drop_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, grid: tuple[int, int], *, mask=None,
               train: bool = False):
    b, n, dim = x.shape
    r = self.sr_ratio
    if min(grid) < r:
      raise ValueError(f"{grid[0]} x {grid[1]} tokens are too few to reduce by "
                       f"{r}: the images are too small")
    dense = functools.partial(nn.Dense, dtype=self.dtype,
                              kernel_init=layers.trunc_normal_02)
    q = dense(dim, use_bias=self.qkv_bias, name="q")(x)
    y = x
    if r > 1:
      y = x.reshape(b, *grid, dim)
      if mask is not None:
        mask = mask.reshape(b, *grid)
      y = nn.Conv(dim, (r, r), strides=(r, r), padding="VALID",
                  kernel_init=layers.torch_conv_kernel,
                  bias_init=layers.torch_conv_bias(r * r * dim),
                  dtype=self.dtype, name="sr")(layers.apply_mask(y, mask))
      mask = layers.downsample_mask(mask, *y.shape[1:3], kernel_size=r,
                                    stride=r, padding=0)
      y = norms.LayerNorm(dtype=self.dtype, name="norm")(y)
    # The output channels are ordered (k v, head, channel of the head).
    kv = dense(2 * dim, use_bias=self.qkv_bias, name="kv")(y)
    kv = kv.reshape(b, -1, 2, self.n_heads, dim // self.n_heads)
    if mask is not None:
      mask = mask.reshape(b, -1).astype(bool)
    y = mixers.dot_product_attention(
        q.reshape(b, n, self.n_heads, -1), kv[:, :, 0], kv[:, :, 1], mask=mask)
    if mask is not None:
      # On a canvas, an image too small to reduce has no keys: it gets nothing.
      y = y * mask.any(1).reshape(b, 1, 1, 1).astype(y.dtype)
    y = dense(dim, name="proj")(y.reshape(b, n, dim))
    return nn.Dropout(self.drop_rate, name="drop")(y, deterministic=not train)


class Block(nn.Module):
  """Y = X + Attention(Norm(X));  Z = Y + MLP(Norm(Y)): [B, N, dim]."""

  attention: Callable[..., nn.Module]
  mlp_ratio: float = 4.0
  norm_eps: float = 1e-6
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, grid: tuple[int, int], *, mask=None,
               train: bool = False):
    def norm(i):
      return norms.LayerNorm(self.norm_eps, dtype=self.dtype, name=f"norm{i}")

    def drop_path(i):
      return layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")

    attention = self.attention(drop_rate=self.drop_rate, dtype=self.dtype,
                               name="attn")
    x = x + drop_path(1)(attention(norm(1)(x), grid, mask=mask, train=train),
                         train=train)
    mlp = layers.Mlp(int(self.mlp_ratio * x.shape[-1]),
                     drop_rate=self.drop_rate, dtype=self.dtype, name="mlp")
    return x + drop_path(2)(mlp(norm(2)(x), train=train), train=train)


def on_grid(embedding: jax.Array, height: int, width: int, mask=None):
  """Embeddings of a square's pixels, bilinearly resized to an image's.

  [N, C] -> [1, height, width, C], or with a mask [B, height, width] of one
  rectangle an image [B, height, width, C], zero elsewhere; float32.

  Raises:
    ValueError: N is neither a square nor the image's number of pixels.
  """
  n, dim = embedding.shape
  side = math.isqrt(n)
  if side * side == n:
    grid = embedding.reshape(side, side, dim)
  elif n == height * width:
    grid = embedding.reshape(height, width, dim)
  else:
    raise ValueError(
        f"position embeddings of {n} patches, which is no square, cannot be "
        f"resized to {height} x {width}: initialise with square images")
  # As PyTorch's F.interpolate by default.
  if mask is None:
    return positions.resize(grid, height, width, method="linear",
                            antialias=False)[None]
  return positions.resize_to_mask(grid, mask, method="linear", antialias=False)


class Stage(nn.Module):
  """Patches with their positions, then blocks.

  [B, H, W, C] -> [B, H / patch_size, W / patch_size, dim], sides rounded down,
  with its mask and the class token [B, 1, dim], [B, 0, dim] where none is.
  """

  dim: int
  patch_size: int
  blocks: Sequence[Callable[..., nn.Module]]
  class_token: bool = False
  drop_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, mask = layers.Downsample(
        self.dim, self.patch_size, self.patch_size, 0,
        post_norm=norms.LayerNorm, dtype=self.dtype, name="patch_embed")(
            x, mask=mask, train=train)
    b, h, w, dim = x.shape
    first = int(self.class_token)  # Index of the first patch.
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
    return x[:, first:].reshape(b, h, w, dim), mask, x[:, :first]


class PyramidVisionTransformer(nn.Module):
  """Stages of transformer blocks on ever fewer tokens; a class token's head.

  Attributes:
    depths, dims, n_heads, mlp_ratios: of each stage.
    sr_ratios: of each stage, by how much keys and values are reduced; 1 in the
      last, which has the class token.
    patch_size: of the first stage; it is 2 in the others.
    qkv_bias: whether queries, keys and values have a bias.
    norm_eps: of the blocks' norms and the last; the others have 1e-5.
    num_classes: outputs of the head; 0 for the normed class token.
    drop_rate: dropout of the tokens with their positions, in the attention's
      output and in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  depths: Sequence[int]
  dims: Sequence[int]
  n_heads: Sequence[int]
  mlp_ratios: Sequence[float]
  sr_ratios: Sequence[int]
  patch_size: int = 4
  qkv_bias: bool = True
  norm_eps: float = 1e-6
  num_classes: int = 1000
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  def setup(self):
    self._check()
    n_blocks, n_stages = sum(self.depths), len(self.depths)
    stages = []
    first = 0  # Number of blocks before the stage.
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims)):
      block = functools.partial(
          Block, functools.partial(
              Attention, self.n_heads[i], self.sr_ratios[i], self.qkv_bias),
          self.mlp_ratios[i], self.norm_eps, self.drop_rate, dtype=self.dtype)
      stages.append(Stage(
          dim, patch_size=2 if i else self.patch_size,
          blocks=[
              functools.partial(block, drop_path_rate=self.drop_path_rate
                                * (first + j) / max(n_blocks - 1, 1))
              for j in range(depth)],
          class_token=i + 1 == n_stages, drop_rate=self.drop_rate,
          dtype=self.dtype, name=f"stage{i + 1}"))
      first += depth
    self.stages = stages
    self.final_norm = norms.LayerNorm(self.norm_eps, dtype=self.dtype,
                                      name="norm")
    if self.num_classes:
      self.classifier = nn.Dense(self.num_classes, dtype=self.dtype,
                                 kernel_init=layers.trunc_normal_02,
                                 name="head")

  def _check(self):
    of_stages = (self.depths, self.dims, self.n_heads, self.mlp_ratios,
                 self.sr_ratios)
    if len({len(values) for values in of_stages}) != 1:
      raise ValueError("depths, dims, n_heads, mlp_ratios and sr_ratios must "
                       f"name the same stages, got {of_stages}")
    if self.sr_ratios[-1] != 1:
      raise ValueError("sr_ratios must end with 1, got "
                       f"{self.sr_ratios}: a class token is on no grid")

  def _stages(self, x, mask, train) -> Iterator[tuple[jax.Array, Any, Any]]:
    for stage in self.stages:
      x, mask, token = stage(x, mask=mask, train=train)
      yield x, mask, token

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the stages' outputs, before the norm, without the class token.

    Args:
      x: normalised images [B, H, W, 3], of at least 32 x 32 for the published
        sizes.
      mask: [B, H, W], true where a pixel is image and not padding; None where
        all are. See `layers`.
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
    *_, (_, _, token) = self._stages(x, mask, train)
    x = self.final_norm(token[:, 0])
    return self.classifier(x) if self.num_classes else x
