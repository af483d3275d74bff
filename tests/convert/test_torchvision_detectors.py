"""Weights of torchvision's Mask R-CNN: names, order of classes, outputs.

The outputs are those of tests/golden/make_torchvision.py.
"""

import re

import detector_cases
import detectors
import jax
import numpy as np
import parity_cases
import pytest
import rcnn_cases
import segmenters

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import coco
from metaformer_jax.convert import layouts
from metaformer_jax.heads import detector

FAMILY = "mask_rcnn/resnet"
BACKGROUND = 80


@pytest.fixture(scope="module")
def golden():
  return parity_cases.Golden.load(
      detectors.GOLDEN / "resnet50-mask_rcnn-torchvision.npz")


@pytest.fixture(scope="module")
def tensors(golden):
  return detector_cases.weights(golden.state_shapes)


def build(num_classes):
  """The model, and its variables' shapes."""
  dim = detector_cases.FPN_DIM
  model = detector.create(
      metaformer_jax.create_model("resnet50", num_classes=0,
                                  depths=(1, 1, 1, 1)),
      detectors.section(
          head="mask_rcnn", num_classes=num_classes, fpn_dim=dim, head_dim=dim,
          head_depth=2, box_dim=detector_cases.BOX_DIM, anchor_octaves=1))
  return model, segmenters.shapes_of(model)


def with_old_names(tensors):
  """As files from before version 0.13, which all published ones are."""
  found = {}
  for key, value in tensors.items():
    key = re.sub(r"(_blocks\.\d)\.0\.", r"\1.", key)
    key = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    key = re.sub(r"mask_head\.(\d)\.0\.", lambda found: (
        f"mask_head.mask_fcn{int(found[1]) + 1}."), key)
    found[key] = value
  return found


def test_outputs_with_the_classes_of_coco(golden, tensors):
  model, target = build(80)
  variables = layouts.to_flax(FAMILY, tensors, target)
  size = detector_cases.SIZES[0]
  want = golden.features[size]
  found = jax.jit(model.apply)(variables, detector_cases.images(size)[:1])
  judged = np.concatenate([
      np.concatenate([logits[..., None], deltas], -1)
      for logits, deltas in zip(found["logits"], found["deltas"])], 1)
  logits, deltas = model.apply(variables, rcnn_cases.features(7),
                               method="boxes")
  masks = model.apply(variables, rcnn_cases.features(14), method="masks")
  ids = list(coco.CATEGORY_IDS)
  theirs = want["box_head"][:, :91]
  boxes = want["box_head"][:, 91:].reshape(-1, 91, 4)
  for got, expected in (
      (judged, golden.logits[size]), (logits[:, BACKGROUND], theirs[:, 0]),
      (logits[:, :BACKGROUND], theirs[:, ids]), (deltas, boxes[:, ids]),
      (masks[:, ::9, ::9], want["mask_head"][..., ids])):
    np.testing.assert_allclose(got, expected, rtol=0,
                               atol=1e-5 * np.abs(expected).max())


def test_names_of_published_files(tensors):
  old = with_old_names(tensors)
  assert old.keys() != tensors.keys()
  _, target = build(80)
  assert layouts.recognize(FAMILY, old, layouts.flatten(target)) == (
      "torchvision")
  found, want = (layouts.flatten(layouts.to_flax(FAMILY, x, target))
                 for x in (old, tensors))
  assert all(np.array_equal(found[key], want[key]) for key in want)


@pytest.mark.parametrize("n", [90, 3])
def test_all_classes_of_other_files(tensors, n):
  """Of a model with as many; only 80 of the 90 are COCO's."""
  changed = dict(tensors)
  last = "roi_heads.box_predictor.cls_score.bias"
  for layer, width in (("box_predictor.cls_score", 1),
                       ("box_predictor.bbox_pred", 4),
                       ("mask_predictor.mask_fcn_logits", 1)):
    for leaf in ("weight", "bias"):
      key = f"roi_heads.{layer}.{leaf}"
      changed[key] = changed[key][:(n + 1) * width]
  _, target = build(n)
  found = layouts.flatten(layouts.to_flax(FAMILY, changed, target))
  np.testing.assert_array_equal(found["params/box_head/class_out/bias"],
                                np.roll(changed[last], -1))
  np.testing.assert_array_equal(
      found["params/box_head/box_out/bias"],
      changed["roi_heads.box_predictor.bbox_pred.bias"][4:])


def test_what_does_not_fit_is_listed(tensors):
  changed = with_old_names(tensors)
  changed["roi_heads.box_predictor.bbox_pred.bias"] = np.zeros(7, np.float32)
  changed["roi_heads.box_predictor.cls_score.bias"] = np.zeros(0, np.float32)
  changed["rpn.head.conv.0.0.bias"] = changed["rpn.head.conv.bias"]
  del changed["roi_heads.mask_head.mask_fcn2.bias"]
  _, target = build(80)
  with pytest.raises(errors.WeightsError) as found:
    layouts.to_flax(FAMILY, changed, target)
  for part in (r"bbox_pred.bias is [7], not [320]",
               r"cls_score.bias is [0], not [81]",
               r"roi_heads.mask_head.1.0.bias is missing",
               r"rpn.head.conv.bias has no place"):
    assert part in str(found.value)


def test_the_layout_is_not_written():
  with pytest.raises(errors.WeightsError, match="'torchvision' is not known"):
    layouts.check_layout(FAMILY, "torchvision")


