"""A step is saved before it is evaluated, and loses nothing in between."""

import contextlib
import dataclasses
import json
import random
import shutil

import line_task
import numpy as np
import pytest
import small_runs
from small_runs import records, run

from metaformer_jax import errors
from metaformer_jax.checkpoints import arrays, manager, manifest, steps
from metaformer_jax.runtime import devices, workdir, writers
from metaformer_jax.tools import checkpoints as tool
from metaformer_jax.training import evaluate

# Four evaluations, of which the third is the best, and a save between two.
CFG = small_runs.line(
    train={"steps": 16}, eval={"every_epochs": 3.2}, optim={"base_lr": 130.0},
    checkpoint={"every_steps": 2, "keep_last": 1, "keep_best": 1})


class Points(line_task.Points):
  """The data; counts the batches that are trained on."""

  n_batches = 0

  def train_batches(self, position):
    for batch in super().train_batches(position):
      self.n_batches += 1
      yield batch


class Unreadable(Points):
  """Data whose validation images cannot be read."""

  def eval_batches(self):
    raise errors.DataError("unusable")
    yield


class Task(line_task.LineTask):

  def __init__(self, points=None):
    self._points = points or Points()

  def make_data(self, split):
    return self._points


def left(path):
  """What a run leaves, without times."""
  timeless = {"images_per_second", "step_seconds", "input_wait", "goodput",
              "checkpoint_stall", "host_memory_gib"}
  lines = [{k: v for k, v in r.items() if k not in timeless}
           for r in writers.read(path / "metrics.jsonl")]
  kept = {step: (found.metrics, found.record["position"], found.tree)
          for step, found in steps.survey(path / "checkpoints",
                                          contents=True)[0].items()}
  summary = json.loads((path / "summary.json").read_text())
  variables = manager.read_variables(path)
  return lines, kept, {
      k: v for k, v in summary.items()
      if k not in timeless | {"checkpoint"}}, str(variables)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """An uninterrupted run; tests must not change it."""
  path = tmp_path_factory.mktemp("finished")
  run(CFG, Task(), path)
  return path


@pytest.fixture(scope="module")
def whole(finished):
  """What it has left."""
  path = finished
  found = left(path)
  best = max(records(path, "eval"), key=lambda r: r["score"])["step"]
  assert best == 12 and [*found[1]] == [best, 16]
  assert all(metrics for metrics, *_ in found[1].values())
  return found


def test_a_run_whose_validation_fails_trains_nothing_twice(tmp_path, whole):
  points = Unreadable()
  for _ in range(2):
    with pytest.raises(errors.DataError, match="unusable"):
      run(CFG, Task(points), tmp_path)
  first = records(tmp_path)[-1]["step"]
  assert first == 4 and points.n_batches <= first + 2
  found, _ = steps.survey(tmp_path / "checkpoints")
  assert max(found) == first and found[first].metrics == {}
  run(CFG, Task(), tmp_path)  # The images are repaired.
  assert left(tmp_path) == whole


@pytest.mark.parametrize("at", [
    3, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 4))])
def test_an_evaluation_that_is_cut_off_changes_nothing(
    tmp_path, whole, monkeypatch, at):
  """Nor does a second request to stop, during the evaluation that is made up.

  The best step stays the best, and is not deleted.
  """
  measure = evaluate.Evaluation.__call__
  n_calls = 0

  def stopped(*args):
    nonlocal n_calls
    n_calls += 1
    return None if n_calls in (at, at + 1) else measure(*args)

  monkeypatch.setattr(evaluate.Evaluation, "__call__", stopped)
  for _ in range(2):
    with pytest.raises(errors.Preempted, match=f"at step {4 * at}; saved in"):
      run(CFG, Task(), tmp_path)
  run(CFG, Task(), tmp_path)
  assert left(tmp_path) == whole


class Cut(Exception):
  """The end of a process, as it were."""


