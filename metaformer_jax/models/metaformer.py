"""The MetaFormer: one architecture, any token mixer (arXiv 2111.11418)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn

from metaformer_jax import errors
from metaformer_jax.models import layers, mixers

Dtype = Any


def _lookup(table, kind, name):
  if name not in table:
    raise ValueError(
        f"unknown {kind} {name!r}{errors.did_you_mean(name, table)}")
  return table[name]


class MetaFormerBlock(nn.Module):
  """Y = X + TokenMixer(Norm(X));  Z = Y + MLP(Norm(Y)): eq. 2 and 3.

  Each branch is scaled by LayerScale, unless `layer_scale_init` is None, and
  dropped at `drop_path_rate`. [B, H, W, dim] alike in and out.
  """

  dim: int
  token_mixer: mixers.MixerFactory
  norm: Callable[..., nn.Module] = layers.GroupNorm
  activation: Callable[[jax.Array], jax.Array] = layers.gelu
  mlp_ratio: float = 4.0
  layer_scale_init: float | None = 1e-5
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    def branch(y, i):
      if self.layer_scale_init is not None:
        y = layers.LayerScale(self.layer_scale_init, dtype=self.dtype,
                              name=f"layer_scale{i}")(y)
      return layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")(
          y, train=train)

    norm1 = self.norm(dtype=self.dtype, name="norm1")
    mixer = self.token_mixer(dim=self.dim, dtype=self.dtype, name="token_mixer")
    norm2 = self.norm(dtype=self.dtype, name="norm2")
    mlp = layers.Mlp(int(self.dim * self.mlp_ratio), self.activation,
                     self.drop_rate, dtype=self.dtype, name="mlp")
    x = x + branch(mixer(norm1(x, mask=mask), mask=mask, train=train), 1)
    return x + branch(mlp(norm2(x, mask=mask), train=train), 2)


class Stage(nn.Module):
  """Downsampling, then blocks: [B, H, W, C], mask -> [B, H', W', dim], mask."""

  downsample: Callable[..., nn.Module]
  blocks: Sequence[Callable[..., nn.Module]]

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, mask = self.downsample(name="downsample")(x, mask=mask)
    for i, block in enumerate(self.blocks, 1):
      x = block(name=f"block{i}")(x, mask=mask, train=train)
    return x, mask


class MetaFormer(nn.Module):
  """Four stages of MetaFormer blocks, and a linear head.

  Attributes:
    depths: blocks of each stage.
    dims: channels of each stage.
    token_mixers: for each stage a name in `mixers.MIXERS`, or a factory of
      your own, called as `factory(dim=..., dtype=..., name=...)`.
    pool_size: window side of the "pooling" mixer, odd.
    norm, norm_eps: a name in `layers.NORMS`, and its epsilon.
    activation: a name in `layers.ACTIVATIONS`.
    mlp_ratio: hidden over outer channels of the MLP.
    layer_scale_init: LayerScale's first value; None for no LayerScale.
    in_patch_size, in_stride, in_pad: kernel, stride, padding of the stem.
    num_classes: outputs of the head; 0 for the pooled features.
    drop_rate: dropout in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  depths: Sequence[int]
  dims: Sequence[int]
  token_mixers: Sequence[str | mixers.MixerFactory] = ("pooling",) * 4
  pool_size: int = 3
  norm: str = "group_norm"
  norm_eps: float = 1e-5
  activation: str = "gelu"
  mlp_ratio: float = 4.0
  layer_scale_init: float | None = 1e-5
  in_patch_size: int = 7
  in_stride: int = 4
  in_pad: int = 2
  num_classes: int = 1000
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  def setup(self):
    lengths = {len(self.depths), len(self.dims), len(self.token_mixers)}
    if len(lengths) != 1:
      raise ValueError(
          "depths, dims and token_mixers must name the same stages, got "
          f"{self.depths}, {self.dims}, {self.token_mixers}")
    norm = functools.partial(_lookup(layers.NORMS, "norm", self.norm),
                             eps=self.norm_eps)
    n_blocks = sum(self.depths)
    stages = []
    first = 0  # Number of blocks before the stage.
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims)):
      kernel, stride, pad = (
          (self.in_patch_size, self.in_stride, self.in_pad) if i == 0
          else (3, 2, 1))
      block = functools.partial(
          MetaFormerBlock, dim=dim, token_mixer=self._mixer(i), norm=norm,
          activation=_lookup(layers.ACTIVATIONS, "activation", self.activation),
          mlp_ratio=self.mlp_ratio, layer_scale_init=self.layer_scale_init,
          drop_rate=self.drop_rate, dtype=self.dtype)
      stages.append(Stage(
          downsample=functools.partial(layers.Downsample, dim, kernel, stride,
                                       pad, dtype=self.dtype),
          blocks=[
              functools.partial(block, drop_path_rate=self.drop_path_rate
                                * (first + j) / max(n_blocks - 1, 1))
              for j in range(depth)],
          name=f"stage{i + 1}"))
      first += depth
    self.stages = stages
    self.final_norm = norm(dtype=self.dtype, name="norm")
    if self.num_classes:
      self.head = nn.Dense(self.num_classes, dtype=self.dtype,
                           kernel_init=layers.trunc_normal_02)

  def _mixer(self, stage: int) -> mixers.MixerFactory:
    mixer = self.token_mixers[stage]
    if not isinstance(mixer, str):
      return mixer
    factory = _lookup(mixers.MIXERS, "token mixer", mixer)
    if mixer == "pooling":
      return functools.partial(factory, pool_size=self.pool_size)
    return factory

  def _stages(self, x, mask, train):
    for stage in self.stages:
      x, mask = stage(x, mask=mask, train=train)
      yield x, mask

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the stages' outputs, before any final norm.

    Args:
      x: normalised images [B, H, W, 3].
      mask: [B, H, W], true where a pixel is image and not padding; None where
        all are. See `layers`.
      train: whether dropout and drop path are on.

    Returns:
      {"stage1": [B, H/4, W/4, dims[0]], ..., "stage4": [B, H/32, W/32, ...]};
      zero in the padding.
    """
    return {
        f"stage{i}": layers.apply_mask(y, m)
        for i, (y, m) in enumerate(self._stages(x, mask, train), 1)}

  def __call__(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> jax.Array:
    """Returns logits [B, num_classes] for images and mask as in `features`."""
    for y, m in self._stages(x, mask, train):
      x, mask = y, m
    x = layers.global_average_pool(self.final_norm(x, mask=mask), mask)
    return self.head(x) if self.num_classes else x
