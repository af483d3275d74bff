"""Layers shared by the models: MLP, scaling, drop path, convolutions, heads.

Everything is channel-last. A `mask` is [B, H, W], 1 for pixels of the image and
0 for padding; layers that look beyond one pixel ignore the padding, so that an
image gives the same features on any canvas. The image must start at the top
left of the canvas, or at a multiple of the total stride.
"""

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike

from metaformer_jax import errors, imports
from metaformer_jax.models import activations, norms, parts
from metaformer_jax.ops import activations as activation_ops
from metaformer_jax.ops import convolution, dense

# timm's trunc_normal_(std=0.02) truncates at +-2, which is 100 standard
# deviations: a plain normal distribution.
trunc_normal_02 = nn.initializers.normal(0.02)

# Flax's layers, computed in the form that is fast on the platform.
Conv = functools.partial(
    nn.Conv, conv_general_dilated=convolution.conv_general_dilated)
Dense = functools.partial(nn.Dense, dot_general=dense.dot_general)

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
  """Initializers of kernel and bias: PyTorch's, or normal(0.02) and zeros."""
  return lookup({
      "torch": (torch_conv_kernel, torch_conv_bias(fan_in)),
      "trunc_normal": (trunc_normal_02, nn.initializers.zeros),
  }, "conv_init", name)


def lookup(table, kind: str, name):
  """Returns table[name]; anything but a string is returned as it is.

  Raises:
    ValueError: the name is unknown; the message has the nearest one.
    ConfigError: it is an import path of which nothing can be imported.
  """
  if not isinstance(name, str):
    return name
  if imports.is_path(name):
    return imports.load(name)
  if name not in table:
    raise ValueError(
        f"unknown {kind} {name!r}{errors.did_you_mean(name, table)}")
  return table[name]


def activation(name: str | Callable) -> Callable[..., nn.Module]:
  """The factory with this name in `ACTIVATIONS`; a factory is returned."""
  return lookup(activations.ACTIVATIONS, "activation", name)


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
  """For each stage, the rates of its blocks: linear from 0 to `last`."""
  n_blocks, firsts = sum(depths), itertools.accumulate(depths, initial=0)
  return [[last * (first + i) / max(n_blocks - 1, 1) for i in range(depth)]
          for first, depth in zip(firsts, depths)]


def check_images(model: nn.Module, x: jax.Array, *path: str) -> None:
  """Refuses what is not normalised images [B, H, W, C], in one line.

  Args:
    model: the network, bound.
    x: what it was called with.
    path: of its first convolution, which has the number of channels.

  Raises:
    ValueError: another shape, channels first, or integers.
  """
  n, shape = _n_channels(model, path), list(x.shape)
  channels_first = (x.ndim == 4 and n in (None, shape[1])
                    and shape[1] in (1, 3) and shape[3] > 4)
  if channels_first or x.ndim != 4 or n not in (None, shape[3]):
    hint = ("; the channels come last: images.transpose(0, 2, 3, 1)"
            if channels_first else
            "; there is no batch axis: images[None]"
            if x.ndim == 3 and shape[-1] == (n or 3) else "")
    raise ValueError(f"images are [B, H, W, {n or 3}], not {shape}{hint}")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
        f"images are normalised floats, not {x.dtype}: (images / 255 - mean) / "
        "std, with the mean and std of `get_spec`")


