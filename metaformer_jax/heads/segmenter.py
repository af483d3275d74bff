"""A backbone, a pyramid and a decoder: semantic segmentation.

No part names a backbone: all they need is `features`, {"stage1": map, ...}.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from metaformer_jax.heads import fpn, semantic_fpn, upernet
from metaformer_jax.models import layers, norms
from metaformer_jax.ops import resize

# Of the pyramid that a backbone with one output gets.
STRIDES = (4, 8, 16, 32)

# By stage.
Maps = Mapping[str, jax.Array]
Masks = Mapping[str, jax.Array | None]


class Segmenter(nn.Module):
  """Logits of the classes at the backbone's finest stride.

  A backbone with one output, as a ViT, gets a pyramid: that output, resized
  bilinearly to strides of 4, 8, 16 and 32, as mmsegmentation's MultiLevelNeck
  does between its convolutions. One that cannot ignore padding (`fixed_size`)
  sees it as zeros.

  Attributes:
    backbone: any model with `features` (`docs/design.md`, models).
    head: of the maps: `semantic_fpn.SemanticFpn`, `upernet.UPerNet`.
    pyramid: between the backbone and the head, or None.
    auxiliary: of the backbone's last map but one, in training only; or None.
    feature_norm: factory of a norm for each output of the backbone, called with
      `name`; None for none.
  """

  backbone: nn.Module
  head: nn.Module
  pyramid: nn.Module | None = None
  auxiliary: nn.Module | None = None
  feature_norm: Callable[..., nn.Module] | None = None

  @nn.compact
  def __call__(self, images: jax.Array, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, jax.Array | None]:
    """Segments images.

    Args:
      images: normalised, [B, H, W, 3].
      mask: [B, H, W], true for pixels of the image, which begins at the top
        left, false for padding; None if there is no padding.
      train: whether dropout and drop path are on, and BatchNorm uses the
        batch's statistics; "batch_stats" must then be mutable.

    Returns:
      "logits": float32 [B, h, w, num_classes], undefined in the padding;
      "mask": theirs, bool [B, h, w], or None; "auxiliary": in training, if
      there is that head, its logits, coarser, and "auxiliary_mask".
    """
    fixed = getattr(self.backbone, "fixed_size", False)
    features = self.backbone.features(images, mask=None if fixed else mask,
                                      train=train)
    strides = _strides(self.backbone, features, images.shape[1:3])
    masks = _masks(self.backbone, features, strides, mask)
    if fixed:
      features = {stage: layers.apply_mask(x, masks[stage])
                  for stage, x in features.items()}
    if self.feature_norm:
      features = {
          stage: layers.apply_mask(
              self.feature_norm(name=f"norm{stage.removeprefix('stage')}")(
                  x, mask=masks[stage], train=train), masks[stage])
          for stage, x in features.items()}
    maps, masks = _levels(features, masks, strides)
    found = {"mask": masks[0]}
    if self.auxiliary and (train or self.is_initializing()):
      found |= {"auxiliary": self.auxiliary(maps[-2], mask=masks[-2],
                                            train=train),
                "auxiliary_mask": masks[-2]}
    if self.pyramid:
      maps = self.pyramid(maps, masks)
    return {"logits": self.head(maps, masks, train=train), **found}


def _strides(backbone: nn.Module, features: Maps,
             shape: tuple[int, int]) -> dict[str, int]:
  """Strides of the outputs for images with this height and width.

  Of a model without `feature_info`, they are the ratios of the sizes, rounded.
  """
  if hasattr(backbone, "feature_info"):
    return {stage: stride for stage, (stride, _)
            in backbone.feature_info().items()}
  return {stage: max(round(n / m) for n, m in zip(shape, x.shape[1:3]))
          for stage, x in features.items()}


def _masks(backbone: nn.Module, features: Maps, strides: Mapping[str, int],
           mask: jax.Array | None) -> Masks:
  """The masks of the outputs.

  Of a model without `feature_masks`, the sizes are those of the images over the
  stride, rounded up.
  """
  if mask is None:
    return dict.fromkeys(features)
  if hasattr(backbone, "feature_masks"):
    return backbone.feature_masks(mask)
  return {stage: _scaled(mask, 1, strides[stage], x.shape[1:3])
          for stage, x in features.items()}


def _scaled(mask: jax.Array, factor: int, divisor: int,
            shape: tuple[int, int]) -> jax.Array:
  """The mask of valid parts that are factor / divisor as large, rounded up."""
  return resize.mask(-(-resize.sizes(mask) * factor // divisor), *shape)


def _levels(features: Maps, masks: Masks, strides: Mapping[str, int],
            ) -> tuple[list[jax.Array], list[jax.Array | None]]:
  """Maps and masks of a pyramid, the finest first."""
  stages = sorted(features)
  if stages[1:]:
    return [features[s] for s in stages], [masks[s] for s in stages]
  (x,), (mask,), (own,) = (d.values() for d in (features, masks, strides))
  maps, found = [], []
  for stride in STRIDES:
    shape = tuple(-(-n * own // stride) for n in x.shape[1:3])
    found.append(None if mask is None else _scaled(mask, own, stride, shape))
    maps.append(resize.by_masks(x, mask, shape, found[-1]))
  return maps, found


def create(backbone: nn.Module, task: Any, *,
           feature_norm: str | None = None) -> Segmenter:
  """The model that a task section describes.

  Args:
    backbone: any model with `features`; its dtype is that of the decoder.
    task: `config.tasks.Segmentation`.
    feature_norm: a name in `norms.NORMS`, or None for none.

  Raises:
    ValueError: the head or the norm is unknown.
  """
  dtype = getattr(backbone, "dtype", None)
  make = functools.partial(
      layers.lookup({"semantic_fpn": semantic_fpn.SemanticFpn,
                     "upernet": functools.partial(
                         upernet.UPerNet, pool_sizes=task.pool_sizes)},
                    "head", task.head),
      task.num_classes, drop_rate=task.head_drop_rate, dtype=dtype)
  norm = None
  if feature_norm not in (None, "none"):
    norm = functools.partial(
        layers.lookup(norms.NORMS, "norm", feature_norm),
        eps=getattr(backbone, "norm_eps", 1e-5), dtype=dtype)
  return Segmenter(
      backbone=backbone,
      head=make(dim=task.head_dim) if task.head_dim else make(),
      pyramid=(fpn.Pyramid(task.fpn_dim, dtype=dtype)
               if task.head == "semantic_fpn" else None),
      auxiliary=upernet.Fcn(
          task.num_classes, task.auxiliary_dim, task.head_drop_rate,
          dtype=dtype) if task.auxiliary_weight else None,
      feature_norm=norm)
