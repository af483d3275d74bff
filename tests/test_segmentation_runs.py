"""Segmentation from a folder of images to coloured pictures, as users run it.

A tree in ADE20K's form is prepared, trained on, killed, resumed, evaluated and
predicted; and evaluated by several processes.
"""

import csv
import json
import os

import ade_tree
import dense_runs
import numpy as np
import pages
import pods
import pytest
import safetensors
from PIL import Image

import metaformer_jax
from metaformer_jax.config import ade20k
from metaformer_jax.tasks import drawing

OPTIONS = {
    "model.name": "poolformer_s12", "model.depths": (1, 1),
    "model.dims": (8, 16), "model.token_mixers": ("pooling", "pooling"),
    "task.fpn_dim": 8, "task.head_dim": 8, "task.crop_size": (32, 32),
    "task.scale": (96, 64), "task.eval_canvases": 2,
    "optim.base_lr": 0.5, "train.steps": 40, "eval.every_epochs": 10.0,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with tree/, prepared/ and cfg.json."""
  home = tmp_path_factory.mktemp("segmentation")
  tree = ade_tree.make(home / "tree", n_train=16, n_val=5)
  return dense_runs.prepare(home, "ade20k", tree, "segmentation", OPTIONS)


@pytest.fixture(scope="module")
def run(home):
  """The workdir of a whole run."""
  return dense_runs.trained(home, home / "whole")


@pytest.mark.slow
def test_a_killed_run_ends_like_another(home):
  whole = dense_runs.finished(home, home / "unbroken")
  dense_runs.check_killed(home, whole, "miou")


def test_evaluation_of_the_run(run):
  table = dense_runs.tool("evaluate", f"--workdir={run}", "--per_class",
                          "--csv")
  head, *rows = table.splitlines()
  assert head == "class,name,iou,accuracy,pixels" and len(rows) == 150
  assert rows[16].split(",")[:2] == ["16", "mountain"]
  ious, accuracies, pixels = (
      np.array([float(value or "nan") for value in column])
      for column in list(zip(*csv.reader(rows)))[2:])
  summary = pods.summary(run)
  assert summary["n_examples"] == 5
  assert np.nanmean(ious) == pytest.approx(summary["miou"])
  assert np.nanmean(accuracies) == pytest.approx(summary["mean_accuracy"])
  assert np.nansum(accuracies * pixels) / pixels.sum() == pytest.approx(
      summary["pixel_accuracy"])


@pytest.mark.slow
def test_the_tree_itself_measures_the_same(home, run):
  dense_runs.check_tree_measures(run, "ade20k", home / "tree")


@pytest.mark.slow
def test_names_of_mmsegmentation_and_back(home, run):
  file = home / "run.safetensors"
  dense_runs.tool("convert", f"--input={run}", "--layout=mmseg",
                  f"--output={file}")
  with safetensors.safe_open(file, "numpy") as f:
    names = {*f.keys()}
  assert {"backbone.patch_embed.proj.weight", "backbone.norm0.weight",
          "neck.fpn_convs.1.conv.bias", "decode_head.scale_heads.1.0.bn.bias",
          "decode_head.conv_seg.weight"} <= names
  whole, read = (metaformer_jax.load(path) for path in (run, file))
  dense_runs.require_equal(whole.variables, read.variables)
  images = home / "tree" / "ADEChallengeData2016" / "images" / "validation"
  paths = sorted(images.iterdir())
  for a, b in zip(whole.predict(paths), read.predict(paths[::-1])[::-1]):
    np.testing.assert_array_equal(a["label_map"], b["label_map"])


def test_a_run_starts_from_all_of_another(run):
  dense_runs.check_warm_start(run, {
      "params/head/classifier/conv/kernel", "params/head/classifier/conv/bias"})


@pytest.mark.slow
def test_pictures_of_predictions(home, run):
  images = home / "tree" / "ADEChallengeData2016" / "images" / "validation"
  lines = dense_runs.tool("predict", f"--weights={run}", images, "--json",
                          f"--output={home / 'predicted'}").splitlines()
  assert len(lines) == 5
  for line in map(json.loads, lines):
    stem = os.path.splitext(os.path.basename(line["image"]))[0]
    labels = np.asarray(Image.open(home / "predicted" / f"{stem}.labels.png"))
    picture = Image.open(line["image"])
    assert labels.shape == picture.size[::-1]
    first = line["predictions"][0]
    assert first["area"] == pytest.approx((labels == first["class"]).mean())
    assert first["name"] == ade20k.CLASSES[first["class"]]
    overlay = Image.open(home / "predicted" / f"{stem}.overlay.png")
    assert overlay.width > picture.width
    mixed = 0.45 * np.asarray(picture.convert("RGB"), float) + (
        0.55 * drawing.colours_of(labels))
    top_left = np.asarray(overlay)[:picture.height, :picture.width]
    assert np.abs(top_left - mixed).max() <= 1


@pytest.mark.slow
def test_the_page_in_python(home, run):
  """The Python of docs/segmentation.md."""
  images = home / "tree" / "ADEChallengeData2016" / "images" / "validation"
  path = min(images.iterdir())
  found = pages.run_python(
      pages.ROOT / "docs" / "segmentation.md",
      {"metaformer_jax": metaformer_jax},
      [('"runs/ade20k"', repr(str(run))), ('"street.jpg"', repr(str(path)))])
  label_map = found["loaded"].predict(path)[0]["label_map"]
  with Image.open(path) as picture:
    assert label_map.shape == picture.size[::-1]


@pytest.mark.slow
def test_processes_count_the_pixels_of_one(run):
  dense_runs.check_processes_measure(run)


@pytest.mark.slow
def test_two_processes_train_like_one(home):
  dense_runs.check_processes_train(home, steps=12)
