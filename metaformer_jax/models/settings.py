"""The hyper-parameters of every family: name, default, limits, meaning, checks.

Each is declared here once. The Linen modules inherit these dataclasses, the
model tables hold instances of them, and `config.model` is generated from them.
No jax: configs are checked before it is imported.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

from metaformer_jax.models import limits, parts, windows
from metaformer_jax.models.options import REQUIRED, option

# Of a ResNet block's convolutions: kernel sizes, channels in units of the
# stage's width, and which one has the stride.
RESNET_BLOCKS = {
    "basic": ((3, 3), (1, 1), 1),
    "bottleneck": ((1, 3, 1), (1, 1, 4), 2),
}


@dataclasses.dataclass(kw_only=True)
class Family:
  """Base of all families, which override its methods.

  Problems are lines "key: reason; nearest: value". Their keys are the
  hyper-parameters, or "image_size".
  """

  drop_path_rate: float = option(
      0.0, "stochastic depth of the last block", low=0, high=0.999,
      role="training")

  @property
  def fixed_size(self) -> bool:
    """Whether images must have the size that the model was initialised with.

    Such a model has matrices over all pixels, and cannot ignore padding.
    """
    return False

  def feature_info(self) -> dict[str, tuple[int, int]]:
    """Stride and channels of each output of the model's `features`."""
    strides = itertools.accumulate((
        math.prod(window.stride for window in before)
        for before in self.feature_windows().values()), operator.mul)
    return dict(zip(self.feature_windows(), zip(strides, self.feature_dims())))

  def feature_dims(self) -> Sequence[int]:
    """Channels of each output of the model's `features`."""
    raise NotImplementedError

  def feature_windows(self) -> dict[str, tuple[windows.Window, ...]]:
    """For each output, the windows between it and the one before.

    Those that keep the size are omitted.
    """
    raise NotImplementedError

  def differences(self, other: "Family") -> list[str]:
    """Which hyper-parameters with the role "function" differ from another's.

    With the same weights the two models compute something else.
    """

    def value(settings: "Family", key: str) -> Any:
      found = getattr(settings, key)
      return tuple(found) if isinstance(found, list) else found

    return [f.name for f in dataclasses.fields(self)
            if f.metadata["role"] == "function"
            and value(self, f.name) != value(other, f.name)]

  def check_structure(self) -> Iterator[str]:
    """Yields what is wrong for every image size and number of classes."""
    yield from ()

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    """Yields what is wrong for images of this shorter side, in pixels."""
    raise NotImplementedError

  def check(self, height: int, width: int, num_classes: int) -> Iterator[str]:
    """Yields a line for each problem with these settings and this image."""
    problems = list(self.check_structure())
    yield from problems
    if not problems:
      yield from self.check_size(min(height, width), num_classes)

  def require_structure(self) -> None:
    """Raises a ValueError with all problems of `check_structure`."""
    problems = list(self.check_structure())
    if problems:
      raise ValueError("; also ".join(problems))


