"""Token mixers: `mixer(x, *, mask=None, train=False) -> x`, [B, H, W, C].

A mixer is made by a factory that takes `dim` (channels), `dtype` and `name`;
`MIXERS` names the ones of the papers.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from metaformer_jax.models import layers

Dtype = Any
MixerFactory = Callable[..., nn.Module]


class Identity(nn.Module):
  """Mixes nothing: IdentityFormer's mixer (arXiv 2210.13452, eq. 4)."""

  dim: int
  dtype: Dtype | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    del mask, train
    return x


def _window_sum(x: jax.Array, size: int) -> jax.Array:
  """Sums of size x size windows at stride 1, zero outside [B, H, W, C]."""
  return lax.reduce_window(
      x, np.zeros((), x.dtype), lax.add, window_dimensions=(1, size, size, 1),
      window_strides=(1, 1, 1, 1), padding="SAME")


def _window_count(height: int, width: int, size: int) -> np.ndarray:
  """How many pixels of each window lie on the image: [1, H, W, 1]."""

  def along(n):
    i = np.arange(n)
    return np.minimum(i + size // 2, n - 1) - np.maximum(i - size // 2, 0) + 1

  return np.outer(along(height), along(width))[None, :, :, None]


class Pooling(nn.Module):
  """PoolFormer's mixer: average pooling minus its input.

  Mean over the pool_size x pool_size window around each pixel, borders counted
  by their valid pixels (arXiv 2111.11418, eq. 4 and algorithm 1; PyTorch's
  AvgPool2d with count_include_pad=False).
  """

  dim: int
  pool_size: int = 3
  dtype: Dtype | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    del train
    if self.pool_size % 2 == 0:
      raise ValueError(f"pool_size {self.pool_size} is not odd: its window has "
                       "no middle")
    total = _window_sum(layers.apply_mask(x, mask), self.pool_size)
    if mask is None:
      count = jnp.asarray(
          _window_count(x.shape[1], x.shape[2], self.pool_size), x.dtype)
    else:
      # An array of the valid pixels; at least 1, for windows of padding only.
      valid = mask[..., None].astype(x.dtype)
      count = jnp.maximum(_window_sum(valid, self.pool_size), 1)
    return total / count - x


class Attention(nn.Module):
  """Multi-head self-attention over all pixels; memory grows as (H W)^2.

  Heads of 32 channels, no bias on queries, keys and values; softmax in
  float32 (official models/metaformer.py). Padded pixels are never attended to.
  """

  dim: int
  head_dim: int = 32
  proj_bias: bool = True
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    del train
    b, h, w, c = x.shape
    if c % self.head_dim:
      raise ValueError(f"attention over {c} channels: not a multiple of the "
                       f"head dimension, {self.head_dim}")
    n_heads = c // self.head_dim
    qkv = nn.Dense(3 * c, use_bias=False, dtype=self.dtype,
                   kernel_init=layers.trunc_normal_02, name="qkv")(x)
    # The output channels are ordered (q k v, head, channel of the head).
    qkv = qkv.reshape(b, h * w, 3, n_heads, self.head_dim)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    logits = jnp.einsum("bqhd,bkhd->bhqk", q * self.head_dim**-0.5, k,
                        preferred_element_type=jnp.float32)
    if mask is not None:
      valid = mask.reshape(b, 1, 1, h * w).astype(bool)
      logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, h, w, c)
    return nn.Dense(c, use_bias=self.proj_bias, dtype=self.dtype,
                    kernel_init=layers.trunc_normal_02, name="proj")(y)


MIXERS: dict[str, MixerFactory] = {
    "identity": Identity,
    "pooling": Pooling,
    "attention": Attention,
}
