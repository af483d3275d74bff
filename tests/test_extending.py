"""docs/extending.md, from a folder outside of the repository."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pages
import pytest
import small_runs
from PIL import Image

import metaformer_jax
from metaformer_jax import errors, tasks
from metaformer_jax.config import default, resolve, saved
from metaformer_jax.models import mixers

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The working directory, with the guide's modules; none is imported yet."""
  names = pages.write_files(ROOT / "docs" / "extending.md", tmp_path)
  monkeypatch.chdir(tmp_path)
  monkeypatch.syspath_prepend(tmp_path)
  for name in names:
    monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
  yield tmp_path
  for name in names:
    sys.modules.pop(name.removesuffix(".py"), None)


def run(folder, *command):
  """Runs a module of the package as a user does; returns what it printed."""
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=env,
                        text=True, capture_output=True, timeout=300)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_every_module_is_in_the_guide(folder):
  assert {"my_mixers.py", "test_my_mixers.py", "compare_mixers.py",
          "my_models.py", "my_data.py", "my_task.py"} <= {
              path.name for path in folder.iterdir()}
  code = (folder / "my_mixers.py").read_text()
  own = code[code.index("class Shift"):code.index("ShiftTwo")]
  assert len([line for line in own.splitlines() if line]) <= 20


def test_the_mixer_shifts(folder):
  metaformer_jax.check_mixer("my_mixers:Shift")
  import my_mixers  # noqa: PLC0415

  x = np.arange(25.0).reshape(1, 5, 5, 1).repeat(4, -1)
  y = np.asarray(my_mixers.Shift(4).apply({}, x))[0]
  padded = np.pad(x[0, ..., 0], 1)
  for i, (top, left) in enumerate(((0, 1), (2, 1), (1, 0), (1, 2))):
    np.testing.assert_array_equal(
        y[..., i], padded[top:top + 5, left:left + 5])


def test_its_tests_run(folder):
  out = run(folder, "pytest", "-q", "-n0", "-k", "shape or mask",
            "test_my_mixers.py")
  assert "2 passed" in out, out


@pytest.mark.slow
def test_it_is_trained_and_compared_with_pooling(folder):
  run(folder, "metaformer_jax.tools.study", "--config=compare_mixers.py",
      "--workdir=runs/mixers", "--seeds=0", "--set", "train.epochs=3.0",
      "--only=[ps]*[gt]")
  rows = json.loads((folder / "runs/mixers/study.json").read_text())
  assert [row["variant"] for row in rows] == ["pooling", "shift"]
  assert all(row["top1"][0] > 30 for row in rows), rows
  assert rows[0]["top1"] != rows[1]["top1"]
  # The page's other code.
  Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save("photo.png")
  found = pages.run_python(ROOT / "docs" / "extending.md")
  assert found["found"]["names"][0] in "0123456789"


def test_the_model_norm_and_source_are_trained(folder):
  config = default()
  config.model.name = "my_models:Net"
  config.data.source = "my_data:Stripes"
  config.task.image_size = 16
  config.task.crop_pct = 1.0
  config.task.crop_area = (0.9, 1.0)
  config.task.flip = 0.0
  config.optim.base_lr = 0.05
  config.optim.warmup_epochs = 0.0
  config.train.batch_size = 64
  config.train.epochs = 3.0
  config.eval.every_epochs = 3.0
  config.log.tensorboard = False
  cfg, task = tasks.create(resolve.resolve(config))
  assert (cfg.task.num_classes, cfg.task.class_names) == (
      2, ("horizontal", "vertical"))
  assert small_runs.run(cfg, task, pathlib.Path("runs/own"))["top1"] > 0.9

  loaded = metaformer_jax.load("runs/own")
  import my_data  # noqa: PLC0415

  source = my_data.Stripes(None, "eval")
  records = [source[i] for i in range(8)]
  found = loaded.predict([record["image"] for record in records])
  right = [result["names"][0] == source.class_names[record["label"]]
           for result, record in zip(found, records)]
  assert sum(right) >= 7


def test_the_norm_normalises(folder):
  model = metaformer_jax.create_model(
      "poolformer_s12", depths=(1,), dims=(8,), num_classes=2,
      token_mixers=("identity",), norm="my_models:RMSNorm",
      activation="metaformer_jax.models.activations:StarReLU")
  x = np.random.default_rng(0).standard_normal((2, 16, 16, 3))
  variables = model.init(jax.random.key(0), x)
  params = variables["params"]["stage1"]["block1"]
  assert set(params["norm1"]) == {"rms"} and "act" in params["mlp"]
  assert np.isfinite(model.apply(variables, x)).all()


@pytest.mark.slow
def test_the_task_learns_in_one_file(folder):
  run(folder, "metaformer_jax.main", "--config=my_task.py",
      "--workdir=runs/read", "--config.task.delta=0.5")
  written = folder / "runs/read/config.json"
  assert json.loads(written.read_text())["task"] == {
      "name": "my_task:ReadDigit", "delta": 0.5}
  summary = json.loads((folder / "runs/read/summary.json").read_text())
  # Always saying 4.5 would be wrong by 2.5.
  assert summary["absolute_error"] < 1.8, summary
  loaded = metaformer_jax.load("runs/read")
  assert set(loaded.variables["params"]) == {"backbone", "head"}
  assert saved.differences(loaded.cfg, written) == []
  other = small_runs.changed(loaded.cfg, task={"delta": 1.0})
  assert saved.differences(other, written) == ["task.delta: 0.5 -> 1.0"]


def test_an_own_task_checks_its_section(folder):
  for change, words in (
      ({"delta": 0.0}, "config.task.delta: 0.0 is not above 0"),
      ({"dleta": 0.1}, "config.task.dleta: no such key"),
      ({"name": "my_task:Regressor"}, "has no Section"),
      ({"name": "my_task:ReadDigi"}, "did you mean ReadDigit"),
  ):
    config = default()
    config.task = {"name": "my_task:ReadDigit", "delta": 0.3, **change}
    config.data.source = "digits"
    with pytest.raises(errors.ConfigError) as caught:
      tasks.create(resolve.resolve(config))
    assert words in str(caught.value)


@pytest.mark.slow
def test_the_picture_of_the_guide_can_be_predicted(folder):
  """`predict` takes paths, bytes, pictures and arrays, and gives the same."""
  Image.fromarray(np.full((20, 30, 3), 90, np.uint8)).save("photo.png")
  config = default()
  config.model.name = "poolformer_s12"
  config.model.depths, config.model.dims = (1,), (8,)
  config.model.token_mixers = ("my_mixers:Shift",)
  config.data.source = "digits"
  config.task.image_size = 16
  config.train.batch_size, config.train.steps = 8, 1
  config.log.tensorboard = False
  cfg, task = tasks.create(resolve.resolve(config))
  small_runs.run(cfg, task, pathlib.Path("runs/one"))
  loaded = metaformer_jax.load("runs/one")
  path = pathlib.Path("photo.png")
  with Image.open(path) as picture:
    several = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    found = loaded.predict(several, batch_size=2)
  assert len(found) == 5 and loaded.class_names == tuple("0123456789")
  for other in found:
    np.testing.assert_array_equal(other["classes"], found[0]["classes"])
  assert loaded.predict("photo.png")[0]["names"] == found[0]["names"]
  assert list(mixers.MIXERS) == sorted(mixers.MIXERS)  # Nothing registered.
  with pytest.raises(errors.DataError, match=r"none\.png cannot be used"):
    loaded.predict("none.png")
