"""Mask R-CNN from a folder of images to drawn masks, as users run it."""

import json
import os

import coco_tree
import dense_runs
import numpy as np
import pages
import pods
import pytest
import safetensors
import small_runs
from PIL import Image
from pycocotools import coco, cocoeval

import metaformer_jax
from metaformer_jax.data.sources import outlines

OPTIONS = {
    "model.name": "poolformer_s12", "model.depths": (1, 1, 1, 1),
    "model.dims": (8, 8, 16, 16), "model.layer_scale_init": 1.0,
    "task.head": "mask_rcnn", "task.fpn_dim": 16, "task.head_dim": 16,
    "task.head_depth": 1, "task.box_dim": 32, "task.scale": (128, 128),
    "task.max_boxes": 8, "task.train_candidates": 60, "task.candidates": 30,
    "task.proposals": 40, "task.anchor_samples": 64, "task.roi_samples": 32,
    "task.max_detections": 20, "task.object_mask_size": 48,
    "task.score_threshold": 0.001, "optim.base_lr": 0.64, "train.steps": 40,
    "eval.every_epochs": 20.0,
}
MEASURES = ("ap", "ap50", "ap75")
LOSSES = ("objectness_loss", "proposal_loss", "class_loss", "box_loss",
          "mask_loss")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  home = tmp_path_factory.mktemp("mask_rcnn")
  tree = coco_tree.make(home, n_train=14, n_val=7)
  return dense_runs.prepare(home, "coco", tree, "detection", OPTIONS)


@pytest.fixture(scope="module")
def run(home):
  """The workdir of a whole run."""
  return dense_runs.finished(home, home / "whole")


@pytest.mark.slow
def test_a_killed_run_ends_like_another(home, run):
  dense_runs.check_killed(home, run, "box_ap50")


@pytest.mark.slow
def test_evaluation_of_the_run(home, run):
  records = small_runs.records(run)
  for r in records:
    assert r["loss"] == pytest.approx(sum(r[name] for name in LOSSES))
  assert records[-1]["loss"] < 0.9 * records[0]["loss"]
  predictions = home / "predictions.json"
  found = json.loads(dense_runs.tool(
      "evaluate", f"--workdir={run}", f"--predictions={predictions}"))
  summary = pods.summary(run)
  path = home / "coco" / "annotations" / "instances_val2017.json"
  for kind, name, file in (
      ("bbox", "box", predictions),
      ("segm", "mask", predictions.with_suffix(".masks.json"))):
    # The written predictions have these measures, by pycocotools alone.
    truth = coco.COCO(os.fspath(path))
    theirs = cocoeval.COCOeval(truth, truth.loadRes(os.fspath(file)), kind)
    theirs.evaluate(), theirs.accumulate(), theirs.summarize()
    ours = [found[f"{name}_{measure}"] for measure in MEASURES]
    assert ours == [summary[f"{name}_{measure}"] for measure in MEASURES]
    np.testing.assert_allclose(theirs.stats[:3], ours, atol=2e-3)


@pytest.mark.slow
def test_files_of_no_predictions(home, run):
  """Both are written, so that none of an earlier evaluation stays."""
  file = home / "none.json"
  found = json.loads(dense_runs.tool(
      "evaluate", f"--workdir={run}", f"--predictions={file}",
      "--config.task.score_threshold=1"))
  assert found["box_ap"] == found["mask_ap"] == 0
  for path in (file, file.with_suffix(".masks.json")):
    assert json.loads(path.read_text()) == []


@pytest.mark.slow
def test_the_tree_itself_measures_the_same(home, run):
  dense_runs.check_tree_measures(run, "coco", home / "coco")


@pytest.mark.slow
def test_names_of_mmdetection_and_back(home, run):
  file = home / "run.safetensors"
  dense_runs.tool("convert", f"--input={run}", "--layout=mmdet",
                  f"--output={file}")
  with safetensors.safe_open(file, "numpy") as f:
    names = {*f.keys()}
  assert {"backbone.norm0.weight", "rpn_head.rpn_conv.weight",
          "roi_head.bbox_head.shared_fcs.0.weight",
          "roi_head.mask_head.upsample.weight",
          "roi_head.mask_head.conv_logits.bias"} <= names
  whole, read = (metaformer_jax.load(path) for path in (run, file))
  dense_runs.require_equal(whole.variables, read.variables)


@pytest.mark.slow
def test_predictions_as_pictures_and_json(home, run):
  folder = home / "coco" / "val2017"
  dense_runs.tool("predict", f"--weights={run}", folder, "--json",
                  f"--output={home / 'predicted'}")
  written = json.loads((home / "predicted" / "detections.json").read_text())
  loaded, n_found = metaformer_jax.load(run), 0
  for image in written["images"]:
    path = folder / image["file_name"]
    with (Image.open(path) as picture,
          Image.open(home / "predicted" / f"{path.stem}.overlay.png") as drawn):
      assert picture.size == drawn.size
    found, = loaded.predict(path)
    mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
    assert len(mine) == len(found["masks"])
    for annotation, mask in zip(mine, found["masks"]):
      decoded = outlines.decode(annotation["segmentation"], mask.shape)
      assert annotation["area"] == decoded.sum()
      # Another size of batch rounds otherwise: a pixel at 0.5 may change.
      assert (decoded != mask).mean() < 1e-3
    n_found += len(mine)
  assert n_found


@pytest.mark.slow
def test_the_page_in_python(home, run):
  """The Python of docs/detection.md, for an image with a detection."""
  loaded = metaformer_jax.load(run)
  path = next(path for path in sorted((home / "coco" / "val2017").iterdir())
              if len(loaded.predict(path)[0]["scores"]))
  found = pages.run_python(
      pages.ROOT / "docs" / "detection.md", {"metaformer_jax": metaformer_jax},
      [('"runs/coco"', repr(str(run))), ('"street.jpg"', repr(str(path)))])
  assert len(found["found"]["names"]) == len(found["found"]["boxes"])


@pytest.mark.slow
def test_processes_measure_what_one_does(run):
  dense_runs.check_processes_measure(run)


@pytest.mark.slow
def test_two_processes_train_like_one(home):
  # Later, rounding decides which of two proposals is kept.
  dense_runs.check_processes_train(home, steps=4)
