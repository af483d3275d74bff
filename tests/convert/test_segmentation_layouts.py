"""mmsegmentation's names; tests/heads/test_golden_segmentation.py has more."""

import pathlib

import head_cases
import jax
import numpy as np
import parity_cases
import pytest
import segmenters
import torch_format

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.convert import adapt, files, layouts, segmentation

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "segmentation"


def tensors_of(name):
  return head_cases.weights(parity_cases.Golden.load(
      GOLDEN / f"{name}.npz").state_shapes)


def test_no_rule_of_a_head_is_dead(monkeypatch):
  built = [segmenters.build(case) for case in head_cases.CASES.values()]
  for family, known in list(segmentation.RULES.items()):
    for rule in known["mmseg"]:
      if rule.path.startswith(("backbone", "norm", "auxiliary")):
        continue
      monkeypatch.setitem(segmentation.RULES, family, {"mmseg": (rule,)})
      assert any(layouts.entries(family, "mmseg", layouts.flatten(shapes))
                 for _, of, shapes in built
                 if of.split("/")[0] == family.split("/")[0]), rule


def test_a_checkpoint_of_mmcv_is_read(tmp_path):
  """Weights, the optimizer's state, and plain data beside them."""
  name = "resnet50-upernet"
  tensors = tensors_of(name)
  optimizer = {"state": {0: {"step": 1, "exp_avg": torch_format.tensor(
      np.zeros(3, np.float32))}}, "param_groups": [{"params": [0]}]}
  path = tmp_path / "iter_40000.pth"
  path.write_bytes(torch_format.zipped({
      "meta": {"CLASSES": ("wall", "sky"), "PALETTE": [[120, 120, 120]],
               "config": "model = dict()", "epoch": 1, "iter": 40000,
               "hook_msgs": {}, "mmseg_version": "0.19.0"},
      "state_dict": {f"module.{key}": torch_format.tensor(value)
                     for key, value in tensors.items()},
      "optimizer": optimizer}))
  _, family, target = segmenters.build(head_cases.CASES[name])
  found = layouts.flatten(layouts.to_flax(family, files.read_tensors(path),
                                          target))
  want = layouts.flatten(layouts.to_flax(family, tensors, target))
  assert found.keys() == want.keys()
  assert all(np.array_equal(found[key], want[key]) for key in want)


def test_what_does_not_fit_is_listed():
  name = "poolformer_s12-semantic_fpn"
  tensors = tensors_of(name)
  _, family, target = segmenters.build(head_cases.CASES[name])
  del tensors["backbone.norm2.weight"]
  tensors["decode_head.extra"] = np.zeros(1)
  with pytest.raises(errors.WeightsError, match=r"backbone\.norm2\.weight is "
                     r"missing; decode_head\.extra has no place"):
    layouts.to_flax(family, tensors, target)


def test_position_embeddings_move_the_backbones_indices():
  """As in the official classifier, whose list of stages has them too."""
  model = metaformer_jax.create_model("metaformer_ppaa_s12_224",
                                      depths=(1,) * 4, dims=(32,) * 4)
  names = layouts.flatten(segmenters.shapes_of(model))
  of_model = layouts.entries("poolformer", "official", names)
  found = layouts.entries(
      "upernet/poolformer", "mmseg",
      [name.replace("params/", "params/backbone/") for name in names])
  assert {key for entry in found.values() for key in entry.keys} == {
      f"backbone.{key}" for entry in of_model.values() for key in entry.keys}


def test_other_classes_re_initialise_the_classifiers():
  name = "resnet50-upernet"
  _, family, target = segmenters.build(head_cases.CASES[name])
  flat = layouts.flatten(target)
  classifiers = {key for key in flat if "classifier/conv" in key}
  assert len(classifiers) == 4
  more = layouts.unflatten({
      key: jax.ShapeDtypeStruct((*leaf.shape[:-1], 9), leaf.dtype)
      if key in classifiers else leaf for key, leaf in flat.items()})

  def to_shape(name, value, shape):
    return adapt.to_shape(name, value, shape, image_size=(64, 64),
                          new_head=True)

  found = layouts.to_flax(family, tensors_of(name), more, to_shape)
  assert flat.keys() - layouts.flatten(found) == classifiers


@pytest.mark.parametrize("backbone", ["vit", "metaformer_baselines", None])
def test_others_have_our_names_only(backbone):
  layouts.check_layout("upernet/resnet", "mmseg")
  with pytest.raises(errors.WeightsError, match="layout 'mmseg' is not known"):
    layouts.check_layout(f"upernet/{backbone}", "mmseg")


def test_a_stem_of_three_convolutions_has_the_names_of_timm_and_openmmlab():
  """timm's resnet50c; OpenMMLab's resnet50_v1c."""
  target = segmenters.shapes_of(metaformer_jax.create_model(
      "resnet50", stem="3x3", num_classes=3, depths=(1,) * 4, widths=(4,) * 4))
  rng = np.random.default_rng(0)
  want = {name: rng.integers(0, 9, leaf.shape).astype(leaf.dtype)
          for name, leaf in layouts.flatten(target).items()}
  timm = layouts.to_torch("resnet", layouts.unflatten(want), "timm")
  renamed = {"conv1.0": "stem.0", "conv1.1": "stem.1", "conv1.3": "stem.3",
             "conv1.4": "stem.4", "conv1.6": "stem.6", "bn1": "stem.7"}
  openmmlab = {}
  for key, value in timm.items():
    module, _, leaf = key.rpartition(".")
    openmmlab[f"{renamed.get(module, module)}.{leaf}"] = value
  for layout, tensors in (("timm", timm), ("openmmlab", openmmlab)):
    assert layouts.recognize("resnet", tensors, want) == layout
    found = layouts.flatten(layouts.to_flax("resnet", tensors, target))
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name]) for name in want)


def test_weights_of_imagenet_start_a_dense_pvt(tmp_path, caplog):
  """All but the class token, the last norm and the head, which is logged."""
  settings = {"depths": (1,) * 4, "dims": (8, 12, 16, 24),
              "n_heads": (1, 2, 2, 3)}
  whole, dense = (
      segmenters.shapes_of(metaformer_jax.create_model(
          "pvt_tiny", num_classes=3, class_token=token, **settings))
      for token in (True, False))
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
      lambda x: rng.standard_normal(x.shape).astype(np.float32), whole)
  path = tmp_path / "pvt.safetensors"
  files.write_safetensors(
      path, layouts.to_torch("pvt", variables, "official"), {})
  dense["params"] = {k: v for k, v in dense["params"].items() if "stage" in k}
  with caplog.at_level("INFO"):
    found = pretrained.read(path, "pvt", whole, (64, 64), kept=dense)
  assert "not used: params/head/bias, params/head/kernel, params/norm/bias, " \
         "params/norm/scale, params/stage4/cls_token" in caplog.text
  found, want = layouts.flatten(found), layouts.flatten(variables)
  assert found.keys() == layouts.flatten(dense).keys()
  assert all(np.array_equal(found[key], want[key]) for key in found)
