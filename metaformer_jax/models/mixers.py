"""Token mixers: `mixer(x, *, mask=None, train=False) -> x`, [B, H, W, C].

A factory of mixers takes `dim` (channels), `dtype` and `name`; `MIXERS` has the
papers' ones by name. `RandomMixing` and `SpatialFc` have a matrix over all
pixels: they only work at the image size that they were initialised with.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.kernels import attention as attention_kernel
from metaformer_jax.models import compiling, layers, parts
from metaformer_jax.ops import attention, pooling

MixerFactory = Callable[..., nn.Module]


class Identity(nn.Module):
  """Returns x: IdentityFormer's mixer (arXiv 2210.13452, eq. 4)."""

  dim: int
  dtype: DTypeLike | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return x


def _check_odd(name: str, size: int) -> None:
  if size % 2 == 0:
    raise ValueError(f"{name} {size} is not odd: its window has no centre")


def _window_count(height: int, width: int, size: int) -> np.ndarray:
  """Number of pixels of each window inside the image: [1, H, W, 1]."""

  def along(n):
    i = np.arange(n)
    return np.minimum(i + size // 2, n - 1) - np.maximum(i - size // 2, 0) + 1

  return np.outer(along(height), along(width))[None, :, :, None]


class Pooling(parts.Pooling, nn.Module):
  """PoolFormer's mixer: average pooling minus its input.

  Mean over the pool_size x pool_size window around each pixel, borders counted
  by their valid pixels (arXiv 2111.11418, eq. 4 and algorithm 1; PyTorch's
  AvgPool2d with count_include_pad=False). `pool_subtract=False` is the ablation
  without the subtraction.
  """

  dim: int
  dtype: DTypeLike | None = None

  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    _check_odd("pool_size", self.pool_size)
    total = pooling.window_sum(layers.apply_mask(x, mask), self.pool_size)
    if mask is None:
      count = jnp.asarray(
          _window_count(x.shape[1], x.shape[2], self.pool_size), x.dtype)
    else:
      # Counts valid pixels; at least 1, for windows with only padding.
      valid = mask[..., None].astype(x.dtype)
      count = jnp.maximum(pooling.window_sum(valid, self.pool_size), 1)
    mean = total / count
    return mean - x if self.pool_subtract else mean


def depthwise_conv(dim: int, kernel_size: int, *, use_bias: bool,
                   conv_init: str, dtype, name) -> nn.Conv:
  """A convolution of each channel by itself, which keeps height and width."""
  k = kernel_size
  _check_odd("conv_kernel_size", k)
  kernel_init, bias_init = layers.conv_inits(conv_init, k * k)
  return layers.Conv(dim, (k, k), padding=((k // 2, k // 2),) * 2,
                     feature_group_count=dim, use_bias=use_bias, dtype=dtype,
                     kernel_init=kernel_init, bias_init=bias_init, name=name)


class DepthwiseConv(parts.Convolution, nn.Module):
  """A depthwise convolution: the ablation of arXiv 2111.11418, table 5.

  The authors recommend its kernel of 3 (sail-sg/poolformer, issue 18).
  """

  dim: int
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    return depthwise_conv(self.dim, self.conv_kernel_size, use_bias=True,
                          conv_init=self.conv_init, dtype=self.dtype,
                          name="conv")(layers.apply_mask(x, mask))


class SepConv(parts.Convolution, parts.Activation, nn.Module):
  """Inverted separable convolution: ConvFormer's mixer (arXiv 2210.13452).

  Dense to `expansion` times the channels, activation, depthwise convolution,
  Dense back; no biases (eq. 8; arXiv 1801.04381). ConvFormer has a kernel of 7,
  StarReLU and trunc_normal. `activation` may be a factory, too.
  """

  dim: int
  expansion: float = 2.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    hidden = int(self.expansion * self.dim)
    x = layers.Dense(hidden, use_bias=False, dtype=self.dtype,
                     kernel_init=layers.trunc_normal_02, name="pwconv1")(x)
    x = layers.activation(self.activation)(name="act1")(x)
    x = depthwise_conv(hidden, self.conv_kernel_size, use_bias=False,
                       conv_init=self.conv_init, dtype=self.dtype,
                       name="dwconv")(layers.apply_mask(x, mask))
    return layers.Dense(self.dim, use_bias=False, dtype=self.dtype,
                        kernel_init=layers.trunc_normal_02, name="pwconv2")(x)


class Attention(parts.Attention, nn.Module):
  """Multi-head self-attention over all pixels; memory grows as (H W)^2.

  Heads have `head_dim` channels, and there is at least one; queries, keys and
  values have no bias (official code of both papers). Padding is ignored.

  Attributes:
    kernels: "pallas" for a kernel in training without masks, else "xla".
  """

  dim: int
  head_dim: int = 32
  kernels: str = "xla"
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    b, h, w, _ = x.shape
    n_heads = max(self.dim // self.head_dim, 1)
    qkv = layers.Dense(3 * n_heads * self.head_dim, use_bias=False,
                       dtype=self.dtype, kernel_init=layers.trunc_normal_02,
                       name="qkv")(x)
    qkv = qkv.reshape(b, h * w, -1)
    if self.kernels == "pallas" and train and mask is None:
      y = self._by_kernel(qkv, n_heads)
    else:
      y = attention.self_attention(
          qkv, n_heads, mask=None if mask is None else mask.reshape(b, h * w))
    return layers.Dense(self.dim, use_bias=self.attention_proj_bias,
                        dtype=self.dtype, kernel_init=layers.trunc_normal_02,
                        name="proj")(y.reshape(b, h, w, -1))

  def _by_kernel(self, qkv, n_heads):
    compiling.note(
        f"attention of {'/'.join(self.path[:-2])} {list(qkv.shape)}",
        attention_kernel.problem_of_batch(qkv.shape, qkv.dtype, n_heads))
    return attention_kernel.self_attention(qkv, n_heads)


def _mix_pixels(matrix: jax.Array, x: jax.Array, mask) -> jax.Array:
  """y[m] = sum over n of matrix[m, n] x[n], over the pixels of x."""
  b, h, w, c = x.shape
  n = matrix.shape[1]
  if n != h * w:
    raise ValueError(
        f"a mixing matrix over {n} pixels cannot mix {h} x {w}; resize the "
        "images to the size that the model was initialised with")
  if mask is not None:
    raise ValueError("a mixing matrix over all pixels cannot ignore padding; "
                     "give images of the model's own size and no mask")
  y = jnp.einsum("mn,bnc->bmc", matrix.astype(x.dtype), x.reshape(b, n, c))
  return y.reshape(x.shape)


class RandomMixing(nn.Module):
  """RandFormer's mixer: a frozen random matrix over all pixels.

  The softmax over each row of uniform [0, 1) values, drawn at initialisation
  and kept in the collection "frozen" (arXiv 2210.13452, eq. 5, read as W X).
  """

  dim: int
  dtype: DTypeLike | None = None

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
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    n = (x.shape[1] * x.shape[2] if self.is_initializing()
         else self.get_variable("params", "kernel").shape[0])
    # [in, out], like the kernel of a Dense.
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
