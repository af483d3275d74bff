"""The task section of object detection."""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from metaformer_jax.config.tasks import base
from metaformer_jax.models.options import option

if TYPE_CHECKING:
  from metaformer_jax.config.schema import Experiment
  from metaformer_jax.models.settings import Family

# Sides of the images that a network sees are padded to a multiple of it.
ALIGNED = 32

_RETINANET: dict[str, Any] = {
    "anchor_scale": 4.0, "anchor_octaves": 3, "positive_iou": 0.5,
    "negative_iou": 0.4}
_RCNN: dict[str, Any] = {
    "anchor_scale": 8.0, "anchor_octaves": 1, "positive_iou": 0.7,
    "negative_iou": 0.3}

# What differs from head to head.
_DEFAULTS = {"retinanet": _RETINANET, "faster_rcnn": _RCNN, "mask_rcnn": _RCNN}


@dataclasses.dataclass(frozen=True)
class Detection(base.Task):
  """Object detection: boxes with a class and a score, and masks.

  The defaults are those of RetinaNet (arXiv 1708.02002), Faster R-CNN (arXiv
  1506.01497) and Mask R-CNN (arXiv 1703.06870) on COCO, as arXiv 2111.11418,
  section 4.2, trains them: the official repository's detection/configs, for
  mmdetection 2.19.
  """

  MEASURES = (base.Measure("box_ap", True, is_fraction=True),
              base.Measure("box_ap50", True, is_fraction=True),
              base.Measure("box_ap75", True, is_fraction=True),
              base.Measure("box_ap_small", True, is_fraction=True),
              base.Measure("box_ap_medium", True, is_fraction=True),
              base.Measure("box_ap_large", True, is_fraction=True),
              base.Measure("mask_ap", True, is_fraction=True),
              base.Measure("mask_ap50", True, is_fraction=True),
              base.Measure("mask_ap75", True, is_fraction=True),
              base.Measure("mask_ap_small", True, is_fraction=True),
              base.Measure("mask_ap_medium", True, is_fraction=True),
              base.Measure("mask_ap_large", True, is_fraction=True))
  RESUMABLE = ("candidates", "score_threshold", "nms_iou", "max_detections",
               "mask_threshold")

  name: str = option("detection", "what is learned")
  num_classes: int | None = option(
      None, "classes of objects; None: those of the data", low=1, high=2**15)
  class_names: tuple[str, ...] | None = option(
      None, "names of the classes, by which the data's are numbered; None: the "
      "data's")
  category_ids: tuple[int, ...] | None = option(
      None, "numbers of the classes in COCO files, which predictions are "
      "written with; None: the data's", low=0)

  head: str = option("retinanet", "the detector", choices=tuple(_DEFAULTS))
  feature_norm: str | None = option(
      None, "norm of each of the backbone's outputs; None: that of its blocks "
      "if it is a MetaFormer, layer_norm for one with a single scale, else "
      "none", choices=("batch_norm", "group_norm", "layer_norm", "none"))
  frozen_batch_norm: bool = option(
      False, "BatchNorm of the backbone uses its running statistics, in "
      "training as well (mmdetection's norm_eval)")
  fpn_dim: int = option(256, "channels of the pyramid", low=1)
  head_dim: int = option(
      256, "channels of the head's convolutions: RetinaNet's, and those of "
      "proposals and of masks", low=1)
  head_depth: int = option(
      4, "convolutions before the last one: RetinaNet's, of classes and of "
      "boxes, and those of masks", low=0, high=64)
  box_dim: int = option(
      1024, "R-CNN: channels of the two layers before classes and boxes",
      low=1)

  anchor_scale: float | None = option(
      None, "the smallest square anchor of a level has this side, in strides "
      "of the level; None: 4, R-CNN: 8", above=0)
  anchor_octaves: int | None = option(
      None, "scales of anchors from one level to the next; None: 3, R-CNN: 1",
      low=1, high=16)
  anchor_ratios: tuple[float, ...] = option(
      (0.5, 1.0, 2.0), "heights of anchors over their widths", above=0)
  positive_iou: float | None = option(
      None, "an anchor with at least this IoU with an object is positive; "
      "None: 0.5, R-CNN: 0.7", above=0, high=1)
  negative_iou: float | None = option(
      None, "one with less than this IoU with each is negative; between the "
      "two it is ignored; None: 0.4, R-CNN: 0.3", above=0, high=1)
  focal_alpha: float = option(
      0.25, "focal loss: weight of positives", low=0, high=1)
  focal_gamma: float = option(2.0, "focal loss: exponent", low=0)
  loss_group: int | None = option(
      None, "images whose losses are divided by their number of positive "
      "(R-CNN: of sampled) boxes together, before the mean over the groups; "
      "None: all images of a step. mmdetection: those of one GPU", low=1)

  anchor_samples: int = option(
      256, "R-CNN: anchors of an image that the loss of proposals is of", low=1)
  anchor_positives: float = option(
      0.5, "R-CNN: part of them that is positive, at most", low=0, high=1)
  train_candidates: int = option(
      2000, "R-CNN: anchors that a level keeps in training", low=1)
  proposal_iou: float = option(
      0.7, "R-CNN: of two proposals of a level with a higher IoU, the better "
      "one is kept", low=0, high=1)
  proposals: int = option(
      1000, "R-CNN: proposals of an image, the best ones", low=1)
  roi_iou: float = option(
      0.5, "R-CNN: a proposal with at least this IoU with an object is "
      "positive; the others are negative", above=0, high=1)
  roi_samples: int = option(
      512, "R-CNN: proposals and objects of an image that are trained on",
      low=1)
  roi_positives: float = option(
      0.25, "R-CNN: part of them that is positive, at most", low=0, high=1)
  object_mask_size: int = option(
      112, "Mask R-CNN, training: height and width in which the masks of "
      "larger objects are given; those of smaller ones are exact", low=1,
      high=2**14)

  scale: tuple[int, ...] = option(
      (1333, 800), "images are resized, keeping their ratio, to fit into this "
      "rectangle, longer side first", low=1, high=2**14, length=2)
  flip: float = option(
      0.5, "training: probability of a left-right flip", low=0, high=1)
  max_boxes: int = option(
      100, "training: objects of an image; further ones are left out, and "
      "counted", low=1, high=2**14)
  filter_empty: bool = option(
      True, "training: images without objects are left out")

  candidates: int = option(
      1000, "pairs of an anchor and a class that a level keeps; R-CNN: anchors",
      low=1)
  score_threshold: float = option(
      0.05, "detections have a higher score", low=0, high=1)
  nms_iou: float = option(
      0.5, "of two detections of a class with a higher IoU, the better one is "
      "kept", low=0, high=1)
  max_detections: int = option(100, "of an image, the best ones", low=1)
  mask_threshold: float = option(
      0.5, "Mask R-CNN: pixels of an object have at least this probability",
      low=0, high=1)

  @property
  def is_rcnn(self) -> bool:
    """Whether the head classifies proposals, and not anchors."""
    return self.head != "retinanet"

  @property
  def has_masks(self) -> bool:
    """Whether objects have masks, and not only boxes."""
    return self.head == "mask_rcnn"

  def filled(self) -> "Detection":
    """With the head's own values for those that are None."""
    return dataclasses.replace(self, **{
        key: value for key, value in _DEFAULTS.get(self.head, {}).items()
        if getattr(self, key) is None})

  @property
  def canvases(self) -> tuple[tuple[int, int], ...]:
    """Height and width that images are padded to: landscape, and portrait.

    An image that is as high as wide is on the first.
    """
    long, short = (-(-side // ALIGNED) * ALIGNED for side in self.scale)
    return tuple(dict.fromkeys(((short, long), (long, short))))

  @property
  def input_size(self) -> tuple[int, int]:
    return self.canvases[0]

  def check(self, cfg: "Experiment", files: bool) -> Iterator[str]:
    del files
    yield from base.check_images(cfg, "scale", *self.input_size)
    if self.scale[0] < self.scale[1]:
      yield (f"config.task.scale: {self.scale} has the shorter side first; "
             f"give ({self.scale[1]}, {self.scale[0]})")
    task = self.filled()
    low, high = task.negative_iou, task.positive_iou
    if low is not None and high is not None and low > high:
      yield (f"config.task.negative_iou: {low} is above "
             f"config.task.positive_iou = {high}")
    measure = cfg.checkpoint.best_metric or ""
    if measure.startswith("mask_") and not self.has_masks:
      yield (f"config.checkpoint.best_metric: {measure} is not measured with "
             f"config.task.head = {self.head!r}; mask_rcnn has masks")
    if not self.anchor_ratios:
      yield "config.task.anchor_ratios: is empty; give at least one"
    n = self.num_classes
    for key in ("class_names", "category_ids"):
      values = getattr(self, key)
      if None not in (values, n) and len(values) != n:
        yield (f"config.task.{key}: has {len(values)} values, but "
               f"config.task.num_classes is {n}")
      if values and len(set(values)) < len(values):
        yield f"config.task.{key}: has a value twice"
    if self.loss_group and cfg.train.batch_size % (
        self.loss_group * cfg.train.accumulate):
      yield (f"config.task.loss_group: {self.loss_group} images do not divide "
             f"the {cfg.train.batch_size} / {cfg.train.accumulate} of "
             "config.train.batch_size / config.train.accumulate")

  def check_model(self, settings: "Family") -> Iterator[str]:
    if settings.fixed_size:
      yield ("config.model.name: the model takes images of one size only, and "
             "detection has canvases of several; choose another model")
