"""A backbone, a pyramid and a head of boxes: object detection."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax.heads import features, fpn, rcnn, retinanet
from metaformer_jax.models import layers


class Detector(nn.Module):
  """Classes and boxes of all anchors, at strides of 8 to 128.

  The outputs of the backbone with strides of 8, 16 and 32 are used. Where it
  has none of these, as a ViT, the one with the nearest stride is resized
  bilinearly.

  Attributes:
    backbone: any model with `features` (`docs/design.md`, models).
    pyramid: with two extra levels.
    head: of the maps: `retinanet.RetinaNet`.
    feature_norm: factory of a norm for each output that is used, called with
      `name`; None for none.
    frozen_batch_norm: the backbone's BatchNorm uses its running statistics, in
      training as well.
  """

  strides: ClassVar[tuple[int, ...]] = (8, 16, 32, 64, 128)

  backbone: nn.Module
  pyramid: fpn.Pyramid
  head: retinanet.RetinaNet
  feature_norm: Callable[..., nn.Module] | None = None
  frozen_batch_norm: bool = False

  @nn.compact
  def __call__(self, images: jax.Array, mask: jax.Array | None = None,
               train: bool = False) -> dict[str, Any]:
    """Detects objects.

    Args:
      images: normalised, [B, H, W, 3].
      mask: [B, H, W], true for pixels of the image, which begins at the top
        left, and of what pads its sides to multiples of 32; false for the rest
        of the canvas; None if there is none.
      train: whether dropout and drop path are on, and BatchNorm uses the
        batch's statistics; "batch_stats" must then be mutable.

    Returns:
      By level, with n anchors each: "logits": float32 [B, n, num_classes];
      "deltas": float32 [B, n, 4], the boxes relative to the anchors; "mask":
      bool [B, n], the anchors at places inside the image, or None. Logits and
      deltas are undefined where the mask is false.
    """
    levels = features.prepared(
        self.backbone, images, mask, train,
        strides=self.strides[:len(self.strides) - self.pyramid.n_extra],
        norm=self.feature_norm, frozen_batch_norm=self.frozen_batch_norm)
    maps, masks = self.pyramid(*([getattr(level, key) for level in levels]
                                 for key in ("map", "mask")))
    logits, deltas = self.head(maps, masks)
    return {"logits": logits, "deltas": deltas,
            "mask": None if mask is None else features.of_anchors(
                masks, self.head.n_anchors)}


def create(backbone: nn.Module, task: Any, *,
           feature_norm: str | None = None) -> Detector | rcnn.RCNN:
  """The model that a task section describes.

  Args:
    backbone: any model with `features`; its dtype is that of the decoder.
    task: `config.tasks.Detection`.
    feature_norm: a name in `norms.NORMS`, or None for none.

  Raises:
    ValueError: the head or the norm is unknown.
  """
  make = layers.lookup({"retinanet": _retinanet, "faster_rcnn": _rcnn,
                        "mask_rcnn": _rcnn}, "head", task.head)
  return make(
      task, task.anchor_octaves * len(task.anchor_ratios),
      getattr(backbone, "dtype", None), backbone=backbone,
      feature_norm=features.norm(feature_norm, backbone),
      frozen_batch_norm=task.frozen_batch_norm)


def _retinanet(task: Any, n_anchors: int, dtype: DTypeLike | None,
               **common: Any) -> Detector:
  return Detector(
      pyramid=fpn.Pyramid(task.fpn_dim, n_extra=2, dtype=dtype),
      head=retinanet.RetinaNet(task.num_classes, n_anchors, task.head_dim,
                               task.head_depth, dtype),
      **common)


def _rcnn(task: Any, n_anchors: int, dtype: DTypeLike | None,
          **common: Any) -> rcnn.RCNN:
  n, dim = task.num_classes, task.head_dim
  return rcnn.RCNN(
      pyramid=fpn.Pyramid(task.fpn_dim, dtype=dtype),
      rpn=rcnn.RPN(n_anchors, dim, dtype),
      box_head=rcnn.BoxHead(n, task.box_dim, dtype),
      mask_head=(rcnn.MaskHead(n, dim, task.head_depth, dtype)
                 if task.head == "mask_rcnn" else None),
      **common)
