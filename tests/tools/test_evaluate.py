"""tools.evaluate --weights: the measures of files, on other data."""

import csv
import json

import command_line
import drawings
import numpy as np
import pytest
from test_inference import STAGES, variables_of

import metaformer_jax
from metaformer_jax.config import resolve, saved, schema, typed
from metaformer_jax.convert import files, layouts
from metaformer_jax.data import sources


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file with the experiment's model, preprocessing and classes."""
  made = resolve.resolve({
      "model": {"name": "poolformer_s12", **STAGES},
      "data": {"mean": (0.4, 0.4, 0.4), "source": "digits"},
      "task": {"num_classes": 6, "image_size": 32,
               "class_names": drawings.SHAPES}})
  tree = typed.as_dict(made)
  path = tmp_path_factory.mktemp("weights") / "poolformer s12.safetensors"
  files.write_safetensors(
      path, layouts.to_torch("poolformer", variables_of(made), "timm"),
      {saved.METADATA: json.dumps({
          "model": tree["model"], "task": tree["task"],
          "data": {key: tree["data"][key] for key in ("mean", "std")}})})
  return path


def evaluate(*argv):
  return command_line.python(
      ["-m", "metaformer_jax.tools.evaluate", *map(str, argv)])


def measured(weights, root, names=drawings.SHAPES):
  """Top-1 and loss by `Loaded.predict`, labels by the names of folders."""
  loaded = metaformer_jax.load(weights)
  paths = sorted(root.rglob("*.*"))
  right, losses = [], []
  for path, found in zip(paths, loaded.predict(paths)):
    label = names.index(path.parent.name)
    right.append(found["classes"][0] == label)
    (p,) = found["probabilities"][found["classes"] == label]
    losses.append(-np.log(p))
  return {"top1": pytest.approx(np.mean(right)),
          "loss": pytest.approx(np.mean(losses), rel=1e-4),
          "n_examples": len(paths)}


@pytest.mark.slow
def test_weights_on_other_data(weights, tmp_path):
  """Two files; a split that lacks classes, and no training split."""
  photos = drawings.write(tmp_path / "data" / "val", 5,
                          shapes=("ring", "star", "triangle"))
  done = evaluate(f"--weights={weights}", f"--weights={weights}", "--json",
                  f"--config.data.path={photos.parent}",
                  "--config.eval.batch_size=8")
  assert not done.returncode, done.stderr
  rows = [json.loads(line) for line in done.stdout.splitlines()]
  want = measured(weights, photos)
  assert len(rows) == 2
  for row in rows:
    assert {key: row[key] for key in want} == want
    assert row["weights"] == str(weights) and row["image"] == "32x32"
    assert row["model"] == "poolformer_s12"


@pytest.mark.slow
def test_forms_and_overrides(weights, tmp_path):
  photos = drawings.write(tmp_path / "photos", 10)
  done = evaluate(f"--weights={weights}", "--csv",
                  f"--config.data.path={photos}",
                  "--config.data.eval_fraction=0.5",
                  "--config.eval.batch_size=8")
  assert not done.returncode, done.stderr
  row, = csv.DictReader(done.stdout.splitlines())
  source = sources.create(schema.Data(
      source="folder", path=str(photos), eval_fraction=0.5), "eval")
  held = tmp_path / "held"
  for i in range(len(source)):
    record = source[i]
    copy = held / drawings.SHAPES[record["label"]] / f"{i}.png"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(record["image"])
  want = measured(weights, held)
  assert {key: float(row[key]) for key in want} == want
  assert row["n_examples"] == "30"


@pytest.mark.parametrize("argv,words", [
    (["--weights={weights}"], "config.data.path: None with source folder"),
    (["--weights={weights}", "--workdir=runs/x"], "combined with --workdir"),
    (["--weights={weights}", "--checkpoint=best"],
     "combined with --checkpoint"),
    (["--weights={unrecorded}", "--config.model.pool_size=5",
      "--config.data.source=digits", "--config.task.num_classes=10",
      "--config.task.class_names=None"], "pool_size: 3, 5"),
    (["--weights=missing.pth"], "missing.pth: does not exist"),
    pytest.param(
        ["--weights={weights}", "--config.data.source=digits",
         "--config.model.pool_size=5", "--config.task.num_classes=10",
         "--config.task.class_names=None"], "pool_size: 3, 5",
        marks=pytest.mark.slow),
])
def test_mistakes_are_one_line(weights, tmp_path, argv, words):
  unrecorded = tmp_path / "poolformer_s12.pth"  # Not opened.
  unrecorded.write_bytes(b"")
  done = evaluate(*(a.format(weights=weights, unrecorded=unrecorded)
                    for a in argv))
  assert done.returncode == 2, done.stderr
  *logged, line = done.stderr.splitlines()
  assert words in line and len(logged) <= 1 and "Traceback" not in done.stderr
