"""docs/own_images.md: its commands, on folders of drawn pictures."""

import csv
import json
import pathlib
import re
import shlex

import command_line
import drawings
import jax
import numpy as np
import pages
import pytest

import metaformer_jax
from metaformer_jax.config import schema
from metaformer_jax.convert import files, layouts
from metaformer_jax.data import sources

PAGE = command_line.ROOT / "docs" / "own_images.md"
COMMANDS = [shlex.split(line) for block in re.findall(
    r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for line in block.splitlines()]
FEW = ("ring", "star", "triangle")
SMALL = {"depths": (1, 1), "dims": (16, 32), "res_scale_init": (),
         "token_mixers": ("sepconv", "attention")}
# Appended to the page's commands: the published model is too large here.
REDUCED = [f"--config.model.{key}={value}" for key, value in SMALL.items()] + [
    "--config.task.image_size=32", "--config.train.epochs=6"]


def command(module, *words):
  """The page's command of a module that has the words."""
  found, = (c for c in COMMANDS if c[2] == f"metaformer_jax.{module}"
            and all(any(word in part for part in c) for word in words))
  return found[1:]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A user's folder: photos, and small weights under a published name."""
  home = tmp_path_factory.mktemp("home")
  (home / "configs").symlink_to(command_line.ROOT / "configs")
  drawings.write(home / "photos", 20, shapes=FEW)
  (home / "photos" / "star" / "broken.jpg").write_bytes(b"not an image")
  drawings.write(home / "more", 1, seed=7, shapes=FEW)
  for path in list((home / "more").rglob("*.jpg")):
    path.rename(home / "more" / path.name)
  path = home / ".cache/metaformer_jax/weights/caformer_s18.safetensors"
  path.parent.mkdir(parents=True)
  model = metaformer_jax.create_model("caformer_s18", **SMALL)
  variables = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3)))
  files.write_safetensors(path, layouts.to_torch(
      "metaformer_baselines", variables, "official"), {})
  return home


def run(home, command):
  """Runs a command of the page as a user does, in the user's folder."""
  done = command_line.python(command, home, {"HOME": str(home)})
  assert not done.returncode, done.stderr
  assert "Traceback" not in done.stderr
  return done


@pytest.fixture(scope="module")
def trained_run(home):
  return run(home, [*command("main", "runs/photos"), *REDUCED])


def test_fine_tuning_needs_a_folder_and_a_name(home, trained_run):
  cfg = json.loads((home / "runs/photos/config.json").read_text())
  assert cfg["task"]["class_names"] == list(FEW)
  assert cfg["task"]["num_classes"] == 3 and cfg["task"]["image_size"] == 32
  assert cfg["model"]["name"] == "caformer_s18"
  assert cfg["model"]["depths"] == [1, 1]
  # 20, 20 and 20 + 1 bad image; 6 epochs of what is not held out.
  summary = json.loads((home / "runs/photos/summary.json").read_text())
  assert summary["n_examples"] + summary["bad_images"] == 12
  assert summary["step"] == round(6 * 49 / 32)
  assert "re-initialised with 3" in trained_run.stderr


def test_predictions_are_those_of_the_run(home, trained_run):
  words = [home / word if word.endswith("/") else word
           for word in command("tools.predict", "more/*.jpg")]
  words = [str(path) for word in words for path in (
      sorted(home.glob(word)) if "*" in str(word) else [word])]
  done = run(home, [*words, "--csv"])
  rows = list(csv.DictReader(done.stdout.splitlines()))
  assert len(rows) == 3 * 63 and {row["name"] for row in rows} == set(FEW)
  best = {row["image"]: row["name"] for row in reversed(rows)}
  assert len(best) == 63 and "broken.jpg" in done.stderr
  loaded = metaformer_jax.load(home / "runs/photos")
  for path, name in list(best.items())[::7]:
    assert loaded.predict([path])[0]["names"][0] == name
  # On the held-out images, as good as the run's own evaluation.
  held_out = sources.create(schema.Data(
      source="folder", path=str(home / "photos"), eval_fraction=0.2), "eval")
  paths = {held_out.path(i) for i in range(len(held_out))} & best.keys()
  right = np.mean([pathlib.Path(path).parent.name == best[path]
                   for path in paths])
  summary = json.loads((home / "runs/photos/summary.json").read_text())
  assert len(paths) == summary["n_examples"]
  assert right == pytest.approx(summary["top1"])


@pytest.mark.slow
def test_evaluations_agree(home, trained_run):
  line = run(home, command("tools.evaluate", "--checkpoint=best")).stdout
  best = json.loads(line)
  logged = [json.loads(line) for line in
            (home / "runs/photos/metrics.jsonl").read_text().splitlines()]
  assert best["top1"] == max(
      r["top1"] for r in logged if r["split"] == "eval")


@pytest.mark.slow
def test_exported_weights_keep_the_names(home, trained_run):
  path = home / "photos.safetensors"
  words = command("tools.convert", "--layout=timm")
  words = [w if "--output" not in w else f"--output={path}" for w in words]
  run(home, words)
  loaded = metaformer_jax.load(path)
  assert loaded.class_names == FEW
  images = sorted((home / "more").glob("*.jpg"))
  for got, want in zip(
      loaded.predict(images),
      metaformer_jax.load(home / "runs/photos").predict(images)):
    np.testing.assert_allclose(got["probabilities"], want["probabilities"],
                               rtol=1e-4)


def test_the_page_in_python(home, trained_run):
  image = next((home / "more").glob("star*.jpg"))
  found = pages.run_python(PAGE, {"metaformer_jax": metaformer_jax}, [
      ('"runs/photos"', repr(str(home / "runs/photos"))),
      ('"cat.jpg"', repr(str(image)))])
  assert tuple(found["loaded"].class_names) == FEW


@pytest.mark.slow
def test_a_probe_trains_the_head_only(home, trained_run):
  run(home, [*command("main", "finetune.py:probe"), *REDUCED])
  probe = metaformer_jax.load(home / "runs/probe").variables["params"]
  start = metaformer_jax.load_pretrained(
      "caformer_s18", home / ".cache/metaformer_jax/weights"
      / "caformer_s18.safetensors", **SMALL)
  changed = {
      name for name, value in layouts.flatten(probe).items()
      if not np.array_equal(
          value, layouts.flatten(start["params"])[name])}
  assert changed and all(name.startswith("head") for name in changed)
  done = run(home, command("tools.evaluate", "runs/probe"))
  assert [line.split()[0] for line in done.stdout.splitlines()] == [
      "weights", "runs/photos", "runs/probe"]
