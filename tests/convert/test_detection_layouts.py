"""mmdetection's names; tests/heads/test_golden_*.py have more."""

import dataclasses

import detector_cases
import detectors
import jax
import numpy as np
import parity_cases
import pytest
import rcnn_cases
import torch_format

from metaformer_jax import errors
from metaformer_jax.convert import adapt, detection, files, layouts

NAME, MASKS = "poolformer_s12-retinanet", "poolformer_s12-mask_rcnn"


def tensors_of(name):
  return detector_cases.weights(parity_cases.Golden.load(
      detectors.GOLDEN / f"{name}.npz").state_shapes)


@pytest.mark.parametrize("case", [
    detector_cases.CASES[NAME], rcnn_cases.CASES[MASKS]], ids=lambda c: c.name)
def test_no_rule_of_the_head_is_dead(case, monkeypatch):
  _, family, target = detectors.build(case)
  names = layouts.flatten(target)
  for rule in detection.RULES[family]["mmdet"]:
    if not rule.path.startswith(("backbone", "norm")):
      monkeypatch.setitem(detection.RULES, family, {"mmdet": (rule,)})
      assert layouts.entries(family, "mmdet", names), rule


def test_faster_rcnn_is_mask_rcnn_without_masks():
  tensors = tensors_of(MASKS)
  case = dataclasses.replace(rcnn_cases.CASES[MASKS], head="faster_rcnn")
  _, family, target = detectors.build(case)
  with pytest.raises(errors.WeightsError, match=(
      r"roi_head\.mask_head\.conv_logits\.bias has no place; .*"
      r"roi_head\.mask_head\.upsample\.weight has no place$")):
    layouts.to_flax(family, tensors, target)
  tensors = {key: x for key, x in tensors.items() if "mask_head" not in key}
  found = layouts.to_flax(family, tensors, target)
  _, family, target = detectors.build(rcnn_cases.CASES[MASKS])
  want = layouts.flatten(layouts.to_flax(family, tensors_of(MASKS), target))
  for key, x in layouts.flatten(found).items():
    assert np.array_equal(x, want[key]), key


def test_a_checkpoint_of_mmcv_is_read(tmp_path):
  """Weights, and plain data beside them."""
  tensors = tensors_of(NAME)
  path = tmp_path / "epoch_12.pth"
  path.write_bytes(torch_format.zipped({
      "meta": {"CLASSES": ("person", "bicycle"), "config": "model = dict()",
               "epoch": 12, "iter": 87960, "hook_msgs": {},
               "mmdet_version": "2.19.0", "seed": None},
      "state_dict": {key: torch_format.tensor(value)
                     for key, value in tensors.items()}}))
  _, family, target = detectors.build(detector_cases.CASES[NAME])
  found = files.read_tensors(path)
  assert layouts.recognize(family, found, layouts.flatten(target)) == "mmdet"
  found, want = (layouts.flatten(layouts.to_flax(family, read, target))
                 for read in (found, tensors))
  assert found.keys() == want.keys()
  assert all(np.array_equal(found[key], want[key]) for key in want)


def test_what_does_not_fit_is_listed():
  tensors = tensors_of(NAME)
  _, family, target = detectors.build(detector_cases.CASES[NAME])
  del tensors["neck.fpn_convs.4.conv.bias"]
  tensors["backbone.norm0.weight"] = np.zeros(8, np.float32)
  with pytest.raises(errors.WeightsError, match=(
      r"neck\.fpn_convs\.4\.conv\.bias is missing; "
      r"backbone\.norm0\.weight has no place")):
    layouts.to_flax(family, tensors, target)


@pytest.mark.parametrize("case,layers", [
    (detector_cases.CASES[NAME], ["head/class_out"]),
    (rcnn_cases.CASES[MASKS], ["box_head/class_out", "box_head/box_out",
                               "mask_head/mask_out"])], ids=["anchors", "rcnn"])
def test_other_classes_re_initialise_the_last_layers(case, layers):
  _, family, target = detectors.build(case)
  last = {f"params/{layer}/{leaf}" for layer in layers
          for leaf in ("kernel", "bias")}

  def with_more(key, leaf):
    if key not in last:
      return leaf
    return jax.ShapeDtypeStruct((*leaf.shape[:-1], 45), leaf.dtype)

  flat = layouts.flatten(target)
  more = layouts.unflatten({k: with_more(k, v) for k, v in flat.items()})

  def to_shape(name, value, shape):
    return adapt.to_shape(name, value, shape, image_size=(64, 64),
                          new_head=True)

  found = layouts.to_flax(family, tensors_of(case.name), more, to_shape)
  assert flat.keys() - layouts.flatten(found) == last


@pytest.mark.parametrize("backbone", ["vit", "metaformer_baselines", None])
def test_others_have_our_names_only(backbone):
  layouts.check_layout("retinanet/resnet", "mmdet")
  with pytest.raises(errors.WeightsError, match="layout 'mmdet' is not known"):
    layouts.check_layout(f"retinanet/{backbone}", "mmdet")
