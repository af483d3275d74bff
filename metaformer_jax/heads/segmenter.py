"""A backbone, a pyramid and a decoder: semantic segmentation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from metaformer_jax.heads import features, fpn, semantic_fpn, upernet
from metaformer_jax.models import layers

# Of the pyramid that a backbone with one output gets.
STRIDES = (4, 8, 16, 32)


class Segmenter(nn.Module):
  """Logits of the classes at the backbone's finest stride.

  A backbone with one output, as a ViT, gets a pyramid: that output, resized
  bilinearly to strides of 4, 8, 16 and 32.

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
    levels = features.normalize(
        features.compute(self.backbone, images, mask, train),
        self.feature_norm, train)
    if not levels[1:]:
      levels = features.at_strides(levels, STRIDES)
    maps, masks = ([getattr(level, key) for level in levels]
                   for key in ("map", "mask"))
    found = {"mask": masks[0]}
    if self.auxiliary and (train or self.is_initializing()):
      found |= {"auxiliary": self.auxiliary(maps[-2], mask=masks[-2],
                                            train=train),
                "auxiliary_mask": masks[-2]}
    if self.pyramid:
      maps, masks = self.pyramid(maps, masks)
    return {"logits": self.head(maps, masks, train=train), **found}


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
  return Segmenter(
      backbone=backbone,
      head=make(dim=task.head_dim) if task.head_dim else make(),
      pyramid=(fpn.Pyramid(task.fpn_dim, dtype=dtype)
               if task.head == "semantic_fpn" else None),
      auxiliary=upernet.Fcn(
          task.num_classes, task.auxiliary_dim, task.head_drop_rate,
          dtype=dtype) if task.auxiliary_weight else None,
      feature_norm=features.norm(feature_norm, backbone))
