"""Detection from a folder of images to drawn boxes, as users run it.

A tree in COCO's form is prepared, trained on, killed, resumed, evaluated and
predicted; and evaluated by several processes.
"""

import io
import json
import os
import signal
import subprocess
import sys

import coco_tree
import jax
import numpy as np
import pods
import pytest
import safetensors
import small_runs
from flax import traverse_util
from PIL import Image
from pycocotools import coco, cocoeval

import metaformer_jax
from metaformer_jax.checkpoints import manager
from metaformer_jax.config import typed
from metaformer_jax.training import backbone

OPTIONS = {
    "model.name": "poolformer_s12", "model.depths": (1, 1, 1),
    "model.dims": (8, 16, 24),
    "model.token_mixers": ("pooling", "pooling", "pooling"),
    "model.layer_scale_init": 1.0,
    "task.fpn_dim": 16, "task.head_dim": 16, "task.head_depth": 1,
    "task.scale": (128, 96), "task.max_boxes": 8, "task.candidates": 50,
    "task.score_threshold": 0.001,
    "data.source": "array_record", "optim.base_lr": 0.64,
    "optim.warmup_epochs": 0.0, "train.batch_size": 8, "train.steps": 60,
    "eval.batch_size": 8, "eval.every_epochs": 20.0,
    "checkpoint.every_steps": 4, "log.every_steps": 1,
    "log.tensorboard": False, "log.compilation_cache": "",
}
MEASURES = ("box_ap", "box_ap50", "box_ap75")


def tool(name, *argv, n_devices=1):
  """Runs a tool to its end; returns what it printed."""
  done = subprocess.run(
      [sys.executable, "-m", f"metaformer_jax.tools.{name}", *map(str, argv)],
      env=pods.environment(n_devices), cwd=pods.ROOT, capture_output=True,
      text=True, timeout=300, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with coco/, prepared/ and cfg.json."""
  home = tmp_path_factory.mktemp("detection")
  tree = coco_tree.make(home, n_train=14, n_val=7)
  tool("prepare", "--source=coco", f"--path={tree}",
       f"--output={home / 'prepared'}", "--shards=2")
  config = typed.default("detection")
  for key, value in {**OPTIONS, "data.path": str(home / "prepared")}.items():
    section, _, name = key.partition(".")
    config[section][name] = value
  (home / "cfg.json").write_text(config.to_json())
  return home


def trained(home, workdir, n_devices=1, flags=()):
  with (home / f"{workdir.name}.log").open("a") as stderr:
    return subprocess.Popen(
        [sys.executable, "-m", "metaformer_jax.main",
         f"--config_json={home / 'cfg.json'}", f"--workdir={workdir}", *flags],
        env=pods.environment(n_devices), cwd=pods.ROOT, stderr=stderr)


@pytest.fixture(scope="module")
def run(home):
  """The workdir of a whole run."""
  process = trained(home, home / "whole")
  assert pods.finish([process]) == [0], (home / "whole.log").read_text()
  return home / "whole"


def _flat(tree):
  return {name: np.asarray(x) for name, x in traverse_util.flatten_dict(
      dict(tree), sep="/").items()}


def require_equal(one, two):
  one, two = _flat(one), _flat(two)
  assert one.keys() == two.keys()
  for name, x in one.items():
    np.testing.assert_array_equal(x, two[name], name)


@pytest.mark.slow
def test_a_killed_run_ends_like_another(home, run):
  workdir = home / "killed"
  process = trained(home, workdir)
  pods.wait_for_step([process], workdir, 11)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert pods.finish([trained(home, workdir)]) == [0]
  assert "resumed" in (home / "killed.log").read_text()
  require_equal(*map(manager.read_variables, (run, workdir)))
  losses = [pods.losses(path) for path in (run, workdir)]
  assert losses[0] == losses[1] and losses[0][60] < 0.9 * losses[0][1]
  measures = [pods.summary(path)["box_ap"] for path in (run, workdir)]
  assert measures[0] == measures[1] > 0


def test_both_canvases_and_what_does_not_fit_are_counted(run):
  found = small_runs.records(run)
  # Some image has more than 8 objects: 12.
  assert 0 < np.mean([r["overflow"] for r in found]) < 4
  assert all(np.isfinite(r["loss"]) for r in found)


def test_evaluation_of_the_run(home, run):
  predictions = home / "predictions.json"
  found = json.loads(tool("evaluate", f"--workdir={run}",
                          f"--predictions={predictions}"))
  summary = pods.summary(run)
  assert all(found[name] == summary[name] for name in MEASURES)
  assert found["n_examples"] == 7 and found["box_ap"] > 0
  # The tree itself has the same pixels.
  tree = json.loads(tool(
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


@pytest.mark.slow
def test_the_classes_are_in_the_table(run):
  head, *rows = tool("evaluate", f"--workdir={run}", "--per_class",
                     "--csv").splitlines()
  assert head.startswith("class,name,") and len(rows) == 3
  assert [row.split(",")[1] for row in rows] == list(coco_tree.CLASS_NAMES)


@pytest.mark.slow
def test_names_of_mmdetection_and_back(home, run):
  file = home / "run.safetensors"
  tool("convert", f"--input={run}", "--layout=mmdet", f"--output={file}")
  with safetensors.safe_open(file, "numpy") as f:
    names = {*f.keys()}
  assert {"backbone.patch_embed.proj.weight", "neck.fpn_convs.1.conv.bias",
          "bbox_head.cls_convs.0.conv.weight", "bbox_head.retina_reg.bias",
          } <= names
  whole, read = (metaformer_jax.load(path) for path in (run, file))
  require_equal(whole.variables, read.variables)
  paths = sorted((home / "coco" / "val2017").iterdir())
  for a, b in zip(whole.predict(paths), read.predict(paths[::-1])[::-1]):
    np.testing.assert_allclose(a["boxes"], b["boxes"], atol=1e-3)


@pytest.mark.parametrize("other_classes", (False, True))
def test_a_run_starts_from_all_of_another(run, other_classes):
  """As config.init; without the last layer if the classes are others."""
  loaded = metaformer_jax.load(run)
  shapes = jax.eval_shape(loaded.model.init, jax.random.key(0),
                          *loaded.task.init_inputs())
  found = _flat(backbone.read_weights(
      str(run), loaded.task.pretrained, shapes, whole=loaded.task.family,
      other_classes=other_classes))
  want = _flat(loaded.variables)
  assert want.keys() - found.keys() == ({
      "params/head/class_out/kernel", "params/head/class_out/bias"
      } if other_classes else set())
  assert all(np.array_equal(found[name], want[name]) for name in found)


@pytest.mark.slow
def test_predictions_as_pictures_and_json(home, run):
  folder = home / "coco" / "val2017"
  lines = tool("predict", f"--weights={run}", folder, "--json",
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


@pytest.mark.slow
def test_processes_measure_what_one_does(home, run):
  """2 processes with 4 devices each, and 1 with 8: the same precision."""
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
  processes = [trained(home, runs[1], 4, flags) for flags in pods.flags_of(2)]
  assert pods.finish(processes) == [0, 0]
  one, two = (small_runs.records(path) for path in runs)
  assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in two],
                                                   rel=1e-3)
