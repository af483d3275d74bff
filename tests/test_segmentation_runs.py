"""Segmentation from a folder of images to coloured pictures, as users run it.

A tree in ADE20K's form is prepared, trained on, killed, resumed, evaluated and
predicted; and evaluated by several processes.
"""

import csv
import json
import os
import signal
import subprocess
import sys

import ade_tree
import jax
import numpy as np
import pods
import pytest
import safetensors
import small_runs
from flax import traverse_util
from PIL import Image

import metaformer_jax
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import ade20k, typed
from metaformer_jax.tasks import drawing
from metaformer_jax.training import backbone

OPTIONS = {
    "model.name": "poolformer_s12", "model.depths": (1, 1),
    "model.dims": (8, 16), "model.token_mixers": ("pooling", "pooling"),
    "task.fpn_dim": 8, "task.head_dim": 8, "task.crop_size": (32, 32),
    "task.scale": (96, 64), "task.eval_canvases": 2,
    "data.source": "array_record", "optim.base_lr": 0.5,
    "optim.warmup_epochs": 0.0, "train.batch_size": 8, "train.steps": 40,
    "eval.batch_size": 8, "eval.every_epochs": 10.0,
    "checkpoint.every_steps": 4, "log.every_steps": 1,
    "log.tensorboard": False, "log.compilation_cache": "",
}


