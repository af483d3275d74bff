"""Layers shared by the models: norms, activations, MLP, convolutions, scaling.

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


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """Exact GELU, x * Phi(x), as in PyTorch; not the tanh approximation.

  The gradient is computed from x alone, where automatic differentiation keeps
  a second array of x's size: the largest in the model.
  """
  return jax.nn.gelu(x, approximate=False)


def _gelu_fwd(x):
  return gelu(x), x


def _gelu_bwd(x, dy):
  z = x.astype(jnp.float32)
  cdf = 0.5 * lax.erfc(-z * 0.5**0.5)
  pdf = jnp.exp(-0.5 * z * z) * (2 * jnp.pi) ** -0.5
  return ((dy.astype(jnp.float32) * (cdf + z * pdf)).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def per_channel(vector: jax.Array, x: jax.Array) -> jax.Array:
  """Shapes a vector over channels to multiply or add to x [..., C]."""
  return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def apply_mask(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Sets the padding of x [B, H, W, C] to zero."""
  return x if mask is None else x * mask[..., None].astype(x.dtype)


def global_average_pool(x: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Mean over the valid pixels, in float32: [B, H, W, C] -> [B, C]."""
  z = x.astype(jnp.float32)
  if mask is None:
    return z.mean((1, 2)).astype(x.dtype)
  weight = mask[..., None].astype(jnp.float32)
  total = (z * weight).sum((1, 2))
  return (total / jnp.maximum(weight.sum((1, 2)), 1)).astype(x.dtype)


def _normalize(x, axes, eps, weight=None):
  """(x - mean) / sqrt(var + eps) over `axes` in float32, in two passes.

  The variance is the mean of the squared differences: the difference of the
  means, E[x^2] - E[x]^2, cancels where the mean is large.
  """
  x = x.astype(jnp.float32)
  if weight is None:
    mean = x.mean(axes, keepdims=True)
    centred = x - mean
    var = jnp.square(centred).mean(axes, keepdims=True)
  else:
    n = jnp.maximum(
        jnp.broadcast_to(weight, x.shape).sum(axes, keepdims=True), 1)
    mean = (x * weight).sum(axes, keepdims=True) / n
    centred = x - mean
    var = (jnp.square(centred) * weight).sum(axes, keepdims=True) / n
  return centred * lax.rsqrt(var + eps)


class GroupNorm(nn.Module):
  """GroupNorm with one group: statistics over H, W and C of each image.

  The "Modified Layer Normalization" of arXiv 2111.11418; [B, H, W, C] alike in
  and out. Statistics in float32; scale and bias are a vector over channels.
  """

  eps: float = 1e-5
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None):
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    weight = None if mask is None else mask[..., None].astype(jnp.float32)
    y = _normalize(x, (1, 2, 3), self.eps, weight)
    y = y * per_channel(scale, y) + per_channel(bias, y)
    return y.astype(self.dtype or jnp.float32)


class LayerNorm(nn.Module):
  """LayerNorm over the channels of each pixel; the mask changes nothing."""

  eps: float = 1e-5
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None):
    del mask
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    y = _normalize(x, (-1,), self.eps)
    y = y * per_channel(scale, y) + per_channel(bias, y)
    return y.astype(self.dtype or jnp.float32)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "group_norm": GroupNorm,
    "layer_norm": LayerNorm,
}


class Mlp(nn.Module):
  """Channel MLP of every pixel: Dense, activation, Dense."""

  hidden_dim: int
  activation: Callable[[jax.Array], jax.Array] = gelu
  drop_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    dim = x.shape[-1]
    x = nn.Dense(self.hidden_dim, dtype=self.dtype,
                 kernel_init=trunc_normal_02, name="fc1")(x)
    x = self.activation(x)
    x = nn.Dropout(self.drop_rate, name="drop1")(x, deterministic=not train)
    x = nn.Dense(dim, dtype=self.dtype, kernel_init=trunc_normal_02,
                 name="fc2")(x)
    return nn.Dropout(self.drop_rate, name="drop2")(x, deterministic=not train)


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


class LayerScale(nn.Module):
  """Multiplies a residual branch by a learned vector (arXiv 2103.17239)."""

  init_value: float
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    scale = self.param("scale", nn.initializers.constant(self.init_value),
                       (x.shape[-1],))
    return x * per_channel(scale, x).astype(self.dtype or jnp.float32)


class Downsample(nn.Module):
  """Strided convolution with PyTorch's padding: the stem and between stages.

  [B, H, W, C] -> [B, floor((H + 2 pad - kernel) / stride) + 1, ..., dim].
  Returns the features and their mask. An output pixel is valid where its
  window, less the convolution's own padding, lies inside the image: where the
  unpadded image would have had that pixel too.
  """

  dim: int
  kernel_size: int
  stride: int
  padding: int
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None):
    k, s, p = self.kernel_size, self.stride, self.padding
    bias_init = torch_conv_bias(fan_in=k * k * x.shape[-1])
    y = nn.Conv(self.dim, (k, k), strides=(s, s), padding=((p, p), (p, p)),
                kernel_init=torch_conv_kernel, bias_init=bias_init,
                dtype=self.dtype, name="conv")(apply_mask(x, mask))
    if mask is None:
      return y, None
    # The unpadded image has output i where its window, which ends at pixel
    # s*i + k - 1 - p, ends at most p pixels beyond the image.
    last = k - 1 - 2 * p
    before = max(-last, 0)
    mask = jnp.pad(mask, ((0, 0), (before, 0), (before, 0)), mode="edge")
    mask = mask[:, max(last, 0)::s, max(last, 0)::s]
    return y, mask[:, :y.shape[1], :y.shape[2]]
