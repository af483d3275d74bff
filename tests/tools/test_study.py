"""A study: variants and seeds are run, resumed, skipped and compared."""

import json
import sys

import pytest
import shipped

from metaformer_jax import errors
from metaformer_jax.config.tasks import Measure
from metaformer_jax.tools import study

TOP1 = Measure("top1", True, is_fraction=True)
LOSS = Measure("loss", False)

FAMILIES = [path for path in shipped.FILES
            if "VARIANTS" in shipped.names_of(path)]
CONFIG = '''
from metaformer_jax.config import default

SEEDS = (0, 1)
VARIANTS = {"pooling": ({}, 77.2),
            "wide": ({"dims": (16, 16)}, "more", "columns", None)}

def get_config(variant):
  config = default()
  config.model.name = "poolformer_s12"
  config.task.num_classes = 10
  config.model.depths = (1, 1)
  config.model.dims = (8, 16)
  config.model.token_mixers = ("pooling",) * 2
  config.model.update(VARIANTS[variant][0])
  config.data.source = "digits"
  config.task.image_size = 8
  config.train.batch_size = 16
  config.train.steps = 2
  config.optim.warmup_epochs = 0.0
  config.mesh.data = 1
  config.log.tensorboard = False
  config.log.compilation_cache = ""
  return config
'''


@pytest.fixture
def run(tmp_path, monkeypatch):
  path = tmp_path / "study.py"
  path.write_text(CONFIG)

  def call(*args):
    monkeypatch.setattr(sys, "argv", [
        "study", f"--config={path}", f"--workdir={tmp_path / 'runs'}", *args])
    study.main(study.parse())
    return json.loads((tmp_path / "runs/study.json").read_text())

  call.folder = tmp_path / "runs"
  return call


@pytest.mark.slow
def test_runs_what_is_missing_and_compares_all(run, capsys):
  rows = run("--only=pooling", "--seeds", "0")
  assert [(r["variant"], len(r["top1"])) for r in rows] == [("pooling", 1)]
  before = (run.folder / "pooling/seed_0/result.json").stat().st_mtime_ns
  run("--part=0/2")  # Of four runs the first and the third.
  rows = run("--part=1/2")
  assert [(r["variant"], len(r["top1"]), r["published"]) for r in rows] == [
      ("pooling", 2, 77.2), ("wide", 2, None)]
  done = run.folder / "pooling/seed_0/result.json"
  assert done.stat().st_mtime_ns == before  # Skipped.
  assert capsys.readouterr().out.count("pooling, seed") == 2
  for row in rows:
    runs = [json.loads((run.folder / row["variant"] / f"seed_{seed}"
                        / "summary.json").read_text()) for seed in (0, 1)]
    assert row["top1"] == [100 * r["top1"] for r in runs]
    assert row["n_params"] == runs[0]["n_params"]
  assert rows[1]["macs"] > rows[0]["macs"]
  table = (run.folder / "study.md").read_text().splitlines()
  assert len(table) == 2 + 2
  mean = sum(rows[0]["top1"]) / 2
  assert f"| pooling | {rows[0]['n_params']:,} |" in table[2]
  assert f"| {mean:.2f} |" in table[2] and table[2].endswith("| 77.2 |")
  assert (run.folder / "study.png").read_bytes().startswith(b"\x89PNG")


def test_runs_are_compared_by_the_best_metric(run):
  row, = run("--only=pooling", "--seeds", "0", "--set",
             "checkpoint.best_metric=loss")
  result = json.loads((run.folder / "pooling/seed_0/result.json").read_text())
  assert row["loss"] == [result["loss"]] and "top1" not in row
  head, _, line = (run.folder / "study.md").read_text().splitlines()
  assert "| MACs | loss | least - most |" in head
  assert f"| {result['loss']:.2f} |" in line