@dataclasses.dataclass(kw_only=True)
class MetaFormer(parts.Pooling, parts.Convolution, parts.Attention,
                 parts.MetaFormerBlock, Family):
  """MetaFormers, with PoolFormer's defaults (arXiv 2111.11418)."""

  depths: tuple[int, ...] = option(REQUIRED, "blocks of each stage", low=1,
                                     role="shape")
  dims: tuple[int, ...] = option(REQUIRED, "channels of each stage", low=1,
                                   role="shape")
  token_mixers: tuple[str, ...] = option(
      ("pooling",) * 4, "mixer of each stage", own=True, choices=(
          "attention", "depthwise_conv", "identity", "pooling", "random",
          "sepconv", "spatial_fc"))
  position_embeddings: tuple[int, ...] = option(
      (), "stages, from 1, that begin by adding one", low=1, role="shape")
  norm: str = option("group_norm", "of the blocks", own=True, choices=(
      "batch_norm", "group_norm", "layer_norm", "none"))
  norm_eps: float = option(1e-5, "epsilon of the norms", above=0)
  norm_bias: bool = option(True, "the norms have a bias", role="shape")
  res_scale_init: tuple[float, ...] = option(
      (), "initial value of ResScale in each stage, 0: none; empty: none",
      role="shape")
  in_patch_size: int = option(7, "kernel of the stem", low=1, role="shape")
  in_stride: int = option(4, "stride of the stem", low=1)
  in_pad: int = option(2, "padding of the stem", low=0)
  downsample_norm: bool = option(
      False, "LayerNorm after the stem and before the other downsamplings",
      role="shape")
  head_norm_first: bool = option(
      True, "the head's norm comes before the mean over pixels")
  head: str = option("linear", "classifier", choices=("linear", "mlp"),
                     role="shape")
  head_drop_rate: float = option(
      0.0, "dropout of the head", low=0, high=0.999, role="training")

  def feature_dims(self) -> Sequence[int]:
    return self.dims

  def feature_windows(self) -> dict[str, tuple[windows.Window, ...]]:
    stem = windows.Window(self.in_patch_size, self.in_stride, self.in_pad)
    return windows.of_stages([stem], windows.Window(3, 2, 1), len(self.dims))

  @property
  def fixed_size(self) -> bool:
    return any(name in ("random", "spatial_fc") for name in self.token_mixers)

  def check_structure(self) -> Iterator[str]:
    of_stages = {"depths": self.depths, "dims": self.dims,
                 "token_mixers": self.token_mixers}
    if self.res_scale_init:
      of_stages["res_scale_init"] = self.res_scale_init
    yield from limits.check_stages(**of_stages)
    n_stages = len(self.depths)
    for stage in self.position_embeddings:
      if not 1 <= stage <= n_stages:
        yield (f"position_embeddings: there is no stage {stage}; nearest: "
               f"{1 if stage < 1 else n_stages}")

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    kernel, pad, largest = self.in_patch_size, self.in_pad, 2 * side + 1
    if pad > kernel:
      yield (f"in_pad: {pad} is more than the stem's kernel; nearest: {kernel}")
    elif side < kernel - 2 * pad:
      yield (f"image_size: {side} is less than the stem's kernel, {kernel}, "
             f"with its padding; nearest: {kernel - 2 * pad}")
    else:
      for key, size in (("pool_size", self.pool_size),
                        ("conv_kernel_size", self.conv_kernel_size),
                        ("in_patch_size", kernel)):
        if size > largest:
          yield (f"{key}: {size} is more than twice the image's side; nearest: "
                 f"{largest}")
    if self.mlp_ratio:
      yield from limits.check_mlp("mlp_ratio", self.mlp_ratio, min(self.dims))
    yield from limits.check_total(self.depths, {
        "in_patch_size": 3 * kernel**2 * self.dims[0],
        "num_classes": self.dims[-1] * num_classes,
        "dims": sum(9 * a * b for a, b in itertools.pairwise(self.dims)) + sum(
            2 * self.mlp_ratio * n * dim**2
            for n, dim in zip(self.depths, self.dims)),
    }, "dims, depths, mlp_ratio, in_patch_size")


