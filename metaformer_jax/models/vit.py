"""ViT and DeiT: a MetaFormer of one stage whose mixer is attention.

Sources: arXiv 2010.11929; arXiv 2012.12877 and its code
(github.com/facebookresearch/deit, models.py), also for the initial values.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import layers, norms, positions, settings
from metaformer_jax.ops import attention


class Attention(nn.Module):
  """Multi-head self-attention with biases, [B, N, C] -> [B, N, C].

  Tokens that are false in `mask` [B, N] are ignored.
  """

  n_heads: int
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    dim = x.shape[-1]
    if dim % self.n_heads:
      raise ValueError(f"{self.n_heads} heads do not divide {dim} channels")
    qkv = layers.Dense(3 * dim, dtype=self.dtype,
                       kernel_init=layers.trunc_normal_02, name="qkv")(x)
    y = attention.self_attention(qkv, self.n_heads, mask=mask)
    y = layers.Dense(dim, dtype=self.dtype, kernel_init=layers.trunc_normal_02,
                     name="proj")(y)
    return nn.Dropout(self.drop_rate, name="drop")(y, deterministic=not train)


class Block(nn.Module):
  """Y = X + Attention(Norm(X));  Z = Y + MLP(Norm(Y)); [B, N, C]."""

  n_heads: int
  mlp_ratio: float
  norm_eps: float
  drop_rate: float
  drop_path_rate: float
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    norm1, norm2 = (
        norms.LayerNorm(self.norm_eps, dtype=self.dtype, name=name)
        for name in ("norm1", "norm2"))
    attn = functools.partial(
        Attention(self.n_heads, self.drop_rate, dtype=self.dtype, name="attn"),
        mask=mask, train=train)
    mlp = functools.partial(
        layers.Mlp(int(x.shape[-1] * self.mlp_ratio), drop_rate=self.drop_rate,
                   dtype=self.dtype, name="mlp"), train=train)
    drop_path1, drop_path2 = layers.drop_paths(self.drop_path_rate, train)

    x = x + drop_path1(attn(norm1(x)))
    return x + drop_path2(mlp(norm2(x)))


def position_grid(embedding: jax.Array, height: int, width: int) -> jax.Array:
  """[N, C] -> [H, W, C]: the grid that the positions were learned on.

  It is square if N is a square number, else height x width.

  Raises:
    ValueError: N is neither a square number nor height * width.
  """
  n, dim = embedding.shape
  side = math.isqrt(n)
  if side * side == n:
    height = width = side
  elif height * width != n:
    raise ValueError(
        f"a position embedding of {n} patches, not a square number, cannot be "
        f"resized to {height} x {width}; resize the images to its own size")
  return embedding.reshape(height, width, dim)


class VisionTransformer(settings.VisionTransformer, layers.Features,
                        nn.Module):
  """Patches, class token, positions, pre-norm blocks, norm, head.

  `settings.VisionTransformer` declares the hyper-parameters. Images can have
  any size: the position embedding, of the size of the first image, is resized
  as timm does with `dynamic_img_size`. Pixels beyond the last whole patch are
  ignored; timm refuses such images.

  Attributes:
    distilled: adds a distillation token with a head of its own. The logits, or
      without heads the tokens, are the mean of both, in training too.
    dist_head: False omits that head; the output is the class token's alone
      (Hugging Face's DeiTForImageClassification).
    drop_rate: dropout after positions, attention and in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    num_classes: outputs of the head; 0 for the normed class token.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  num_classes: int = 1000
  dtype: DTypeLike | None = None

  def setup(self):
    self.require_structure()
    self.stem = layers.patch_embed(
        self.dim, self.patch_size, dtype=self.dtype,
        kernel_init=layers.torch_conv_kernel,
        bias_init=layers.torch_conv_bias(3 * self.patch_size**2))
    self.drop = nn.Dropout(self.drop_rate, name="drop")
    self.blocks = [
        Block(self.n_heads, self.mlp_ratio, self.norm_eps, self.drop_rate,
              rate, dtype=self.dtype, name=f"block{i}")
        for i, rate in enumerate(
            np.linspace(0, self.drop_path_rate, self.depth).tolist(), 1)]
    self.final_norm = norms.LayerNorm(self.norm_eps, dtype=self.dtype,
                                      name="norm")
    if self.num_classes:
      self.heads = [
          layers.Dense(self.num_classes, dtype=self.dtype,
                       kernel_init=layers.trunc_normal_02, name=name)
          for name in ("head", "head_dist")[:self._n_outputs]]

  @property
  def _n_prefix(self) -> int:
    return 2 if self.distilled else 1

  @property
  def _n_outputs(self) -> int:
    return 2 if self.distilled and self.dist_head else 1

  @nn.compact
  def _embed(self, x, mask):
    """[B, H, W, C] of patches -> [B, prefix + H W, C], in timm's order."""
    b, h, w, dim = x.shape
    prefix = jnp.concatenate([
        self.param(name, layers.trunc_normal_02, (1, 1, dim))
        for name in ("cls_token", "dist_token")[:self._n_prefix]], axis=1)
    shape = ((1, self._n_prefix + h * w, dim) if self.is_initializing()
             else self.get_variable("params", "pos_embed").shape)
    pos_embed = self.param("pos_embed", layers.trunc_normal_02, shape)
    prefix = (prefix + pos_embed[:, :self._n_prefix]).astype(x.dtype)
    grid = position_grid(pos_embed[0, self._n_prefix:], h, w)
    x = x + (positions.resize(grid, h, w)[None] if mask is None
             else positions.resize_to_mask(grid, mask)).astype(x.dtype)
    return jnp.concatenate([
        jnp.broadcast_to(prefix, (b, *prefix.shape[1:])),
        x.reshape(b, h * w, dim)], axis=1)

  def _tokens(self, x, mask, train):
    """Prefix [B, 1 or 2, C], patches [B, H, W, C] and mask, before the norm."""
    layers.check_images(self, x, "patch_embed")
    x = self.stem(layers.apply_mask(x, mask))
    b, h, w, dim = x.shape
    mask = layers.downsample_mask(
        mask, h, w, kernel_size=self.patch_size, stride=self.patch_size,
        padding=0)
    tokens = self.drop(self._embed(x, mask), deterministic=not train)
    valid = mask
    if mask is not None:
      valid = jnp.pad(mask.reshape(b, h * w).astype(bool),
                      ((0, 0), (self._n_prefix, 0)), constant_values=True)
    for block in self.blocks:
      tokens = block(tokens, mask=valid, train=train)
    prefix, patches = jnp.split(tokens, [self._n_prefix], axis=1)
    return prefix, patches.reshape(b, h, w, dim), mask

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the patches after the last block, before the final norm.

    Args:
      x: normalised images [B, H, W, 3].
      mask: [B, H, W], true for pixels of the image, false for padding; None if
        there is no padding. See `layers`.
      train: whether dropout and drop path are on.

    Returns:
      {"stage4": [B, H/patch_size, W/patch_size, dim]}; zero in the padding.
    """
    _, patches, mask = self._tokens(x, mask, train)
    return {"stage4": layers.apply_mask(patches, mask)}

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] for images and mask as in `features`."""
    prefix, _, _ = self._tokens(x, mask, train)
    y = self.final_norm(prefix[:, :self._n_outputs])
    if self.num_classes:
      y = jnp.stack([head(y[:, i]) for i, head in enumerate(self.heads)], 1)
    return y.mean(1)
