"""Detection from a folder of images to drawn boxes, as users run it.

A tree in COCO's form is prepared, trained on, killed, resumed, evaluated and
predicted; and evaluated by several processes.
"""

import io
import json
import os

import benchmark_detection
import coco_tree
import dense_runs
import numpy as np
import pods
import pytest
import safetensors
import small_runs
from PIL import Image
from pycocotools import coco, cocoeval

import metaformer_jax

OPTIONS = {
    "model.name": "poolformer_s12", "model.depths": (1, 1, 1),
    "model.dims": (8, 16, 24),
    "model.token_mixers": ("pooling", "pooling", "pooling"),
    "model.layer_scale_init": 1.0,
    "task.fpn_dim": 16, "task.head_dim": 16, "task.head_depth": 1,
    "task.scale": (128, 96), "task.max_boxes": 8, "task.candidates": 50,
    "task.score_threshold": 0.001,
    "optim.base_lr": 0.64, "train.steps": 60, "eval.every_epochs": 20.0,
}
MEASURES = ("box_ap", "box_ap50", "box_ap75")

# The default tests run Mask R-CNN in this way.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with coco/, prepared/ and cfg.json."""
  home = tmp_path_factory.mktemp("detection")
  tree = coco_tree.make(home, n_train=14, n_val=7)
  return dense_runs.prepare(home, "coco", tree, "detection", OPTIONS)


@pytest.fixture(scope="module")
def run(home):
  """The workdir of a whole run."""
  return dense_runs.finished(home, home / "whole")


def test_a_killed_run_ends_like_another(home, run):
  dense_runs.check_killed(home, run, "box_ap")


def test_both_canvases_and_what_does_not_fit_are_counted(run):
  found = small_runs.records(run)
  # Some image has more than 8 objects: 12.
  assert 0 < np.mean([r["overflow"] for r in found]) < 4
  assert all(np.isfinite(r["loss"]) for r in found)


def test_evaluation_of_the_run(home, run):
  predictions = home / "predictions.json"
  found = json.loads(dense_runs.tool(
      "evaluate", f"--workdir={run}", f"--predictions={predictions}"))
  summary = pods.summary(run)
  assert all(found[name] == summary[name] for name in MEASURES)
  assert found["n_examples"] == 7 and found["box_ap"] > 0
  # The tree itself has the same pixels.
  tree = json.loads(dense_runs.tool(
      "evaluate", f"--workdir={run}", "--config.data.source=coco",
      f"--config.data.path={home / 'coco'}"))
  assert tree == found
  # The written predictions have these measures, by pycocotools alone.
  path = home / "coco" / "annotations" / "instances_val2017.json"
  truth = coco.COCO(os.fspath(path))
  theirs = cocoeval.COCOeval(truth, truth.loadRes(os.fspath(predictions)),
                             "bbox")
  theirs.evaluate(), theirs.accumulate(), theirs.summarize()
  np.testing.assert_allclose(theirs.stats[:3],
                             [found[name] for name in MEASURES], atol=2e-3)


def test_the_classes_are_in_the_table(run):
  head, *rows = dense_runs.tool("evaluate", f"--workdir={run}", "--per_class",
                                "--csv").splitlines()
  assert head.startswith("class,name,") and len(rows) == 3
  assert [row.split(",")[1] for row in rows] == list(coco_tree.CLASS_NAMES)


def test_names_of_mmdetection_and_back(home, run):
  file = home / "run.safetensors"
  dense_runs.tool("convert", f"--input={run}", "--layout=mmdet",
                  f"--output={file}")
  with safetensors.safe_open(file, "numpy") as f:
    names = {*f.keys()}
  assert {"backbone.patch_embed.proj.weight", "neck.fpn_convs.1.conv.bias",
          "bbox_head.cls_convs.0.conv.weight", "bbox_head.retina_reg.bias",
          } <= names
  whole, read = (metaformer_jax.load(path) for path in (run, file))
  dense_runs.require_equal(whole.variables, read.variables)
  paths = sorted((home / "coco" / "val2017").iterdir())
  for a, b in zip(whole.predict(paths), read.predict(paths[::-1])[::-1]):
    np.testing.assert_allclose(a["boxes"], b["boxes"], atol=1e-3)


def test_a_run_starts_from_all_of_another(run):
  dense_runs.check_warm_start(run, {"params/head/class_out/kernel",
                                    "params/head/class_out/bias"})


def test_predictions_as_pictures_and_json(home, run):
  folder = home / "coco" / "val2017"
  lines = dense_runs.tool("predict", f"--weights={run}", folder, "--json",
                          f"--output={home / 'predicted'}").splitlines()
  assert len(lines) == 7
  written = json.loads((home / "predicted" / "detections.json").read_text())
  loaded = metaformer_jax.load(run)
  n_found = 0
  for image, line in zip(written["images"], map(json.loads, lines)):
    assert os.path.basename(line["image"]) == image["file_name"]
    stem = os.path.splitext(image["file_name"])[0]
    with (Image.open(line["image"]) as picture,
          Image.open(home / "predicted" / f"{stem}.overlay.png") as overlay):
      assert (image["width"], image["height"]) == picture.size == overlay.size
    found, = loaded.predict(line["image"])
    mine = [a for a in written["annotations"] if a["image_id"] == image["id"]]
    assert len(mine) == len(found["scores"])
    for annotation, box, label in zip(mine, found["boxes"], found["classes"]):
      x, y, width, height = annotation["bbox"]
      np.testing.assert_allclose([x, y, x + width, y + height], box, atol=0.02)
      assert annotation["category_id"] == coco_tree.CATEGORY_IDS[label]
    best = line["predictions"]
    assert [row["name"] for row in best] == found["names"][:len(best)]
    n_found += len(mine)
  assert n_found
  # In memory as from the file.
  encoded = folder.joinpath(written["images"][0]["file_name"]).read_bytes()
  array = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))
  one, two = loaded.predict(array), loaded.predict(encoded)
  np.testing.assert_array_equal(one[0]["boxes"], two[0]["boxes"])


def test_processes_measure_what_one_does(run):
  dense_runs.check_processes_measure(run)


def test_two_processes_train_like_one(home):
  dense_runs.check_processes_train(home, steps=12)


@pytest.mark.slow
def test_the_benchmark_measures_what_the_task_is():
  found = benchmark_detection.ours(64, 96, batch=1, repeats=1)
  assert found.keys() == {"training step", "network", "post-processing",
                          "detections"}
  assert all(value > 0 for value in found.values())