@dataclasses.dataclass(kw_only=True)
class ResNet(Family):
  """ResNets (arXiv 1512.03385)."""

  block: str = option(REQUIRED, "kind of the blocks",
                      choices=tuple(RESNET_BLOCKS), role="shape")
  depths: tuple[int, ...] = option(REQUIRED, "blocks of each stage", low=1,
                                     role="shape")
  widths: tuple[int, ...] = option(
      (64, 128, 256, 512), "channels of each stage's 3x3 convolutions", low=1,
      role="shape")
  stem: str = option(
      "7x7", "the first convolution, or 3x3: three of these instead (ResNet-C)",
      choices=tuple(windows.RESNET_STEMS), role="shape")
  drop_rate: float = option(0.0, "dropout before the head", low=0, high=0.999,
                            role="training")

  def feature_dims(self) -> Sequence[int]:
    _, (*_, expansion), _ = RESNET_BLOCKS[self.block]
    return [expansion * width for width in self.widths]

  def feature_windows(self) -> dict[str, tuple[windows.Window, ...]]:
    stem = windows.RESNET_STEMS[self.stem]
    return windows.of_stages([*stem.convs, stem.pool], windows.Window(3, 2, 1),
                             len(self.widths))

  def check_structure(self) -> Iterator[str]:
    yield from limits.check_stages(depths=self.depths, widths=self.widths)

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    yield from limits.check_total(self.depths, {
        "num_classes": self.widths[-1] * num_classes,
        "widths": sum(9 * n * width**2
                      for n, width in zip(self.depths, self.widths)),
    }, "widths, depths")


@dataclasses.dataclass(kw_only=True)
class PyramidVisionTransformer(parts.NormEps, parts.Dropout, Family):
  """PVT (arXiv 2102.12122)."""

  depths: tuple[int, ...] = option(REQUIRED, "blocks of each stage", low=1,
                                     role="shape")
  dims: tuple[int, ...] = option(
      (64, 128, 320, 512), "channels of each stage", low=1, role="shape")
  n_heads: tuple[int, ...] = option(
      (1, 2, 5, 8), "attention heads in each stage", low=1)
  mlp_ratios: tuple[float, ...] = option(
      (8.0, 8.0, 4.0, 4.0), "hidden / outer channels of each stage's MLPs",
      above=0, role="shape")
  sr_ratios: tuple[int, ...] = option(
      (8, 4, 2, 1), "stride that reduces keys and values in each stage; 1 in "
      "the last", low=1, role="shape")
  patch_size: int = option(4, "side of a patch in the first stage, pixels",
                           low=1, role="shape")
  class_token: bool = option(
      True, "the last stage has one; False: as dense tasks, none, and a head "
      "sees the mean over the pixels", role="shape")
  qkv_bias: bool = option(True, "queries, keys and values have a bias",
                          role="shape")
  embed_norm_eps: float = option(
      1e-5, "epsilon of the norms of patches, and of reduced keys and values",
      above=0)

  def feature_dims(self) -> Sequence[int]:
    return self.dims

  def feature_windows(self) -> dict[str, tuple[windows.Window, ...]]:
    patch = windows.Window(self.patch_size, self.patch_size, 0)
    return windows.of_stages([patch], windows.Window(2, 2, 0), len(self.dims))

  def check_structure(self) -> Iterator[str]:
    yield from limits.check_stages(
        depths=self.depths, dims=self.dims, n_heads=self.n_heads,
        mlp_ratios=self.mlp_ratios, sr_ratios=self.sr_ratios)
    if self.class_token and self.sr_ratios and self.sr_ratios[-1] != 1:
      yield (f"sr_ratios: {self.sr_ratios} must end with 1, as a class token "
             f"cannot be reduced; nearest: {(*self.sr_ratios[:-1], 1)}")
    for dim, n in zip(self.dims, self.n_heads):
      yield from limits.check_heads("dims", dim, n)

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    # Patches of 2 follow the first; a stage needs as many tokens in a row as
    # its attention reduces to one.
    least = max(self.patch_size * 2**i * r
                for i, r in enumerate(self.sr_ratios))
    if side < least:
      yield (f"image_size: {side} gives fewer tokens than are reduced to one; "
             f"nearest: {least}")
    for dim, ratio in zip(self.dims, self.mlp_ratios):
      yield from limits.check_mlp("mlp_ratios", ratio, dim)
    yield from limits.check_total(self.depths, {
        "patch_size": 3 * self.patch_size**2 * self.dims[0],
        "num_classes": self.dims[-1] * num_classes,
        "dims": sum(n * (2 * ratio + r**2) * dim**2 for n, ratio, r, dim in zip(
            self.depths, self.mlp_ratios, self.sr_ratios, self.dims)),
    }, "dims, depths, mlp_ratios, sr_ratios, patch_size")


