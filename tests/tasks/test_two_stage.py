"""Mask R-CNN as a whole: mmdetection's losses, gradients and detections.

Of tests/golden/make_rcnn.py, whose samplers take all that there is.
"""

import detector_cases
import detectors
import jax
import numpy as np
import parity_cases
import pytest
import rcnn_cases

from metaformer_jax.config import schema, tasks
from metaformer_jax.convert import layouts
from metaformer_jax.evaluation import masks
from metaformer_jax.tasks import two_stage

SIZES = detector_cases.SIZES
LOSSES = {"objectness_loss": "loss_rpn_cls", "proposal_loss": "loss_rpn_bbox",
          "class_loss": "loss_cls", "box_loss": "loss_bbox",
          "mask_loss": "loss_mask"}


class OnFloats(two_stage.TwoStage):
  """For images that are normalised, with the mask of what is no padding."""

  def _extract(self, variables, batch, **kwargs):
    return self.model.apply(variables, batch["image"], mask=batch["inside"],
                            method="extract", **kwargs)


def load(name):
  golden, model, family, variables = detectors.load(rcnn_cases.CASES[name])
  section = tasks.Detection(
      head="mask_rcnn", num_classes=detector_cases.NUM_CLASSES,
      anchor_samples=rcnn_cases.ANCHOR_SAMPLES,
      roi_samples=rcnn_cases.ROI_SAMPLES,
      train_candidates=rcnn_cases.CANDIDATES, candidates=rcnn_cases.CANDIDATES,
      proposals=rcnn_cases.PROPOSALS,
      max_detections=rcnn_cases.MAX_DETECTIONS).filled()
  return golden, OnFloats(schema.Experiment(task=section),
                          model), family, variables


def training_batch(n_boxes=6):
  """The images of the first size, on a larger canvas; and their objects."""
  (height, width), canvas = SIZES[0], detectors.CANVASES[0]
  n, side = len(detector_cases.BOXES), max(canvas)
  batch = {"image": np.full((n, *canvas, 3), 1e3, np.float32),
           "inside": np.zeros((n, *canvas), bool),
           "size": np.full((n, 2), (height, width), np.int32),
           "boxes": np.zeros((n, n_boxes, 4), np.float32),
           "labels": np.full((n, n_boxes), -1, np.int32),
           "masks": np.zeros((n, n_boxes, side, side), np.uint8),
           "frames": np.zeros((n, n_boxes, 4), np.float32)}
  batch["image"][:, :height, :width] = detector_cases.images(SIZES[0])[:n]
  batch["inside"][:, :height, :width] = True
  for i, (boxes, labels) in enumerate(zip(detector_cases.BOXES,
                                          detector_cases.LABELS)):
    k = len(boxes)
    batch["boxes"][i, :k], batch["labels"][i, :k] = boxes, labels
    batch["masks"][i, :k, :height, :width] = rcnn_cases.masks(i)
    batch["frames"][i, :k] = (0, 0, side, side)
  return batch


@pytest.mark.slow
@pytest.mark.parametrize("name", rcnn_cases.CASES)
def test_losses_and_gradients(name):
  golden, detector, family, variables = load(name)

  @jax.jit
  def run(params, batch):
    def total(params):
      losses, _ = detector.loss({**variables, "params": params}, batch,
                                {"sampling": jax.random.key(0)}, train=True)
      return sum(losses.values()), losses

    return jax.value_and_grad(total, has_aux=True)(params)

  (_, losses), gradients = run(variables["params"], training_batch())
  for ours, theirs in LOSSES.items():
    np.testing.assert_allclose(losses[ours], golden.meta["losses"][theirs],
                               rtol=2e-5, err_msg=ours)
  found = layouts.to_torch(family, {"params": gradients}, "mmdet")
  floor = 1e-5 * max(want[0] for want in golden.gradients.values())
  for key, want in golden.gradients.items():
    np.testing.assert_allclose(
        parity_cases.sketch(key, found[key]), want, rtol=0,
        atol=1e-4 * want[0] + floor, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", rcnn_cases.CASES)
def test_detections(name):
  """The same boxes, scores and labels, in the same order, and their masks."""
  golden, detector, _, variables = load(name)
  size, canvas = SIZES[-1], detectors.CANVASES[-1]
  image = np.full((1, *canvas, 3), 1e3, np.float32)
  image[:, :size[0], :size[1]] = detector_cases.images(size)[:1]
  inside = np.zeros((1, *canvas), bool)
  inside[:, :size[0], :size[1]] = True
  found = jax.jit(detector.predict)(variables, {
      "image": image, "inside": inside,
      "size": np.array([detector_cases.IMAGE_SIZE], np.int32)})
  found = {key: np.asarray(x[0]) for key, x in found.items()}
  want, wanted_masks = (golden.features[size][key]
                        for key in ("detections", "masks"))
  n = len(want)
  assert found["valid"].sum() == n > 10
  factors = np.divide(rcnn_cases.ORIGINAL_SIZE, detector_cases.IMAGE_SIZE)
  boxes = found["boxes"][:n] * np.tile(factors[::-1], 2).astype(np.float32)
  np.testing.assert_allclose(boxes, want[:, :4], atol=2e-3)
  np.testing.assert_allclose(found["scores"][:n], want[:, 4], atol=3e-5)
  np.testing.assert_array_equal(found["labels"][:n], want[:, 5])
  pasted = np.array(list(masks.paste(
      found["masks"][:n], boxes, rcnn_cases.ORIGINAL_SIZE, 0.5)))
  # Where the probability is 0.5, the last digits of a box decide.
  assert (pasted != wanted_masks).sum() <= 10 < wanted_masks.sum()
