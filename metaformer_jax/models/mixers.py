"""Token mixers: `mixer(x, *, mask=None, train=False) -> x`, [B, H, W, C].

A mixer is made by a factory that takes `dim` (channels), `dtype` and `name`;
`MIXERS` names the ones of the papers. `RandomMixing` and `SpatialFc` have a
matrix over all pixels: they work at the size of their first image only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax

from metaformer_jax.models import activations, layers

Dtype = Any
MixerFactory = Callable[..., nn.Module]


class Identity(nn.Module):
  """Mixes nothing: IdentityFormer's mixer (arXiv 2210.13452, eq. 4)."""

  dim: int
  dtype: Dtype | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return x


def _check_odd(name: str, size: int) -> None:
  if size % 2 == 0:
    raise ValueError(f"{name} {size} is not odd: its window has no middle")


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
  AvgPool2d with count_include_pad=False). `subtract_input=False` is the
  ablation that leaves the input in.
  """

  dim: int
  pool_size: int = 3
  subtract_input: bool = True
  dtype: Dtype | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    _check_odd("pool_size", self.pool_size)
    total = _window_sum(layers.apply_mask(x, mask), self.pool_size)
    if mask is None:
      count = jnp.asarray(
          _window_count(x.shape[1], x.shape[2], self.pool_size), x.dtype)
    else:
      # An array of the valid pixels; at least 1, for windows of padding only.
      valid = mask[..., None].astype(x.dtype)
      count = jnp.maximum(_window_sum(valid, self.pool_size), 1)
    mean = total / count
    return mean - x if self.subtract_input else mean


def depthwise_conv(dim: int, kernel_size: int, *, use_bias: bool,
                   conv_init: str, dtype, name) -> nn.Conv:
  """A convolution of each channel by itself, same size out."""
  k = kernel_size
  _check_odd("conv_kernel_size", k)
  kernel_init, bias_init = layers.conv_inits(conv_init, k * k)
  return nn.Conv(dim, (k, k), padding=((k // 2, k // 2),) * 2,
                 feature_group_count=dim, use_bias=use_bias, dtype=dtype,
                 kernel_init=kernel_init, bias_init=bias_init, name=name)


class DepthwiseConv(nn.Module):
  """A depthwise convolution: the ablation of arXiv 2111.11418, table 5.

  Its kernel of 3 is the authors' advice (sail-sg/poolformer, issue 18).
  """

  dim: int
  kernel_size: int = 3
  conv_init: str = "torch"
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return depthwise_conv(self.dim, self.kernel_size, use_bias=True,
                          conv_init=self.conv_init, dtype=self.dtype,
                          name="conv")(layers.apply_mask(x, mask))


class SepConv(nn.Module):
  """Inverted separable convolution: ConvFormer's mixer (arXiv 2210.13452).

  Dense to `expansion` times the channels, activation, depthwise convolution,
  Dense back; no biases (eq. 8; arXiv 1801.04381).
  """

  dim: int
  expansion: float = 2.0
  kernel_size: int = 7
  activation: Callable[..., nn.Module] = activations.StarReLU
  conv_init: str = "trunc_normal"
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    hidden = int(self.expansion * self.dim)
    x = nn.Dense(hidden, use_bias=False, dtype=self.dtype,
                 kernel_init=layers.trunc_normal_02, name="pwconv1")(x)
    x = layers.apply_mask(self.activation(name="act1")(x), mask)
    x = depthwise_conv(hidden, self.kernel_size, use_bias=False,
                       conv_init=self.conv_init, dtype=self.dtype,
                       name="dwconv")(x)
    return nn.Dense(self.dim, use_bias=False, dtype=self.dtype,
                    kernel_init=layers.trunc_normal_02, name="pwconv2")(x)


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, *,
                          mask: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v, the softmax in float32.

  Args:
    q: [B, queries, heads, D].
    k, v: [B, keys, heads, D].
    mask: [B, keys], false for keys that no query attends to.
  """
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k,
                      preferred_element_type=jnp.float32)
  if mask is not None:
    valid = mask[:, None, None, :].astype(bool)
    logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
  """Multi-head self-attention over all pixels; memory grows as (H W)^2.

  Heads of `head_dim` channels, at least one; no bias on queries, keys and
  values (official code of both papers). Padded pixels are never attended to.
  """

  dim: int
  head_dim: int = 32
  proj_bias: bool = True
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    b, h, w, _ = x.shape
    n_heads = max(self.dim // self.head_dim, 1)
    qkv = nn.Dense(3 * n_heads * self.head_dim, use_bias=False,
                   dtype=self.dtype, kernel_init=layers.trunc_normal_02,
                   name="qkv")(x)
    # The output channels are ordered (q k v, head, channel of the head).
    qkv = qkv.reshape(b, h * w, 3, n_heads, self.head_dim)
    y = dot_product_attention(
        qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2],
        mask=None if mask is None else mask.reshape(b, h * w))
    return nn.Dense(self.dim, use_bias=self.proj_bias, dtype=self.dtype,
                    kernel_init=layers.trunc_normal_02, name="proj")(
                        y.reshape(b, h, w, -1))


def _mix_pixels(matrix: jax.Array, x: jax.Array, mask) -> jax.Array:
  """y[m] = sum over n of matrix[m, n] x[n], over the pixels of x."""
  b, h, w, c = x.shape
  n = matrix.shape[1]
  if n != h * w:
    raise ValueError(
        f"a mixing matrix over {n} pixels meets {h} x {w}; it is tied to the "
        "image size that it was made for: resize the images to that")
  if mask is not None:
    raise ValueError("a mixing matrix over all pixels cannot leave out padding;"
                     " give images of the model's own size and no mask")
  y = jnp.einsum("mn,bnc->bmc", matrix.astype(x.dtype), x.reshape(b, n, c))
  return y.reshape(x.shape)


class RandomMixing(nn.Module):
  """RandFormer's mixer: a frozen random matrix over all pixels.

  softmax over each row of uniform [0, 1) values, drawn at initialisation and
  kept in the collection "frozen" (arXiv 2210.13452, eq. 5, read as W X).
  """

  dim: int
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    n = x.shape[1] * x.shape[2]

    def init():
      return jax.nn.softmax(jax.random.uniform(self.make_rng("params"), (n, n)))

    matrix = self.variable("frozen", "random_matrix", init).value
    return _mix_pixels(matrix, x, mask)


class SpatialFc(nn.Module):
  """One learned matrix over all pixels, the same for every channel, no bias.

  The mixer of the FC stages of arXiv 2111.11418, table 5.
  """

  dim: int
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    n = (x.shape[1] * x.shape[2] if self.is_initializing()
         else self.get_variable("params", "kernel").shape[0])
    # [in, out], as the kernel of a Dense.
    kernel = self.param("kernel", layers.trunc_normal_02, (n, n))
    return _mix_pixels(kernel.T, x, mask)


MIXERS: dict[str, MixerFactory] = {
    "attention": Attention,
    "depthwise_conv": DepthwiseConv,
    "identity": Identity,
    "pooling": Pooling,
    "random": RandomMixing,
    "sepconv": SepConv,
    "spatial_fc": SpatialFc,
}
