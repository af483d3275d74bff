"""The MetaFormer: one architecture, any token mixer (arXiv 2111.11418)."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn

from metaformer_jax.models import (
  activations,
  layers,
  mixers,
  norms,
  positions,
)

Dtype = Any


class MetaFormerBlock(nn.Module):
  """Y = X + TokenMixer(Norm(X));  Z = Y + MLP(Norm(Y)): eq. 2 and 3.

  [B, H, W, dim] alike in and out.

  Attributes:
    layer_scale_init, res_scale_init: first values of the vectors that scale the
      branches and the shortcuts; 0 for none.
    mlp_ratio: 0 leaves out the second line.
    residual: without it, the shortcuts X and Y are left out.
    drop_path_rate: at which the branches are dropped.
  """

  dim: int
  token_mixer: mixers.MixerFactory
  norm: Callable[..., nn.Module] = norms.GroupNorm
  activation: Callable[..., nn.Module] = activations.ACTIVATIONS["gelu"]
  mlp_ratio: float = 4.0
  mlp_bias: bool = True
  residual: bool = True
  layer_scale_init: float = 1e-5
  res_scale_init: float = 0.0
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    def scale(name, init_value, y):
      if not init_value:
        return y
      return layers.Scale(init_value, dtype=self.dtype, name=name)(y)

    def add(i, x, y):
      y = scale(f"layer_scale{i}", self.layer_scale_init, y)
      y = layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")(
          y, train=train)
      if not self.residual:
        return y
      return scale(f"res_scale{i}", self.res_scale_init, x) + y

    norm1 = self.norm(dtype=self.dtype, name="norm1")
    mixer = self.token_mixer(dim=self.dim, dtype=self.dtype, name="token_mixer")
    x = add(1, x, mixer(norm1(x, mask=mask, train=train), mask=mask,
                        train=train))
    if not self.mlp_ratio:
      return x
    norm2 = self.norm(dtype=self.dtype, name="norm2")
    mlp = layers.Mlp(int(self.dim * self.mlp_ratio), self.activation,
                     self.mlp_bias, self.drop_rate, dtype=self.dtype,
                     name="mlp")
    return add(2, x, mlp(norm2(x, mask=mask, train=train), train=train))


class Stage(nn.Module):
  """Downsampling, then blocks: [B, H, W, C], mask -> [B, H', W', dim], mask."""

  downsample: Callable[..., nn.Module]
  blocks: Sequence[Callable[..., nn.Module]]
  position_embedding: bool = False
  dtype: Dtype | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, mask = self.downsample(name="downsample")(x, mask=mask, train=train)
    if self.position_embedding:
      x = positions.PositionEmbedding(dtype=self.dtype, name="pos_embed")(
          x, mask=mask)
    for i, block in enumerate(self.blocks, 1):
      x = block(name=f"block{i}")(x, mask=mask, train=train)
    return x, mask


class MetaFormer(nn.Module):
  """Stages of MetaFormer blocks, and a head.

  Attributes:
    depths: blocks of each stage.
    dims: channels of each stage.
    token_mixers: for each stage a name in `mixers.MIXERS`, or a factory of
      your own, called as `factory(dim=..., dtype=..., name=...)`.
    pool_size, pool_subtract: window side of the "pooling" mixer, odd; whether
      it subtracts its input.
    conv_kernel_size: of the mixers "depthwise_conv" and "sepconv", odd.
    attention_proj_bias: whether the mixer "attention" ends with a bias.
    position_embeddings: stages, counted from 1, that begin by adding one.
    norm, norm_eps, norm_bias: a name in `norms.NORMS`, its epsilon, and
      whether it has a bias.
    activation: of the MLPs and of "sepconv", a name in
      `activations.ACTIVATIONS`.
    mlp_ratio, mlp_bias: hidden over outer channels of the MLPs, 0 for no MLP;
      whether they have biases.
    residual: whether blocks add to their input.
    layer_scale_init: LayerScale's first value; 0 or None for no LayerScale.
    res_scale_init: ResScale's first value in each stage, 0 for no ResScale;
      empty for none in all.
    in_patch_size, in_stride, in_pad: kernel, stride, padding of the stem.
    downsample_norm: whether a LayerNorm follows the stem and comes before the
      other downsamplings.
    conv_init: first weights of the downsamplings' and the mixers'
      convolutions, as in `layers.conv_inits`.
    head_norm_first: norm, then mean over the pixels (arXiv 2111.11418), or
      mean, then LayerNorm with a bias and an epsilon of 1e-6 (arXiv 2210.13452;
      timm's for both papers).
    head: "linear", or "mlp" for `layers.MlpHead`.
    head_drop_rate: dropout in the MLP head.
    num_classes: outputs of the head; 0 for the pooled features.
    drop_rate: dropout in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    dtype: of the computation; None is float32. Parameters are float32.
  """

  depths: Sequence[int]
  dims: Sequence[int]
  token_mixers: Sequence[str | mixers.MixerFactory] = ("pooling",) * 4
  pool_size: int = 3
  pool_subtract: bool = True
  conv_kernel_size: int = 3
  attention_proj_bias: bool = True
  position_embeddings: Sequence[int] = ()
  norm: str = "group_norm"
  norm_eps: float = 1e-5
  norm_bias: bool = True
  activation: str = "gelu"
  mlp_ratio: float = 4.0
  mlp_bias: bool = True
  residual: bool = True
  layer_scale_init: float | None = 1e-5
  res_scale_init: Sequence[float] = ()
  in_patch_size: int = 7
  in_stride: int = 4
  in_pad: int = 2
  downsample_norm: bool = False
  conv_init: str = "torch"
  head_norm_first: bool = True
  head: str = "linear"
  head_drop_rate: float = 0.0
  num_classes: int = 1000
  drop_rate: float = 0.0
  drop_path_rate: float = 0.0
  dtype: Dtype | None = None

  def setup(self):
    self._check()
    norm = functools.partial(layers.lookup(norms.NORMS, "norm", self.norm),
                             eps=self.norm_eps, use_bias=self.norm_bias)
    n_blocks = sum(self.depths)
    stages = []
    first = 0  # Number of blocks before the stage.
    for i, (depth, dim) in enumerate(zip(self.depths, self.dims)):
      block = functools.partial(
          MetaFormerBlock, dim=dim, token_mixer=self._mixer(i), norm=norm,
          activation=self._activation(), mlp_ratio=self.mlp_ratio,
          mlp_bias=self.mlp_bias, residual=self.residual,
          layer_scale_init=self.layer_scale_init or 0.0,
          res_scale_init=self.res_scale_init[i] if self.res_scale_init else 0.0,
          drop_rate=self.drop_rate, dtype=self.dtype)
      stages.append(Stage(
          downsample=self._downsample(i, dim),
          blocks=[
              functools.partial(block, drop_path_rate=self.drop_path_rate
                                * (first + j) / max(n_blocks - 1, 1))
              for j in range(depth)],
          position_embedding=i + 1 in self.position_embeddings,
          dtype=self.dtype, name=f"stage{i + 1}"))
      first += depth
    self.stages = stages
    if self.head_norm_first:
      self.final_norm = norm(dtype=self.dtype, name="norm")
    else:
      self.final_norm = norms.LayerNorm(1e-6, dtype=self.dtype, name="norm")
    if self.num_classes:
      self.classifier = self._head()

  def _check(self):
    lengths = {len(self.depths), len(self.dims), len(self.token_mixers)}
    if self.res_scale_init:
      lengths.add(len(self.res_scale_init))
    if len(lengths) != 1:
      raise ValueError(
          "depths, dims, token_mixers and res_scale_init must name the same "
          f"stages, got {self.depths}, {self.dims}, {self.token_mixers}, "
          f"{self.res_scale_init}")
    for stage in self.position_embeddings:
      if not 1 <= stage <= len(self.depths):
        raise ValueError(f"position_embeddings: there is no stage {stage}; "
                         f"they count from 1 to {len(self.depths)}")

  def _activation(self) -> Callable[..., nn.Module]:
    return layers.lookup(activations.ACTIVATIONS, "activation", self.activation)

  def _mixer(self, stage: int) -> mixers.MixerFactory:
    mixer = self.token_mixers[stage]
    if not isinstance(mixer, str):
      return mixer
    settings = {
        "pooling": {"pool_size": self.pool_size,
                    "subtract_input": self.pool_subtract},
        "depthwise_conv": {"kernel_size": self.conv_kernel_size,
                           "conv_init": self.conv_init},
        "sepconv": {"kernel_size": self.conv_kernel_size,
                    "conv_init": self.conv_init,
                    "activation": self._activation()},
        "attention": {"proj_bias": self.attention_proj_bias},
    }
    return functools.partial(
        layers.lookup(mixers.MIXERS, "token mixer", mixer),
        **settings.get(mixer, {}))

  def _downsample(self, stage: int, dim: int) -> Callable[..., nn.Module]:
    norm = functools.partial(norms.LayerNorm, eps=self.norm_eps,
                             use_bias=self.norm_bias)
    if not self.downsample_norm:
      norm = None
    make = functools.partial(layers.Downsample, dim, conv_init=self.conv_init,
                             dtype=self.dtype)
    if stage == 0:
      return functools.partial(
          make, kernel_size=self.in_patch_size, stride=self.in_stride,
          padding=self.in_pad, post_norm=norm)
    return functools.partial(make, kernel_size=3, stride=2, padding=1,
                             pre_norm=norm)

  def _head(self) -> nn.Module:
    make = layers.lookup({
        "linear": functools.partial(
            nn.Dense, kernel_init=layers.trunc_normal_02),
        "mlp": functools.partial(
            layers.MlpHead, drop_rate=self.head_drop_rate),
    }, "head", self.head)
    return make(self.num_classes, dtype=self.dtype, name="head")

  def _stages(self, x, mask, train) -> Iterator[tuple[jax.Array, Any]]:
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
    if self.head_norm_first:
      x = layers.global_average_pool(
          self.final_norm(x, mask=mask, train=train), mask)
    else:
      x = self.final_norm(layers.global_average_pool(x, mask))
    if not self.num_classes:
      return x
    kwargs = {"train": train} if self.head == "mlp" else {}
    return self.classifier(x, **kwargs)
