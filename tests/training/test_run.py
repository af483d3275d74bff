"""Whole runs: train, resume, evaluate, and interruptions."""

import json
import os
import pathlib
import subprocess
import sys

import fast_compilation
import jax
import line_task
import numpy as np
import pytest
import small_runs
from PIL import Image
from tensorboard.backend.event_processing import event_accumulator

from metaformer_jax import errors
from metaformer_jax.config import derived, saved, schema, tasks
from metaformer_jax.runtime import devices, writers
from metaformer_jax.tasks import classification
from metaformer_jax.training import evaluate, loop

ROOT = pathlib.Path(__file__).parents[2]

# The quickstart in seconds: fewer, narrower blocks and few steps.
SHRINK = ("--config.model.depths=(1,1)", "--config.model.dims=(32,64)",
          "--config.model.token_mixers=('pooling','attention')",
          "--config.train.batch_size=40", "--config.train.steps=12",
          "--config.eval.every_epochs=0.1", "--config.log.every_steps=5",
          "--config.checkpoint.every_steps=3")


def command(workdir, *flags, module="metaformer_jax.main", shrink=SHRINK):
  return [sys.executable, "-m", module, "--config=configs/quickstart.py",
          f"--workdir={workdir}", *shrink, *flags]


def start(*args, env=None, **kwargs):
  return subprocess.Popen(
      command(*args, **kwargs), cwd=ROOT, stderr=subprocess.PIPE,
      stdout=subprocess.PIPE, text=True,
      env=env or {**os.environ, "XLA_FLAGS": fast_compilation.XLA_FLAGS,
                  "PYTHONPATH": str(ROOT)})


def run(*args, expect=0, **kwargs):
  """Runs to the end; returns (stdout, stderr)."""
  process = start(*args, **kwargs)
  out, err = process.communicate(timeout=300)
  assert process.returncode == expect, err
  assert "Traceback" not in err and "Warning" not in err, err
  return out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """An uninterrupted run: (workdir, stderr)."""
  workdir = tmp_path_factory.mktemp("finished")
  return workdir, run(workdir)[1]


def test_a_run_leaves_what_it_says(finished):
  workdir, err = finished
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["step"] == 12 and summary["n_examples"] == 297
  assert 0 <= summary["top1"] <= summary["top5"] <= 1
  assert summary["images_per_second"] > 0
  assert f"{summary['n_params']:,} parameters" in err
  assert pathlib.Path(summary["checkpoint"]).is_dir()
  assert summary["checkpoint"] in err
  assert str(workdir / "curves.png") in err
  with Image.open(workdir / "curves.png") as picture:
    assert picture.format == "PNG"
    assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
  records = writers.read(workdir / "metrics.jsonl")
  assert [r["step"] for r in records if r["split"] == "train"] == [5, 10, 12]
  assert [r["step"] for r in records if r["split"] == "eval"] == [4, 8, 12]
  for record in records:
    assert all(np.isfinite(v) for v in record.values()
               if not isinstance(v, str))
  train = [r for r in records if r["split"] == "train"][-1]
  assert {"loss", "top1", "learning_rate", "images_per_second", "input_wait",
          "epoch"} <= train.keys()
  assert train["epoch"] == 12 * 40 / 1500
  for word in ("1,500 to train", "297 to evaluate", "12 of 40 images",
               "mesh data=1 x fsdp=1", "input wait", "img/s", "eta"):
    assert word in err, word


def test_tensorboard_events_hold_the_metrics(finished):
  workdir, _ = finished
  events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
  events.Reload()
  want = {r["step"]: r["loss"] for r in small_runs.records(workdir, "eval")}
  got = {e.step: e.value for e in events.Scalars("eval/loss")}
  assert got == pytest.approx(want)