@pytest.mark.slow
def test_cut_off_anywhere_between_training_and_its_measures(
    tmp_path, whole, monkeypatch):
  """Each call is cut off before or after it is done; the run always ends alike.

  Those of `arrays` and `manifest` are made in the background.
  """
  rng = random.Random(0)
  plan = []

  def may_cut(owner, name):
    function = getattr(owner, name)

    def cut(*args, **kwargs):
      when = plan.pop(0) if plan else ""
      if when == "before":
        raise Cut
      found = function(*args, **kwargs)
      if when == "after":
        raise Cut
      return found
    monkeypatch.setattr(owner, name, cut)

  for owner, name in ((evaluate.Evaluation, "__call__"),
                      (writers.Writer, "write"), (arrays, "require"),
                      (manager.Checkpoints, "add_metrics"),
                      (manifest, "add_metrics"), (manifest, "write"),
                      (steps, "finish"), (steps, "remove")):
    may_cut(owner, name)
  n_cut = 0
  for _ in range(12):
    plan[:] = [""] * rng.randrange(10) + [rng.choice(["before", "after"])]
    with contextlib.suppress(Cut):
      run(CFG, Task(), tmp_path)
    n_cut += not plan
  assert n_cut >= 6
  plan.clear()
  run(CFG, Task(), tmp_path)
  assert left(tmp_path) == whole


def test_a_lost_lock_ends_a_run_before_it_saves(tmp_path):
  """Another run may have entered, and has its own steps in the folder."""

  class Losing(Points):

    def train_batches(self, position):
      for i, batch in enumerate(super().train_batches(position)):
        if i == 6:
          (tmp_path / "lock").unlink()
          stack.enter_context(workdir.hold(tmp_path))
        yield batch

  with contextlib.ExitStack() as stack:
    with pytest.raises(errors.StorageError, match=r"lock: was deleted or repl"):
      run(CFG, Task(Losing()), tmp_path)
    assert max(steps.found(tmp_path / "checkpoints")) < 8
    with pytest.raises(errors.ConfigError, match="is in use"):
      run(CFG, Task(), tmp_path)


@pytest.mark.parametrize("position", [0, 127, 2**62])
def test_a_record_of_another_position_is_refused(finished, tmp_path, position):
  path = shutil.copytree(finished, tmp_path / "run")
  folder = path / "checkpoints" / "16"
  facts = dataclasses.asdict(manifest.read(folder))
  facts["record"]["position"] = position
  (folder / manifest.NAME).write_bytes(manifest._encode(facts))
  manifest.verify(folder)
  with pytest.raises(errors.ConfigError, match=(
      f"checkpoints/16: its record is of {position} examples, but 16 steps of "
      "config.train.batch_size take 128; choose another")):
    run(CFG, Task(), path)


def test_a_path_that_is_a_pattern(tmp_path, capsys):
  """Trains; the step is intact, and can be evaluated and resumed."""
  path = tmp_path / "runs*" / "lr[0.1]?"
  cfg, points = small_runs.changed(CFG, train={"steps": 4}), Points()
  summary = run(cfg, Task(), path)
  assert tool.main(tool.parse(["verify", f"--workdir={path}"])) == 0
  assert "intact" in capsys.readouterr().out
  result = evaluate.evaluate_checkpoint(
      cfg, Task(), devices.make_mesh(cfg), path, "best")
  assert result["error"] == summary["error"]
  assert run(cfg, Task(points), path)["error"] == summary["error"]
  assert points.n_batches <= 1


def test_what_identifies_the_data_is_kept(tmp_path):
  cfg = dataclasses.replace(CFG.checkpoint, keep_last=2)
  data = {"training": {"examples": 10, "names": ["a", "\u00e9"]}, "x": {}}
  with contextlib.closing(manager.Checkpoints(
      tmp_path, cfg, CFG.best_measure)) as checkpoints:
    tree = {"params": {"a": np.zeros(2, np.float32)}}
    record = manager.accounting.Record(position=8)
    checkpoints.save(1, tree, record, data)
    checkpoints.save(2, tree, record)
    checkpoints.wait()
    assert checkpoints.read(1).data == data and checkpoints.read(2).data == {}
    assert checkpoints.read(1).record["position"] == 8
