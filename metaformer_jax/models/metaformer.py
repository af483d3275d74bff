"""The MetaFormer: one architecture, any token mixer (arXiv 2111.11418)."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.models import (
  compiling,
  fused,
  layers,
  mixers,
  norms,
  parts,
  positions,
  settings,
  stack,
)


class MetaFormerBlock(parts.MetaFormerBlock, nn.Module):
  """Y = X + TokenMixer(Norm(X));  Z = Y + MLP(Norm(Y)): eq. 2 and 3.

  [B, H, W, dim] -> [B, H, W, dim].

  Attributes:
    mlp_ratio: hidden over outer channels of the MLP; 0 omits eq. 3.
    residual: whether there are the shortcuts X and Y.
    layer_scale_init, res_scale_init: initial values of the vectors that scale
      the branches and the shortcuts; 0 for none.
    drop_path_rate: probability of dropping a branch.
    kernels: "pallas" for the branches that have a kernel (`fused`), else "xla".
  """

  dim: int
  token_mixer: mixers.MixerFactory
  norm: Callable[..., nn.Module] = norms.GroupNorm
  res_scale_init: float = 0.0
  drop_path_rate: float = 0.0
  kernels: str = "xla"
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    norm1, mixer, norm2 = (
        self.norm(dtype=self.dtype, name="norm1"),
        self.token_mixer(dim=self.dim, dtype=self.dtype, name="token_mixer"),
        self.norm(dtype=self.dtype, name="norm2"))
    mlp = layers.Mlp(
        int(self.dim * self.mlp_ratio), self.activation, self.mlp_bias,
        self.drop_rate, dtype=self.dtype, name="mlp")
    also = {"mask": mask, "train": train}
    kernel1 = fused.token_mixer(self, norm1, mixer, **also)
    kernel2 = fused.mlp(self, norm2, **also) if self.mlp_ratio else None
    norm1, mixer, norm2 = (
        functools.partial(module, **also) for module in (norm1, mixer, norm2))
    mlp = functools.partial(mlp, train=train)
    add1, add2 = (functools.partial(self._add, i, train=train) for i in (1, 2))

    x = kernel1(x) if kernel1 else add1(x, mixer(norm1(x)))
    if not self.mlp_ratio:
      return x
    return kernel2(x) if kernel2 else add2(x, mlp(norm2(x)))

  def _add(self, i: int, x: jax.Array, y: jax.Array, *,
           train: bool) -> jax.Array:
    """shortcut x + branch y; LayerScale, DropPath and ResScale if there are."""
    if self.layer_scale_init:
      y = layers.Scale(self.layer_scale_init, dtype=self.dtype,
                       name=f"layer_scale{i}")(y)
    y = layers.DropPath(self.drop_path_rate, name=f"drop_path{i}")(
        y, train=train)
    if not self.residual:
      return y
    if self.res_scale_init:
      x = layers.Scale(self.res_scale_init, dtype=self.dtype,
                       name=f"res_scale{i}")(x)
    return x + y


class Stage(nn.Module):
  """Downsampling, then blocks: [B, H, W, C], mask -> [B, H', W', dim], mask."""

  downsample: Callable[..., nn.Module]
  block: Callable[..., nn.Module]
  drop_path_rates: Sequence[float]
  position_embedding: bool = False
  scan: bool = False
  remat: str = "none"
  dtype: DTypeLike | None = None

  @nn.compact
  def __call__(self, x: jax.Array, *, mask=None, train: bool = False):
    x, mask = self.downsample(name="downsample")(x, mask=mask, train=train)
    if self.position_embedding:
      x = positions.PositionEmbedding(dtype=self.dtype, name="pos_embed")(
          x, mask=mask)
    x = stack.run(self, self.block, self.drop_path_rates, x, mask=mask,
                  train=train, scan=self.scan, remat=self.remat)
    return x, mask


class MetaFormer(settings.MetaFormer, layers.Features, nn.Module):
  """Stages of MetaFormer blocks, and a head.

  `settings.MetaFormer` declares the hyper-parameters. An element of
  `token_mixers` can also be a factory, or the import path of one, as
  "my_mixers:Shift"; it is called as `factory(dim=..., dtype=..., name=...)`.
  Likewise `norm` (eps, use_bias, dtype, name) and `activation` (name). Not
  obvious from their names:

  Attributes:
    layer_scale_init: 0 or None for no LayerScale.
    head_norm_first: norm, then mean over the pixels (arXiv 2111.11418), or
      mean, then LayerNorm with a bias and an epsilon of 1e-6 (arXiv 2210.13452;
      timm's for both papers).
    head: "linear", or "mlp" for `layers.MlpHead`, the one with head_drop_rate.
    drop_rate: dropout in the MLPs.
    drop_path_rate: of the last block; linear from 0 at the first.
    num_classes: outputs of the head; 0 for the pooled features.
    dtype: of the computation; None is float32. Parameters are float32.
    compile: whether blocks are scanned, recomputed, or kernels.
  """

  num_classes: int = 1000
  dtype: DTypeLike | None = None
  compile: compiling.Compile = compiling.Compile()

  def setup(self):
    self.require_structure()
    rates = layers.drop_path_rates(self.drop_path_rate, self.depths)
    self.stages = [self._stage(i, rates[i]) for i in range(len(self.depths))]
    if self.head_norm_first:
      self.final_norm = self._norm()(dtype=self.dtype, name="norm")
    else:
      self.final_norm = norms.LayerNorm(1e-6, dtype=self.dtype, name="norm")
    if self.num_classes:
      self.classifier = self._head()

  def _norm(self) -> Callable[..., nn.Module]:
    return functools.partial(layers.lookup(norms.NORMS, "norm", self.norm),
                             eps=self.norm_eps, use_bias=self.norm_bias)

  def _stage(self, i: int, drop_path_rates: Sequence[float]) -> Stage:
    block = functools.partial(
        MetaFormerBlock, dim=self.dims[i], token_mixer=self._mixer(i),
        norm=self._norm(), kernels=self.compile.kernels, dtype=self.dtype,
        res_scale_init=self.res_scale_init[i] if self.res_scale_init else 0.0,
        **self._shared(parts.MetaFormerBlock))
    return Stage(
        downsample=self._downsample(i), block=block,
        drop_path_rates=drop_path_rates,
        position_embedding=i + 1 in self.position_embeddings,
        scan=self.compile.scan,
        remat=self.compile.remat_of(len(self.depths))[i],
        dtype=self.dtype, name=f"stage{i + 1}")

  def _mixer(self, i: int) -> mixers.MixerFactory:
    """The stage's mixer, with the hyper-parameters that it shares with self."""
    name = self.token_mixers[i]
    mixer = layers.lookup(mixers.MIXERS, "token mixer", name)
    if mixer not in mixers.MIXERS.values():  # A user's own.
      return mixer
    given = self._shared(mixer)
    if mixer is mixers.Attention:
      given["kernels"] = self.compile.kernels
    return functools.partial(mixer, **given)

  def _shared(self, cls: Callable[..., Any]) -> dict[str, Any]:
    """The hyper-parameters that a dataclass has too, by name."""
    own, others = ({f.name for f in dataclasses.fields(c)}
                   for c in (settings.MetaFormer, cls))
    return {key: getattr(self, key) for key in own & others}

  def _downsample(self, i: int) -> Callable[..., nn.Module]:
    norm = functools.partial(norms.LayerNorm, eps=self.norm_eps,
                             use_bias=self.norm_bias)
    if not self.downsample_norm:
      norm = None
    make = functools.partial(layers.Downsample, self.dims[i],
                             conv_init=self.conv_init, dtype=self.dtype)
    if i == 0:
      return functools.partial(
          make, kernel_size=self.in_patch_size, stride=self.in_stride,
          padding=self.in_pad, post_norm=norm)
    return functools.partial(make, kernel_size=3, stride=2, padding=1,
                             pre_norm=norm)

  def _head(self) -> nn.Module:
    make = layers.lookup({
        "linear": functools.partial(
            layers.Dense, kernel_init=layers.trunc_normal_02),
        "mlp": functools.partial(
            layers.MlpHead, drop_rate=self.head_drop_rate),
    }, "head", self.head)
    return make(self.num_classes, dtype=self.dtype, name="head")

  def _stages(self, x, mask, train) -> Iterator[tuple[jax.Array, Any]]:
    layers.check_images(self, x, "stage1", "downsample", "conv")
    for stage in self.stages:
      x, mask = stage(x, mask=mask, train=train)
      yield x, mask

  def features(self, x: jax.Array, *, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array]:
    """Returns the stages' outputs, before any final norm.

    Args:
      x: normalised images [B, H, W, 3].
      mask: [B, H, W], true for pixels of the image, false for padding; None if
        there is no padding. See `layers`.
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