def test_restart_of_a_finished_run_only_reports(finished):
  workdir, _ = finished
  before = (workdir / "metrics.jsonl").read_text()
  summary = json.loads((workdir / "summary.json").read_text())
  _, err = run(workdir)
  assert "resumed" in err and "step 12" in err
  assert (workdir / "metrics.jsonl").read_text() == before
  assert json.loads((workdir / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_evaluate_measures_the_checkpoint(finished):
  workdir, _ = finished
  recorded = {r["step"]: r for r in small_runs.records(workdir, "eval")}
  # At a batch size that does not divide 297, and another checkpoint.
  for flags, step in ((("--config.eval.batch_size=100",), 12),
                      (("--checkpoint=best",), max(
                          recorded, key=lambda i: recorded[i]["top1"]))):
    out, _ = run(workdir, *flags, module="metaformer_jax.tools.evaluate")
    result = json.loads(out)
    assert result["n_examples"] == 297
    assert recorded[result["step"]]["top1"] == recorded[step]["top1"]
    step = result["step"]
    for name in ("top1", "top5"):
      assert result[name] == recorded[step][name]
    assert result["loss"] == pytest.approx(recorded[step]["loss"], rel=1e-5)
  cfg = saved.read_run(workdir)
  for folder, which, reason in ((workdir, 5, "no checkpoint 5"),
                                (workdir / "none", 12, "has no checkpoints")):
    with pytest.raises(errors.ConfigError, match=reason):
      evaluate.evaluate_checkpoint(cfg, classification.create(cfg)[1],
                                   devices.make_mesh(cfg), folder, which)


def test_another_experiment_is_refused(finished):
  workdir, _ = finished
  _, err = run(workdir, "--config.optim.base_lr=0.5", expect=2)
  assert err.count("\n") == 1
  assert "optim.base_lr: 0.008 -> 0.5" in err


def test_interrupted_between_steps(tmp_path):
  """In one process: stopped after three of six steps, the same end."""
  cfg = derived.fill(schema.Experiment(
      model=schema.Model(name="poolformer_s12", depths=(1,), dims=(16,),
                         token_mixers=("pooling",), drop_path_rate=0.5),
      task=tasks.Classification(num_classes=10, image_size=16),
      data=schema.Data(source="digits"),
      train=schema.Train(batch_size=16, steps=6, ema_decay=0.5, accumulate=2),
      checkpoint=schema.Checkpoint(every_steps=1, keep_last=1),
      mesh=schema.Mesh(data=4, fsdp=2, min_size=16),
      log=schema.Log(tensorboard=False, compilation_cache="")))

  class Interrupted(Exception):
    pass

  class Task(classification.Classification):
    """Raises instead of giving the batch after `limit`."""

    limit = None
    seen = ()

    def make_data(self, split):
      data = super().make_data(split)
      if split == "eval" or self.limit is None:
        return data
      task, batches = self, data.train_batches

      class Limited:
        n_examples = data.n_examples

        def train_batches(self, position):
          yielded = batches(position)
          for _ in range(task.limit):
            yield next(yielded)
          yielded.close()
          raise Interrupted

      return Limited()

  mesh = devices.make_mesh(cfg)
  whole = loop.train_and_evaluate(cfg, Task(cfg), mesh, tmp_path / "whole")
  parts = tmp_path / "parts"
  task = Task(cfg)
  object.__setattr__(task, "limit", 3)
  with pytest.raises(Interrupted):
    loop.train_and_evaluate(cfg, task, mesh, parts)
  result = loop.train_and_evaluate(cfg, Task(cfg), mesh, parts)
  assert {k: result[k] for k in ("step", "loss", "top1")} == {
      k: whole[k] for k in ("step", "loss", "top1")}
  tails = []
  for workdir in (tmp_path / "whole", parts):
    state, record = small_runs.restore(cfg, Task(cfg), workdir, 6)
    assert record.position == 96
    tails.append(jax.tree.map(np.asarray, state))
  for a, b in zip(jax.tree.leaves(tails[0]), jax.tree.leaves(tails[1]),
                  strict=True):
    assert a.tobytes() == b.tobytes()


def test_a_task_of_thirty_lines_trains(tmp_path):
  """The loop and the step do not depend on images or classes."""
  cfg = small_runs.line()
  summary = small_runs.run(cfg, line_task.LineTask(), tmp_path)
  assert summary["step"] == 30 and summary["n_examples"] == 10
  assert summary["error"] < 0.05 and summary["score"] == -summary["error"]
  errors_ = [r["error"] for r in small_runs.records(tmp_path, "eval")]
  assert len(errors_) == 3 and errors_[0] > errors_[-1]
  result = evaluate.evaluate_checkpoint(
      cfg, line_task.LineTask(), devices.make_mesh(cfg), tmp_path, "best")
  assert result["error"] == min(errors_)
  wrong = small_runs.changed(cfg, checkpoint={"best_metric": "scor"})
  with pytest.raises(errors.ConfigError, match="did you mean score"):
    small_runs.run(wrong, line_task.LineTask(), tmp_path / "wrong")


def test_best_metric_where_the_lowest_is_best(tmp_path):
  cfg = small_runs.line(checkpoint={"best_metric": "error"})
  small_runs.run(cfg, line_task.LineTask(), tmp_path)
  measured = small_runs.records(tmp_path, "eval")
  result = evaluate.evaluate_checkpoint(
      cfg, line_task.LineTask(), devices.make_mesh(cfg), tmp_path, "best")
  assert result["error"] == min(r["error"] for r in measured)


@pytest.mark.slow
def test_workdir_of_an_earlier_version_is_refused(tmp_path):
  """As it is by `workdir.claim`, in one line."""
  saved = json.dumps({"task": "classification", "train": {"mixup": 0.8}})
  (tmp_path / "config.json").write_text(saved)
  _, err = run(tmp_path, expect=2)
  assert err.count("\n") == 1
  assert "was written by another version of metaformer_jax: there is no key " \
      "task, train.mixup" in err
  assert (tmp_path / "config.json").read_text() == saved
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_the_second_start_compiles_nothing_again(tmp_path):
  cache = tmp_path / "cache"
  flags = (f"--config.log.compilation_cache={cache}",
           "--config.train.steps=1")
  env = {k: v for k, v in os.environ.items()
         if k != "JAX_COMPILATION_CACHE_DIR"}
  env["XLA_FLAGS"] = fast_compilation.XLA_FLAGS
  run(tmp_path / "a", *flags, env=env)
  compiled = sorted(p.name for p in cache.rglob("*-cache"))
  assert compiled
  run(tmp_path / "b", *flags, env=env)
  assert sorted(p.name for p in cache.rglob("*-cache")) == compiled


def test_config_error_of_the_data_ends_with_2(tmp_path):
  cfg = schema.Experiment(model=schema.Model(name="poolformer_s12"),
                          task=tasks.Classification(num_classes=4),
                          data=schema.Data(source="digits"))
  with pytest.raises(errors.ConfigError, match="4, but the train data"):
    classification.create(cfg)[1].make_data("train")
