"""mmdetection's names; tests/heads/test_golden_detection.py has more."""

import pathlib

import detector_cases
import detectors
import jax
import numpy as np
import parity_cases
import pytest
import torch_format

from metaformer_jax import errors
from metaformer_jax.convert import adapt, detection, files, layouts

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "detection"
NAME = "poolformer_s12-retinanet"


def tensors_of(name):
  return detector_cases.weights(parity_cases.Golden.load(
      GOLDEN / f"{name}.npz").state_shapes)


def test_no_rule_of_the_head_is_dead(monkeypatch):
  _, family, target = detectors.build(detector_cases.CASES[NAME])
  names = layouts.flatten(target)
  for rule in detection.RULES[family]["mmdet"]:
    if not rule.path.startswith(("backbone", "norm")):
      monkeypatch.setitem(detection.RULES, family, {"mmdet": (rule,)})
      assert layouts.entries(family, "mmdet", names), rule


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


def test_other_classes_re_initialise_the_last_layer():
  _, family, target = detectors.build(detector_cases.CASES[NAME])
  flat = layouts.flatten(target)
  last = {f"params/head/class_out/{leaf}" for leaf in ("kernel", "bias")}
  more = layouts.unflatten({
      key: jax.ShapeDtypeStruct((*leaf.shape[:-1], 9 * 5), leaf.dtype)
      if key in last else leaf for key, leaf in flat.items()})

  def to_shape(name, value, shape):
    return adapt.to_shape(name, value, shape, image_size=(64, 64),
                          new_head=True)

  found = layouts.to_flax(family, tensors_of(NAME), more, to_shape)
  assert flat.keys() - layouts.flatten(found) == last


@pytest.mark.parametrize("backbone", ["vit", "metaformer_baselines", None])
def test_others_have_our_names_only(backbone):
  layouts.check_layout("retinanet/resnet", "mmdet")
  with pytest.raises(errors.WeightsError, match="layout 'mmdet' is not known"):
    layouts.check_layout(f"retinanet/{backbone}", "mmdet")
