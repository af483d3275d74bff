"""Detectors that judge every anchor: RetinaNet."""

import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn

from metaformer_jax.config.schema import Experiment
from metaformer_jax.ops import dense_detection
from metaformer_jax.tasks import base, canvases


@dataclasses.dataclass(frozen=True)
class OneStage:
  """Loss and detections of a `heads.detector.Detector`.

  Batches are those of `tasks.detection`.
  """

  cfg: Experiment
  model: nn.Module

  rng_names = ("dropout", "drop_path")

  def outputs(self, variables: base.Variables, batch: base.Batch,
              **kwargs) -> Any:
    """What the model gives for the images of a batch, before any detection."""
    x, mask = canvases.inputs(self.cfg, batch)
    return self.model.apply(variables, x, mask=mask, **kwargs)

  def loss(self, variables, batch, rngs, train):
    """The losses by name, and the new value of "batch_stats"."""
    task = self.cfg.task
    outputs, updates = self.outputs(variables, batch, train=train, rngs=rngs,
                                    mutable=["batch_stats"])
    return dense_detection.loss(
        outputs["logits"], outputs["deltas"], self._anchors(batch),
        outputs["mask"], batch["boxes"], batch["labels"],
        positive_iou=task.positive_iou, negative_iou=task.negative_iou,
        alpha=task.focal_alpha, gamma=task.focal_gamma,
        loss_group=task.loss_group), updates

  def predict(self, variables, batch):
    return self.detections(self.outputs(variables, batch), batch)

  def detections(self, outputs, batch):
    """Detections by descending score, in pixels of the canvas."""
    task = self.cfg.task
    detect = functools.partial(
        dense_detection.detect, anchors=self._anchors(batch),
        candidates=task.candidates, score_threshold=task.score_threshold,
        nms_iou=task.nms_iou, max_detections=task.max_detections)
    return jax.vmap(lambda logits, deltas, mask, size: detect(
        logits, deltas, is_anchor=mask, size=size))(
            outputs["logits"], outputs["deltas"], outputs["mask"],
            batch["size"])

  def _anchors(self, batch):
    return canvases.anchor_levels(self.cfg.task, batch, self.model.strides)
