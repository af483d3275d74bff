"""docs/quickstart.md and docs/first_day.md: every block, at a reduced size."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import page_commands
import pages
import pytest
from PIL import Image

import metaformer_jax
from metaformer_jax.config import default
from metaformer_jax.tools import variants

# What setting up needs: .ci/run does it, in a new environment.
SET_UP = {"python3.11", ".", "pip"}


def run(command, folder):
  """Runs a command of a page as a user does; returns what it printed."""
  words = [sys.executable if word == "python" else word for word in command]
  done = subprocess.run(
      words, cwd=folder, env=os.environ | {"PYTHONPATH": str(pages.ROOT)},
      capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, (command, done.stderr)
  assert "Traceback" not in done.stderr
  return done.stdout


def follow(page, folder, monkeypatch, change):
  """Runs all blocks of a page in order, the commands as `change` makes them.

  Returns:
    (command, what it printed) of each.
  """
  for name in ("configs", "tests"):
    (folder / name).symlink_to(pages.ROOT / name)
  monkeypatch.chdir(folder)
  monkeypatch.syspath_prepend(folder)
  done, names = [], {"__name__": "__page__"}
  for block in pages.blocks(page):
    if block.language == "bash":
      for command in page_commands.split(block):
        if command[0] not in SET_UP:
          done.append((command, run(change(command), folder)))
    elif block.language == "python" and not pages.write_file(block, folder):
      exec(compile(block.text, str(block), "exec"), names)
  return done, names


@pytest.mark.slow
def test_the_quickstart(tmp_path, monkeypatch):
  def change(command):
    if command[2] != "metaformer_jax.main":
      return command
    # A tuple that is given twice would be longer, not another one.
    command = [word for word in command if "token_mixers" not in word]
    second = "attention" if "hybrid" in command[-1] else "pooling"
    return [*command, "--config.train.epochs=3", "--config.model.depths=(1,1)",
            "--config.model.dims=(16,32)", "--config.eval.every_epochs=3",
            "--config.optim.warmup_epochs=0.5",
            f'--config.model.token_mixers=("pooling","{second}")']

  done, names = follow(pages.ROOT / "docs" / "quickstart.md", tmp_path,
                       monkeypatch, change)
  printed = {command[2]: out for command, out in done}
  assert len(done) == 5
  summary = json.loads((tmp_path / "runs/quickstart/summary.json").read_text())
  best = json.loads(printed["metaformer_jax.tools.evaluate"])
  assert best["top1"] == pytest.approx(summary["top1"])
  assert names["found"]["names"][0] in printed["metaformer_jax.tools.predict"]
  for name in ("config.json", "metrics.jsonl", "curves.png", "parameters.txt"):
    assert (tmp_path / "runs/quickstart" / name).is_file()
  assert json.loads((tmp_path / "runs/hybrid/config.json").read_text())[
      "model"]["token_mixers"] == ["pooling", "attention"]
  with Image.open("cam.png") as cam:
    assert np.asarray(cam.convert("RGB")).std() > 1


@pytest.mark.slow
def test_the_first_day(tmp_path, monkeypatch):
  """A mixer of one's own is compared with PoolFormer on one's own images."""
  def change(command):
    if command[:2] == ["python", "tests/drawings.py"]:
      return [*command[:3], "10"]
    if command[2] == "metaformer_jax.tools.study":
      return [*command, "--seeds", "0", "--set", "train.epochs=2.0", "--set",
              "optim.warmup_epochs=0.5", "--set", "eval.every_epochs=2.0"]
    return command

  done, names = follow(pages.ROOT / "docs" / "first_day.md", tmp_path,
                       monkeypatch, change)
  assert len(done) == 5
  study = tmp_path / "runs/my_study"
  rows = {row["variant"]: row
          for row in json.loads((study / "study.json").read_text())}
  assert rows.keys() == {"poolformer", "cross"}
  # Neither mixer has parameters; both trained on the same 48 pictures.
  assert rows["poolformer"]["n_params"] == rows["cross"]["n_params"]
  assert "poolformer" in (study / "study.md").read_text()
  with Image.open(study / "study.png") as picture:
    assert np.asarray(picture.convert("RGB")).std() > 10
  variables = [metaformer_jax.load(study / name / "seed_0").variables
               for name in ("poolformer", "cross")]
  kernels = [v["params"]["head"]["kernel"] for v in variables]
  assert not np.array_equal(*kernels)
  assert names["found"]["names"][0] in (
      "circle", "cross", "ring", "square", "star", "triangle")
  predicted = next(out for command, out in done
                   if command[2] == "metaformer_jax.tools.predict")
  assert predicted.count("photos/star/") == 10
  assert (tmp_path / "cam.png").is_file()


def test_the_rows_of_comparing_are_applied(tmp_path):
  """VARIANTS of docs/comparing.md, over a model with two stages."""
  names = pages.run_python(pages.ROOT / "docs" / "comparing.md")

  def get_config():
    config = default()
    config.model.name, config.data.source = "poolformer_s12", "digits"
    config.model.depths, config.model.dims = (1, 1), (8, 16)
    config.model.token_mixers = ("pooling", "pooling")
    config.train.batch_size = 32
    return config

  file = variants.File(tmp_path, None, names | {"get_config": get_config})
  found = {name: (row.published, variants.experiment(file, name, row, seed=0))
           for name, row in variants.of(file, []).items()}
  assert {name: (published, cfg.model.norm, cfg.model.token_mixers[1],
                 cfg.train.batch_size)
          for name, (published, cfg) in found.items()} == {
              "baseline": (None, None, "pooling", 32),
              "layer_norm": (None, "layer_norm", "pooling", 32),
              "attention": (81.0, None, "attention", 64)}


def test_the_mixer_is_what_it_says(tmp_path):
  """The mean of a pixel's row and column, minus the pixel; without padding."""
  pages.write_files(pages.ROOT / "docs" / "first_day.md", tmp_path)
  mixer = runpy.run_path(str(tmp_path / "my_mixers.py"))["Cross"](2)
  x = np.random.default_rng(0).standard_normal((1, 3, 4, 2)).astype(np.float32)
  want = np.stack([
      [(x[0, :, j].mean(0) + x[0, i].mean(0)) / 2 - x[0, i, j]
       for j in range(4)] for i in range(3)])
  np.testing.assert_allclose(mixer.apply({}, x)[0], want, atol=1e-6)
  canvas, mask = np.full((1, 5, 6, 2), np.nan, np.float32), np.zeros((1, 5, 6))
  canvas[:, :3, :4], mask[:, :3, :4] = x, 1
  found = mixer.apply({}, canvas, mask=mask)
  np.testing.assert_allclose(found[0, :3, :4], want, atol=1e-6)