@pytest.mark.parametrize("measure, values, order, label", [
    # What is drawn, from the best to the worst.
    (TOP1, (80.0, 90.0), ("b  10.00", "a  20.00"), "top-1 error, percent"),
    (LOSS, (2.0, 1.5), ("b  1.50", "a  2.00"), "loss"),
    (Measure("gain", True), (2.0, 1.5), ("a  2.00", "b  1.50"), "gain")])
def test_plot_ranks_by_the_measure(
    monkeypatch, tmp_path, measure, values, order, label):
  drawn = []
  monkeypatch.setattr("matplotlib.figure.Figure.savefig",
                      lambda figure, *_, **__: drawn.append(figure))
  study._plot([{"variant": name, "n_params": 1, "macs": 1, "published": 1.0,
                measure.name: [value]} for name, value in zip("ab", values)],
              measure, tmp_path / "study.png")
  axes = drawn[0].axes[0]
  _, labels = axes.get_legend_handles_labels()
  assert [text.split("  ", 1)[1] for text in labels] == list(order)
  assert axes.get_ylabel() == label


def test_variants_with_different_measures_are_refused(tmp_path, monkeypatch):
  path = tmp_path / "study.py"
  path.write_text(CONFIG.replace("  return config", (
      "  config.checkpoint.best_metric = 'loss' if variant == 'wide' else None"
      "\n  return config")))
  monkeypatch.setattr(sys, "argv", [
      "study", f"--config={path}", f"--workdir={tmp_path / 'runs'}"])
  with pytest.raises(errors.ConfigError, match="differs between the variants"):
    study.main(study.parse())


def test_table_shows_what_diverged():
  table = study.table([
      {"variant": "a", "n_params": 1000, "macs": 2000, "top1": [50.0, 52.0],
       "published": 51.0, "diverged": 1},
      {"variant": "b", "n_params": 1, "macs": 2, "top1": [], "published": None,
       "diverged": 3}], TOP1)
  assert table.splitlines()[2:] == [
      "| a | 1,000 | 2,000 | 51.00 | 50.00 - 52.00 | 3, 1 diverged | 51.0 |",
      "| b | 1 | 2 | diverged |  | 3 |  |"]


@pytest.mark.parametrize("args,says", [
    (["--only=poling"], "did you mean pooling"),
    (["--set", "train.stps=3"], "did you mean train.steps"),
    (["--set", "train.steps=many"], "train.steps"),
    (["--set", "train.steps=0"], "config.train.steps: 0 is below"),
    (["--part=2/2"], "not INDEX/COUNT"),
    (["--part=x"], "not INDEX/COUNT"),
    (["--seed", "1", "--nonsense"], "unrecognized"),
])
def test_mistakes_are_reported_before_anything_runs(run, args, says):
  with pytest.raises(errors.ConfigError, match="(?i)" + says) as e:
    run(*args)
  assert len(str(e.value).splitlines()) == 1
  assert not run.folder.exists()


@pytest.mark.parametrize("text,says", [
    (None, "is not a file"), ("import nonsense", "ModuleNotFoundError"),
    ("VARIANTS = {}", "has no get_config")])
def test_files_that_are_not_a_study_are_refused(tmp_path, text, says):
  path = tmp_path / "study.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.ConfigError, match=says):
    study.load(path)


@pytest.mark.parametrize("path", FAMILIES, ids=lambda path: path.stem)
def test_every_shipped_family_is_a_study(path):
  found = study.load(path)
  data = [("data.source", "tfds"), ("data.name", "imagenet2012"),
          ("data.path", "gs://bucket")]
  if "ade20k" in path.stem:
    data = [("data.source", "scenes"), ("task.num_classes", 11)]
  if "coco" in path.stem:
    data = [("data.source", "scenes"), ("task.num_classes", 10)]
  for variant, (*_, published) in found["VARIANTS"].items():
    values = published if isinstance(published, tuple) else (published,)
    assert all(value is None or 0 < value < 100 for value in values)
    cfg = study.experiment(found, variant, 3, [*data, ("init", None)])
    assert cfg.seed == 3
