"""ResMLP (arXiv 2105.03404; github.com/facebookresearch/deit)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax.models import layers, mlp_mixer, norms

Dtype = Any


class Affine(nn.Module):
  """alpha x + beta over channels, [..., C]: in place of a norm (eq. 1)."""

  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],))
    beta = self.param("beta", nn.initializers.zeros, (x.shape[-1],))
    alpha, beta = (norms.per_channel(v, x) for v in (alpha, beta))
    return (alpha * x + beta).astype(self.dtype or jnp.float32)


class ResMLPBlock(nn.Module):
  """Y = X + s1 (A Aff(X) + a); Z = Y + s2 MLP(Aff(Y)): eq. 2 and 3.

  [B, N, C] alike in and out; A is one matrix over the patches.
  """

  mlp_ratio: float = 4.0
  layer_scale_init: float = 1e-4
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    def add(i, x, y):
      y = layers.Scale(self.layer_scale_init, dtype=self.dtype,
                       name=f"ls{i}")(y)
      return x + layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")(
          y, train=train)

    linear_tokens = nn.Dense(
        x.shape[1], dtype=self.dtype, kernel_init=layers.trunc_normal_02,
        name="linear_tokens")
    mlp_channels = layers.Mlp(
        int(x.shape[-1] * self.mlp_ratio), drop_rate=self.drop_rate,
        dtype=self.dtype, name="mlp_channels")
    x = add(1, x, mlp_mixer.over_patches(
        linear_tokens, Affine(dtype=self.dtype, name="norm1")(x)))
    return add(2, x, mlp_channels(
        Affine(dtype=self.dtype, name="norm2")(x), train=train))


class ResMLP(mlp_mixer.PatchMlp):
  """ResMLP; see `mlp_mixer.PatchMlp`. First values as in the official code.

  Attributes:
    patch_size: side of a patch in pixels.
    dim: channels.
    depth: number of blocks.
    mlp_ratio: hidden over outer channels of the MLPs.
    layer_scale_init: LayerScale's first value.
    num_classes: outputs of the head; 0 for the pooled features.
    drop_rate: dropout in the MLPs.
    drop_path_rate: of every block alike, as in the official code.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  mlp_ratio: float = 4.0
  layer_scale_init: float = 1e-4
  drop_rate: float = 0.0

  def setup(self):
    self.stem = self._conv(
        kernel_init=layers.torch_conv_kernel,
        bias_init=layers.torch_conv_bias(3 * self.patch_size**2))
    self.blocks = [
        ResMLPBlock(self.mlp_ratio, self.layer_scale_init, self.drop_rate,
                    self.drop_path_rate, dtype=self.dtype, name=f"block{i}")
        for i in range(1, self.depth + 1)]
    self.final_norm = Affine(dtype=self.dtype, name="norm")
    if self.num_classes:
      self.classifier = nn.Dense(
          self.num_classes, dtype=self.dtype,
          kernel_init=layers.trunc_normal_02, name="head")

  def _n_patches(self, block) -> int:
    return block["linear_tokens"]["kernel"].shape[0]
