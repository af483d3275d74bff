"""A study: variants and seeds are run, resumed, passed over and compared."""

import json
import pathlib
import sys

import pytest

from metaformer_jax import errors
from metaformer_jax.tools import study

CONFIG = '''
from metaformer_jax import config as config_lib

SEEDS = (0, 1)
VARIANTS = {"pooling": ({}, 77.2),
            "wide": ({"dims": (16, 16)}, None)}

def get_config(variant):
  config = config_lib.default()
  config.model.name = "poolformer_s12"
  config.model.num_classes = 10
  config.model.depths = (1, 1)
  config.model.dims = (8, 16)
  config.model.token_mixers = ("pooling",) * 2
  config.model.update(VARIANTS[variant][0])
  config.data.source = "digits"
  config.data.image_size = 8
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


def test_runs_what_is_missing_and_compares_all(run, capsys):
  rows = run("--only=pooling", "--seeds", "0")
  assert [(r["variant"], len(r["top1"])) for r in rows] == [("pooling", 1)]
  before = (run.folder / "pooling/seed_0/result.json").stat().st_mtime_ns
  run("--part=0/2")  # Of four runs the first and the third.
  rows = run("--part=1/2")
  assert [(r["variant"], len(r["top1"]), r["published"]) for r in rows] == [
      ("pooling", 2, 77.2), ("wide", 2, None)]
  done = run.folder / "pooling/seed_0/result.json"
  assert done.stat().st_mtime_ns == before  # Passed over.
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


def test_table_tells_what_diverged():
  table = study.table([
      {"variant": "a", "n_params": 1000, "macs": 2000, "top1": [50.0, 52.0],
       "published": 51.0, "diverged": 1},
      {"variant": "b", "n_params": 1, "macs": 2, "top1": [], "published": None,
       "diverged": 3}])
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
def test_mistakes_are_told_before_anything_runs(run, args, says):
  with pytest.raises(errors.ConfigError, match="(?i)" + says) as e:
    run(*args)
  assert len(str(e.value).splitlines()) == 1
  assert not run.folder.exists()


@pytest.mark.parametrize("text,says", [
    (None, "is not a file"), ("import nonsense", "ModuleNotFoundError"),
    ("VARIANTS = {}", "has no get_config")])
def test_files_that_are_no_study_are_refused(tmp_path, text, says):
  path = tmp_path / "study.py"
  if text is not None:
    path.write_text(text)
  with pytest.raises(errors.ConfigError, match=says):
    study.load(path)


def test_shipped_studies_resolve():
  root = pathlib.Path(__file__).parents[1] / "configs"
  for name in ("ablations", "study_fashion_mnist"):
    found = study.load(root / f"{name}.py")
    assert len(found["VARIANTS"]) >= 20
    for variant in found["VARIANTS"]:
      cfg = study.experiment(found, variant, 3, [
          ("data.source", "tfds"), ("data.name", "imagenet2012"),
          ("data.path", "gs://bucket")])
      assert cfg.seed == 3