@dataclasses.dataclass(kw_only=True)
class OneStage(Family):
  """Base of the models that cut the image into patches once."""

  patch_size: int = option(16, "side of a patch, pixels", low=1, role="shape")
  dim: int = option(REQUIRED, "channels", low=1, role="shape")
  depth: int = option(REQUIRED, "blocks", low=1, role="shape")

  def feature_dims(self) -> Sequence[int]:
    return (self.dim,)

  def feature_windows(self) -> dict[str, tuple[windows.Window, ...]]:
    patch = windows.Window(self.patch_size, self.patch_size, 0)
    return {"stage4": (patch,)}

  def block_params(self, n_patches: int) -> float:
    """A lower bound on the parameters of a block."""
    raise NotImplementedError

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    p = self.patch_size
    if side < p:
      yield f"image_size: {side} is less than a patch, {p}; nearest: {p}"
    yield from limits.check_total((self.depth,), {
        "patch_size": 3 * p**2 * self.dim,
        "num_classes": self.dim * num_classes,
        "dim": self.depth * self.block_params((side // p)**2),
    }, "dim, depth, mlp_ratio, patch_size", depth_key="depth")


@dataclasses.dataclass(kw_only=True)
class OneMlp(parts.Dropout, OneStage):
  """Base of those with one MLP in a block."""

  mlp_ratio: float = option(
      4.0, "hidden / outer channels of the MLPs", above=0, role="shape")

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    yield from super().check_size(side, num_classes)
    yield from limits.check_mlp("mlp_ratio", self.mlp_ratio, self.dim)


@dataclasses.dataclass(kw_only=True)
class VisionTransformer(parts.NormEps, OneMlp):
  """ViT and DeiT (arXiv 2010.11929, 2012.12877)."""

  n_heads: int = option(REQUIRED, "attention heads", low=1)
  distilled: bool = option(
      False, "a distillation token with a head of its own", role="shape")
  dist_head: bool = option(
      True, "distilled: the token has that head; False: it has none, and the "
      "class token's gives the logits", role="shape")

  def check_structure(self) -> Iterator[str]:
    yield from limits.check_heads("dim", self.dim, self.n_heads)

  def block_params(self, n_patches: int) -> float:
    return (4 + 2 * self.mlp_ratio) * self.dim**2


@dataclasses.dataclass(kw_only=True)
class MlpMixer(parts.NormEps, OneStage):
  """MLP-Mixer (arXiv 2105.01601)."""

  mlp_ratio: tuple[float, ...] = option(
      (0.5, 4.0), "hidden channels of the MLPs over patches and over channels, "
      "both / dim", above=0, length=2, role="shape")
  fixed_size = True

  def check_size(self, side: int, num_classes: int) -> Iterator[str]:
    yield from super().check_size(side, num_classes)
    for ratio in self.mlp_ratio:
      yield from limits.check_mlp("mlp_ratio", ratio, self.dim)

  def block_params(self, n_patches: int) -> float:
    over_patches, over_channels = self.mlp_ratio
    return 2 * self.dim * (
        over_patches * n_patches + over_channels * self.dim)


@dataclasses.dataclass(kw_only=True)
class ResMLP(OneMlp):
  """ResMLP (arXiv 2105.03404)."""

  layer_scale_init: float = option(1e-4, "initial value of LayerScale",
                                   role="shape")
  fixed_size = True

  def block_params(self, n_patches: int) -> float:
    return n_patches**2 + 2 * self.mlp_ratio * self.dim**2


FAMILIES: dict[str, type[Family]] = {
    "metaformer": MetaFormer,
    "resnet": ResNet,
    "vit": VisionTransformer,
    "pvt": PyramidVisionTransformer,
    "mlp_mixer": MlpMixer,
    "resmlp": ResMLP,
}