def _n_channels(model: nn.Module, path: Sequence[str]) -> int | None:
  """Input channels of a convolution; None if its kernel is yet to be made."""
  if model.is_initializing():
    return None
  first, *rest = path
  tree = model.get_variable("params", first)
  for name in (*rest, "kernel"):
    tree = (tree or {}).get(name)
  return None if tree is None else tree.shape[2]


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
  """Channel MLP of every pixel: Dense, activation, Dense.

  Attributes:
    activation: a name in `activations.ACTIVATIONS`, or a factory.
  """

  hidden_dim: int
  activation: str | Callable[..., nn.Module] = "gelu"
  use_bias: bool = True
  drop_rate: float = 0.0
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    dim = x.shape[-1]
    x = Dense(self.hidden_dim, use_bias=self.use_bias, dtype=self.dtype,
              kernel_init=trunc_normal_02, name="fc1")(x)
    x = activation(self.activation)(name="act")(x)
    x = nn.Dropout(self.drop_rate, name="drop1")(x, deterministic=not train)
    x = Dense(dim, use_bias=self.use_bias, dtype=self.dtype,
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
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    x = Dense(int(self.ratio * x.shape[-1]), dtype=self.dtype,
              kernel_init=trunc_normal_02, name="fc1")(x)
    x = activation_ops.squared_relu(x)
    x = norms.LayerNorm(dtype=self.dtype, name="norm")(x)
    x = nn.Dropout(self.drop_rate, name="drop")(x, deterministic=not train)
    return Dense(self.num_classes, dtype=self.dtype,
                 kernel_init=trunc_normal_02, name="fc2")(x)


# The collection with what a scanned block's DropPath draws by: the probability
# "keep" and the random "key" (`stack`).
DRAWS = "draws"


class DropPath(nn.Module):
  """Stochastic depth: drops the branch of whole examples, rescales the rest.

  [B, ...] -> [B, ...]; uses the rng "drop_path" (arXiv 1603.09382).
  """

  rate: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    if not train or self.rate == 0:
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    if self.has_variable(DRAWS, "key"):
      keep, key = (self.get_variable(DRAWS, name) for name in ("keep", "key"))
      kept = jax.random.bernoulli(key, keep, shape)
      return x * kept.astype(x.dtype) / keep.astype(x.dtype)
    keep = 1 - self.rate
    kept = jax.random.bernoulli(self.make_rng("drop_path"), keep, shape)
    return x * kept.astype(x.dtype) / keep


def drop_paths(rate: float, train: bool) -> tuple[Callable, Callable]:
  """DropPath of a block's two branches: "drop_path1", "drop_path2"."""
  first, second = (
      functools.partial(DropPath(rate, name=name), train=train)
      for name in ("drop_path1", "drop_path2"))
  return first, second


class Scale(nn.Module):
  """Multiplies by a learned vector over channels.

  This is LayerScale on a residual branch (arXiv 2103.17239), and ResScale on
  the shortcut (arXiv 2110.09456).
  """

  init_value: float
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    scale = self.param("scale", nn.initializers.constant(self.init_value),
                       (x.shape[-1],))
    return x * norms.spread(scale, x, self.dtype or jnp.float32)


def downsample_mask(mask: jax.Array | None, height: int, width: int, *,
                    kernel_size: int, stride: int, padding: int):
  """The mask [B, height, width] of a strided window's output; None stays None.

  An output pixel is valid if its window, without the window's own padding, lies
  inside the image: if the image without the canvas would have that pixel too.
  """
  if mask is None:
    return None
  # The image alone has output i if its window, which ends at pixel
  # stride*i + kernel - 1 - padding, ends at most `padding` beyond the image.
  last = kernel_size - 1 - 2 * padding
  mask = mask.astype(bool)
  if last < 0:
    # With that much padding, windows beside the image give outputs as well.
    around = (-last, -last)
    mask = lax.reduce_window(mask, False, lax.bitwise_or,
                             (1, 1 - last, 1 - last), (1, 1, 1),
                             ((0, 0), around, around))
    last = 0
  return mask[:, last::stride, last::stride][:, :height, :width]


class Features:
  """Mixed into the models: the geometry of their `features`."""

  def feature_masks(self, mask: jax.Array | None,
                    ) -> dict[str, jax.Array | None]:
    """The masks of the outputs of `features`, without computing these.

    Needs no variables.

    Args:
      mask: of the images, [B, H, W]; None if there is no padding.

    Returns:
      {"stage1": bool [B, H/4, W/4], ...}, of the features' sizes; or None each.
    """
    masks = {}
    for stage, before in self.feature_windows().items():
      for window in before if mask is not None else ():
        mask = downsample_mask(
            mask, *map(window.n_outputs, mask.shape[1:]), **window._asdict())
      masks[stage] = mask
    return masks


def patch_embed(dim: int, patch_size: int, **kwargs) -> nn.Conv:
  """Cuts images into patches: [B, H, W, 3] -> [B, H / p, W / p, dim]."""
  p = patch_size
  return Conv(dim, (p, p), strides=(p, p), padding="VALID",
              name="patch_embed", **kwargs)


class Downsample(parts.ConvInit, nn.Module):
  """Strided convolution with PyTorch's padding: the stem and between stages.

  [B, H, W, C] -> [B, floor((H + 2 pad - kernel) / stride) + 1, ..., dim].
  Returns the features and their mask, by `downsample_mask`.

  Attributes:
    pre_norm, post_norm: factories of norms of its input and output, or None.
  """

  dim: int
  kernel_size: int
  stride: int
  padding: int
  pre_norm: Callable[..., nn.Module] | None = None
  post_norm: Callable[..., nn.Module] | None = None
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    k, s, p = self.kernel_size, self.stride, self.padding
    kernel_init, bias_init = conv_inits(self.conv_init, k * k * x.shape[-1])
    if self.pre_norm:
      x = self.pre_norm(dtype=self.dtype, name="norm")(
          x, mask=mask, train=train)
    x = Conv(self.dim, (k, k), strides=(s, s), padding=((p, p), (p, p)),
             kernel_init=kernel_init, bias_init=bias_init, dtype=self.dtype,
             name="conv")(apply_mask(x, mask))
    mask = downsample_mask(mask, *x.shape[1:3], kernel_size=k, stride=s,
                           padding=p)
    if self.post_norm:
      x = self.post_norm(dtype=self.dtype, name="norm")(
          x, mask=mask, train=train)
    return x, mask