def tool(name, *argv, n_devices=1, **kwargs):
  """Runs a tool to its end; returns what it printed."""
  done = subprocess.run(
      [sys.executable, "-m", f"metaformer_jax.tools.{name}", *map(str, argv)],
      env=pods.environment(n_devices), cwd=pods.ROOT, capture_output=True,
      text=True, timeout=300, check=False, **kwargs)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with tree/, prepared/ and cfg.json."""
  home = tmp_path_factory.mktemp("segmentation")
  tree = ade_tree.make(home / "tree", n_train=16, n_val=5)
  tool("prepare", "--source=ade20k", f"--path={tree}",
       f"--output={home / 'prepared'}", "--shards=2")
  config = typed.default("segmentation")
  for key, value in {**OPTIONS, "data.path": str(home / "prepared")}.items():
    section, _, name = key.partition(".")
    config[section][name] = value
  (home / "cfg.json").write_text(config.to_json())
  return home


def trained(home, workdir, n_devices=1):
  with (home / f"{workdir.name}.log").open("w") as stderr:
    return subprocess.Popen(
        [sys.executable, "-m", "metaformer_jax.main",
         f"--config_json={home / 'cfg.json'}", f"--workdir={workdir}"],
        env=pods.environment(n_devices), cwd=pods.ROOT, stderr=stderr)


@pytest.fixture(scope="module")
def run(home):
  """The workdir of a whole run."""
  process = trained(home, home / "whole")
  assert pods.finish([process]) == [0], (home / "whole.log").read_text()
  return home / "whole"


@pytest.mark.slow
def test_a_killed_run_ends_like_another(home, run):
  workdir = home / "killed"
  process = trained(home, workdir)
  pods.wait_for_step([process], workdir, 11)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert pods.finish([trained(home, workdir)]) == [0]
  assert "resumed" in (home / "killed.log").read_text()
  whole, killed = (manager.read_variables(path) for path in (run, workdir))
  for a, b in zip(*(map(np.asarray, _leaves(v)) for v in (whole, killed))):
    np.testing.assert_array_equal(a, b)
  losses = [pods.losses(path) for path in (run, workdir)]
  assert losses[0] == losses[1] and losses[0][40] < 0.9 * losses[0][1]
  measures = [pods.summary(path)["miou"] for path in (run, workdir)]
  assert measures[0] == measures[1] > 0


def _leaves(tree):
  if isinstance(tree, dict):
    return [x for key in sorted(tree) for x in _leaves(tree[key])]
  return [tree]


def test_evaluation_of_the_run(home, run):
  found = json.loads(tool("evaluate", f"--workdir={run}"))
  summary = pods.summary(run)
  for name in ("miou", "mean_accuracy", "pixel_accuracy"):
    assert found[name] == summary[name]
  assert found["n_examples"] == 5
  # The tree itself has the same pixels.
  tree = json.loads(tool(
      "evaluate", f"--workdir={run}", "--config.data.source=ade20k",
      f"--config.data.path={home / 'tree'}"))
  assert tree == found
  table = tool("evaluate", f"--workdir={run}", "--per_class", "--csv")
  head, *rows = table.splitlines()
  assert head == "class,name,iou,accuracy,pixels" and len(rows) == 150
  assert rows[16].split(",")[:2] == ["16", "mountain"]
  ious = [float(iou) for _, _, iou, _, _ in csv.reader(rows) if iou]
  assert np.mean(ious) == pytest.approx(found["miou"])


@pytest.mark.slow
def test_names_of_mmsegmentation_and_back(home, run):
  file = home / "run.safetensors"
  tool("convert", f"--input={run}", "--layout=mmseg", f"--output={file}")
  with safetensors.safe_open(file, "numpy") as f:
    names = {*f.keys()}
  assert {"backbone.patch_embed.proj.weight", "backbone.norm0.weight",
          "neck.fpn_convs.1.conv.bias", "decode_head.scale_heads.1.0.bn.bias",
          "decode_head.conv_seg.weight"} <= names
  whole, read = (metaformer_jax.load(path) for path in (run, file))
  for a, b in zip(*(map(np.asarray, _leaves(dict(x.variables)))
                    for x in (whole, read))):
    np.testing.assert_array_equal(a, b)
  images = home / "tree" / "ADEChallengeData2016" / "images" / "validation"
  paths = sorted(images.iterdir())
  for a, b in zip(whole.predict(paths), read.predict(paths[::-1])[::-1]):
    np.testing.assert_array_equal(a["label_map"], b["label_map"])


@pytest.mark.parametrize("other_classes", (False, True))
def test_a_run_starts_from_all_of_another(run, other_classes):
  """As config.init; without the last layer if the classes are others."""
  loaded = metaformer_jax.load(run)
  shapes = jax.eval_shape(loaded.model.init, jax.random.key(0),
                          *loaded.task.init_inputs())
  found = traverse_util.flatten_dict(backbone.read_weights(
      str(run), loaded.task.pretrained, shapes, whole=loaded.task.family,
      other_classes=other_classes), sep="/")
  want = traverse_util.flatten_dict(dict(loaded.variables), sep="/")
  assert want.keys() - found.keys() == ({
      "params/head/classifier/conv/kernel", "params/head/classifier/conv/bias"
      } if other_classes else set())
  assert all(np.array_equal(found[name], want[name]) for name in found)


@pytest.mark.slow
def test_pictures_of_predictions(home, run):
  images = home / "tree" / "ADEChallengeData2016" / "images" / "validation"
  lines = tool("predict", f"--weights={run}", images, "--json",
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
def test_processes_count_the_pixels_of_one(home, run):
  """2 processes with 4 devices each, and 1 with 8: the same counts."""
  one = json.loads(tool("evaluate", f"--workdir={run}", n_devices=8))
  processes = [subprocess.Popen(
      [sys.executable, "-m", "metaformer_jax.tools.evaluate",
       f"--workdir={run}", *flags], env=pods.environment(4), cwd=pods.ROOT,
      stdout=subprocess.PIPE, text=True) for flags in pods.flags_of(2)]
  found = [process.communicate(timeout=300)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert json.loads(found[0].splitlines()[-1]) == one  # After Gloo's lines.


@pytest.mark.slow
def test_two_processes_train_like_one(home):
  runs = [home / "one", home / "two"]
  assert pods.finish([trained(home, runs[0], 8)]) == [0]
  cfg = home / "cfg.json"
  processes = [subprocess.Popen(
      [sys.executable, "-m", "metaformer_jax.main", f"--config_json={cfg}",
       f"--workdir={runs[1]}", *flags], env=pods.environment(4), cwd=pods.ROOT)
      for flags in pods.flags_of(2)]
  assert pods.finish(processes) == [0, 0]
  one, two = (small_runs.records(path) for path in runs)
  assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two],
                                                   rel=1e-3)
  assert pods.summary(runs[0])["miou"] == pytest.approx(
      pods.summary(runs[1])["miou"], abs=0.02)
