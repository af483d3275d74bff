"""ResMLP (arXiv 2105.03404; github.com/facebookresearch/deit)."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import layers, mlp_mixer, settings
from metaformer_jax.ops import statistics


class Affine(nn.Module):
  """alpha x + beta over channels, [..., C], instead of a norm (eq. 1)."""

  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array):
    alpha = self.param("alpha", nn.initializers.ones, (x.shape[-1],))
    beta = self.param("beta", nn.initializers.zeros, (x.shape[-1],))
    return statistics.affine(x, alpha, beta).astype(self.dtype or jnp.float32)


class ResMLPBlock(nn.Module):
  """Y = X + s1 (A Aff(X) + a); Z = Y + s2 MLP(Aff(Y)): eq. 2 and 3.

  [B, N, C] -> [B, N, C]; A is one matrix over the patches.
  """

  mlp_ratio: float
  layer_scale_init: float
  drop_rate: float
  drop_path_rate: float
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, train: bool = False):
    norm1, norm2 = (Affine(dtype=self.dtype, name=name)
                    for name in ("norm1", "norm2"))
    linear_tokens = functools.partial(
        mlp_mixer.over_patches,
        layers.Dense(x.shape[1], dtype=self.dtype,
                     kernel_init=layers.trunc_normal_02, name="linear_tokens"))
    mlp_channels = functools.partial(
        layers.Mlp(int(x.shape[-1] * self.mlp_ratio), drop_rate=self.drop_rate,
                   dtype=self.dtype, name="mlp_channels"), train=train)
    scale1, scale2 = (
        layers.Scale(self.layer_scale_init, dtype=self.dtype, name=name)
        for name in ("ls1", "ls2"))
    drop_path1, drop_path2 = layers.drop_paths(self.drop_path_rate, train)

    x = x + drop_path1(scale1(linear_tokens(norm1(x))))
    return x + drop_path2(scale2(mlp_channels(norm2(x))))


class ResMLP(settings.ResMLP, mlp_mixer.PatchMlp):
  """ResMLP; see `mlp_mixer.PatchMlp`. Initial values as in the official code.

  `settings.ResMLP` declares the hyper-parameters.

  Attributes:
    drop_rate: dropout in the MLPs.
    drop_path_rate: of all blocks, as in the official code.
    num_classes: outputs of the head; 0 for the pooled features.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  def setup(self):
    self.stem = layers.patch_embed(
        self.dim, self.patch_size, dtype=self.dtype,
        kernel_init=layers.torch_conv_kernel,
        bias_init=layers.torch_conv_bias(3 * self.patch_size**2))
    self.blocks = [
        ResMLPBlock(self.mlp_ratio, self.layer_scale_init, self.drop_rate,
                    self.drop_path_rate, dtype=self.dtype, name=f"block{i}")
        for i in range(1, self.depth + 1)]
    self.final_norm = Affine(dtype=self.dtype, name="norm")
    if self.num_classes:
      self.classifier = layers.Dense(
          self.num_classes, dtype=self.dtype,
          kernel_init=layers.trunc_normal_02, name="head")

  def _n_patches(self, block) -> int:
    return block["linear_tokens"]["kernel"].shape[0]
