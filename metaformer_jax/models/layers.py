"""Layers shared by the models: MLP, scaling, drop path, convolutions, heads.

Everything is channel-last. A `mask` is [B, H, W], 1 where a pixel is image and
0 where it is padding; layers that look beyond one pixel ignore the padding, so
that an image gives the same features on any canvas. The image must begin at
the canvas' top left, or at a multiple of the total stride.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from metaformer_jax import errors
from metaformer_jax.models import activations, norms

Dtype = Any

# timm's trunc_normal_(std=0.02) truncates at +-2, which is 100 standard
# deviations: a plain normal distribution.
trunc_normal_02 = nn.initializers.normal(0.02)

# PyTorch's default for convolutions: uniform in +-1/sqrt(fan_in).
torch_conv_kernel = nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform")


def torch_conv_bias(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for a convolution's bias: uniform in +-1/sqrt(fan_in)."""

  def init(rng, shape, dtype=jnp.float32):
    bound = fan_in**-0.5
    return jax.random.uniform(rng, shape, dtype, -bound, bound)

  return init


def conv_inits(name: str, fan_in: int):
  """First (kernel, bias): "torch", PyTorch's, or "trunc_normal", 0.02 and 0."""
  return lookup({
      "torch": (torch_conv_kernel, torch_conv_bias(fan_in)),
      "trunc_normal": (trunc_normal_02, nn.initializers.zeros),
  }, "conv_init", name)


def lookup(table, kind: str, name: str):
  """Returns table[name]; ValueError names the nearest to an unknown."""
  if name not in table:
    raise ValueError(
        f"unknown {kind} {name!r}{errors.did_you_mean(name, table)}")
  return table[name]


def apply_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Sets the padding of x [B, H, W, C] to zero, whatever it holds."""
  return x if mask is None else jnp.where(mask[..., None].astype(bool), x, 0)


def global_average_pool(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Mean over the valid pixels, in float32: [B, H, W, C] -> [B, C]."""
  z = x.astype(jnp.float32)
  if mask is None:
    return z.mean((1, 2)).astype(x.dtype)
  weight = mask[..., None].astype(jnp.float32)
  total = (z * weight).sum((1, 2))
  return (total / jnp.maximum(weight.sum((1, 2)), 1)).astype(x.dtype)


class Mlp(nn.Module):
  """Channel MLP of every pixel: Dense, activation, Dense."""

  hidden_dim: int
  activation: Callable[..., nn.Module] = activations.ACTIVATIONS["gelu"]
  use_bias: bool = True
  drop_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    dim = x.shape[-1]
    x = nn.Dense(self.hidden_dim, use_bias=self.use_bias, dtype=self.dtype,
                 kernel_init=trunc_normal_02, name="fc1")(x)
    x = self.activation(name="act")(x)
    x = nn.Dropout(self.drop_rate, name="drop1")(x, deterministic=not train)
    x = nn.Dense(dim, use_bias=self.use_bias, dtype=self.dtype,
                 kernel_init=trunc_normal_02, name="fc2")(x)
    return nn.Dropout(self.drop_rate, name="drop2")(x, deterministic=not train)


class MlpHead(nn.Module):
  """Dense, squared ReLU, LayerNorm, dropout, Dense: [B, C] -> [B, num_classes].

  The classifier of ConvFormer and CAFormer (official code: its LayerNorm has
  PyTorch's epsilon of 1e-5, timm's has 1e-6).
  """

  num_classes: int
  ratio: float = 4.0
  drop_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    x = nn.Dense(int(self.ratio * x.shape[-1]), dtype=self.dtype,
                 kernel_init=trunc_normal_02, name="fc1")(x)
    x = activations.squared_relu(x)
    x = norms.LayerNorm(dtype=self.dtype, name="norm")(x)
    x = nn.Dropout(self.drop_rate, name="drop")(x, deterministic=not train)
    return nn.Dense(self.num_classes, dtype=self.dtype,
                    kernel_init=trunc_normal_02, name="fc2")(x)


class DropPath(nn.Module):
  """Stochastic depth: drops the branch of whole examples, rescales the rest.

  Draws from the "drop_path" key, [B, ...] alike in and out (arXiv 1603.09382).
  """

  rate: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    if not train or self.rate == 0:
      return x
    keep = 1 - self.rate
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
    return x * kept.astype(x.dtype) / keep


class Scale(nn.Module):
  """Multiplies by a learned vector over channels.

  On a residual branch it is LayerScale (arXiv 2103.17239), on the shortcut
  ResScale (arXiv 2110.09456).
  """

  init_value: float
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    scale = self.param("scale", nn.initializers.constant(self.init_value),
                       (x.shape[-1],))
    return x * norms.spread(scale, x, self.dtype or jnp.float32)


def downsample_mask(mask: jax.Array | None, height: int, width: int, *,
                    kernel_size: int, stride: int, padding: int):
  """The mask [B, height, width] of a strided window's output; None stays None.

  An output pixel is valid where its window, less the window's own padding,
  lies inside the image: where the unpadded image would have had that pixel too.
  """
  if mask is None:
    return None
  # The unpadded image has output i where its window, which ends at pixel
  # stride*i + kernel - 1 - padding, ends at most `padding` beyond the image.
  last = kernel_size - 1 - 2 * padding
  mask = mask.astype(bool)
  if last < 0:
    # Windows that begin on the image may end before it: it grows by those.
    around = (-last, -last)
    mask = lax.reduce_window(mask, False, lax.bitwise_or,
                             (1, 1 - last, 1 - last), (1, 1, 1),
                             ((0, 0), around, around))
    last = 0
  return mask[:, last::stride, last::stride][:, :height, :width]


class Downsample(nn.Module):
  """Strided convolution with PyTorch's padding: the stem and between stages.

  [B, H, W, C] -> [B, floor((H + 2 pad - kernel) / stride) + 1, ..., dim].
  Returns the features and their mask, by `downsample_mask`.

  Attributes:
    pre_norm, post_norm: norms of its input and of its output, or None.
    conv_init: as in `conv_inits`.
  """

  dim: int
  kernel_size: int
  stride: int
  padding: int
  pre_norm: Callable[..., nn.Module] | None = None
  post_norm: Callable[..., nn.Module] | None = None
  conv_init: str = "torch"
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    k, s, p = self.kernel_size, self.stride, self.padding
    kernel_init, bias_init = conv_inits(self.conv_init, k * k * x.shape[-1])
    if self.pre_norm:
      x = self.pre_norm(dtype=self.dtype, name="norm")(
          x, mask=mask, train=train)
    x = nn.Conv(self.dim, (k, k), strides=(s, s), padding=((p, p), (p, p)),
                kernel_init=kernel_init, bias_init=bias_init, dtype=self.dtype,
                name="conv")(apply_mask(x, mask))
    mask = downsample_mask(mask, *x.shape[1:3], kernel_size=k, stride=s,
                           padding=p)
    if self.post_norm:
      x = self.post_norm(dtype=self.dtype, name="norm")(
          x, mask=mask, train=train)
    return x, mask
