"""Detectors that classify proposals: Faster R-CNN and Mask R-CNN."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax.config.schema import Experiment
from metaformer_jax.heads import rcnn
from metaformer_jax.ops import masks, proposals, region_detection, roi_align
from metaformer_jax.tasks import base, canvases


@dataclasses.dataclass(frozen=True)
class TwoStage:
  """Losses and detections of a `heads.rcnn.RCNN`.

  The network proposes boxes. A head predicts their classes, and more exact
  boxes; another one predicts masks. Training uses a sample of the proposals.
  Batches are those of `tasks.detection`.
  """

  cfg: Experiment
  model: nn.Module

  rng_names = ("dropout", "drop_path", "sampling")

  def loss(self, variables, batch, rngs, train):
    """The losses by name, and the new value of "batch_stats"."""
    task, (boxes, labels) = self.cfg.task, (batch["boxes"], batch["labels"])
    rngs = dict(rngs)
    anchor_key, region_key = jax.random.split(rngs.pop("sampling"))
    features, updates = self._extract(variables, batch, train=train, rngs=rngs,
                                      mutable=["batch_stats"])
    losses = proposals.proposal_loss(
        anchor_key, features["logits"], features["deltas"],
        self._anchors(batch), features["mask"], boxes, labels,
        positive_iou=task.positive_iou, negative_iou=task.negative_iou,
        n_samples=task.anchor_samples, positive_fraction=task.anchor_positives,
        loss_group=task.loss_group)
    regions = self._sampled(region_key, features, batch)
    logits, deltas = self._boxes(variables, features, regions["boxes"],
                                 regions["is_valid"])
    losses |= region_detection.box_loss(
        logits, deltas, regions, boxes, labels, loss_group=task.loss_group)
    if task.has_masks:
      losses["mask_loss"] = self._mask_loss(variables, features, regions, batch)
    return losses, updates

  def _sampled(self, key, features, batch):
    """Proposals and objects that the heads are trained on, of each image."""
    task = self.cfg.task
    found = self._proposals(features, batch, task.train_candidates)
    sample = functools.partial(
        region_detection.sample_rois, iou=task.roi_iou, n=task.roi_samples,
        positive_fraction=task.roi_positives,
        # As in mmdetection's configs of the two.
        low_quality=task.has_masks)
    return jax.vmap(sample)(
        jax.random.split(key, len(batch["boxes"])), found["boxes"],
        found["valid"], batch["boxes"], batch["labels"])

  def _mask_loss(self, variables, features, regions, batch):
    task = self.cfg.task
    # Positive ones come first.
    n = max(int(task.roi_samples * task.roi_positives), 1)
    boxes, index, positive = (
        regions[key][:, :n] for key in ("boxes", "index", "is_positive"))
    logits = self._masks(variables, features, boxes, positive)
    targets = jax.vmap(masks.targets)(
        batch["masks"], batch["frames"], index, boxes,
        canvases.padded(batch["size"]))
    return region_detection.mask_loss(
        logits, targets, jnp.take_along_axis(batch["labels"], index, 1),
        positive, loss_group=task.loss_group)

  def predict(self, variables, batch):
    """Detections by descending score, in pixels of the canvas.

    With "masks": float32 [B, K, 28, 28], the probability that a cell of the
    box, divided into that many, is of the object.
    """
    task = self.cfg.task
    features = self._extract(variables, batch)
    regions = self._proposals(features, batch, task.candidates)
    logits, deltas = self._boxes(variables, features, regions["boxes"],
                                 regions["valid"])
    found = jax.vmap(functools.partial(
        region_detection.detect, score_threshold=task.score_threshold,
        nms_iou=task.nms_iou, max_detections=task.max_detections))(
            logits, deltas, regions["boxes"], regions["valid"], batch["size"])
    if task.has_masks:
      logits = self._masks(variables, features, found["boxes"], found["valid"])
      label = jnp.maximum(found["labels"], 0)[..., None, None, None]
      found["masks"] = jax.nn.sigmoid(
          jnp.take_along_axis(logits, label, -1)[..., 0])
    return found

  def _proposals(self, features, batch, candidates):
    task = self.cfg.task
    propose = functools.partial(
        proposals.propose, anchors=self._anchors(batch), candidates=candidates,
        nms_iou=task.proposal_iou, n_max=task.proposals)
    return jax.vmap(lambda logits, deltas, mask, size: propose(
        logits, deltas, is_anchor=mask, size=size))(
            features["logits"], features["deltas"], features["mask"],
            batch["size"])

  def _extract(self, variables, batch, **kwargs) -> Any:
    x, mask = canvases.inputs(self.cfg, batch)
    return self.model.apply(variables, x, mask=mask, method="extract", **kwargs)

  def _boxes(self, variables, features, boxes, is_box):
    pooled = self._pooled(features, boxes, is_box, rcnn.BOX_SIZE)
    return self.model.apply(variables, pooled, method="boxes")

  def _masks(self, variables, features, boxes, is_box):
    pooled = self._pooled(features, boxes, is_box, rcnn.MASK_SIZE)
    return self.model.apply(variables, pooled, method="masks")

  def _pooled(self, features, boxes, is_box, n):
    """The features of each box, [B, R, n, n, C].

    They are from all maps but the last one, which is for proposals only.
    """
    strides = self.model.strides[:-1]
    align = functools.partial(roi_align.roi_align, strides=strides, out=n)
    return jax.vmap(lambda maps, sizes, boxes, is_box: align(
        maps, sizes, boxes=boxes, is_box=is_box))(
            features["maps"][:-1], features["sizes"][:, :-1], boxes, is_box)

  def _anchors(self, batch: base.Batch):
    return canvases.anchor_levels(self.cfg.task, batch, self.model.strides)
