"""Failing runs: not finite, hung, folder in use; and their accounting."""

import dataclasses
import json
import re
import time

import jax
import jax.numpy as jnp
import line_task
import numpy as np
import pytest
import small_runs
from small_runs import records, run

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints
from metaformer_jax.runtime import accounting, devices, processes, workdir
from metaformer_jax.training import evaluate, optim, step
from metaformer_jax.training import state as state_lib

BAD = {"nan": np.nan, "inf": np.inf}


class Points(line_task.Points):
  """With one x that is not finite in the batches of some steps."""

  def __init__(self, bad_steps=(), value=np.nan, seconds=0.0):
    self._bad, self._value, self._seconds = bad_steps, value, seconds

  def train_batches(self, position):
    for i, batch in enumerate(super().train_batches(position), position // 8):
      if i + 1 in self._bad:
        batch["x"][3] = self._value
      time.sleep(self._seconds)
      yield batch


class Task(line_task.LineTask):
  """With such points; `steep`: the loss is finite, its gradient is not."""

  def __init__(self, points=None, steep=False):
    self._points, self._steep = points or Points(), steep

  def make_data(self, split):
    return self._points

  def loss(self, variables, batch, rngs, train):
    if not self._steep:
      return super().loss(variables, batch, rngs, train)
    finite = jnp.isfinite(batch["x"])
    broken = ~finite.all()
    batch = {"x": jnp.where(finite, batch["x"], 0)}
    loss, _, state = super().loss(variables, batch, rngs, train)
    zero = jnp.where(broken, 0.0, 1.0) * variables["params"]["a"].sum()
    loss += jnp.where(broken, jnp.sqrt(zero), 0)
    return loss, {"loss": loss}, state


def not_on_a_cpu(monkeypatch):
  """Traces the forms for other platforms, to run them on a CPU."""
  monkeypatch.setattr(jax.lax, "platform_dependent",
                      lambda *args, default, **forms: default(*args))


@pytest.mark.parametrize("value", sorted(BAD))
@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize(("accumulate", "platform"), [
    (1, "cpu"), (2, "cpu"), (1, "another")])
def test_a_step_that_is_not_finite_changes_nothing(value, steep, accumulate,
                                                   platform, monkeypatch):
  if platform != "cpu":
    not_on_a_cpu(monkeypatch)
  cfg = small_runs.line(optim={"name": "lamb"},
                        train={"accumulate": accumulate})
  task = Task(steep=steep)
  tx, schedule = optim.create(cfg, 30, 1.25)
  state = state_lib.create(task, tx, 0, 0.5)
  train_step = jax.jit(lambda state, batch: step.train_step(
      state, batch, task=task, tx=tx, schedule=schedule, seed=0, ema_decay=0.5,
      accumulate=accumulate))
  good = {"x": jnp.arange(8.0)}
  state, metrics = train_step(state, good)
  assert metrics["finite"].tolist() == [True, True]
  after, metrics = train_step(state, {"x": good["x"].at[3].set(BAD[value])})
  assert metrics["finite"].tolist() == [steep, False]
  assert int(after.step) == int(state.step) + 1 == 2
  for a, b in zip(jax.tree.leaves(after.replace(step=0)),
                  jax.tree.leaves(state.replace(step=0)), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  later, _ = train_step(after, good)
  assert not np.array_equal(later.params["a"], after.params["a"])


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
def test_a_step_is_the_same_on_all_platforms(name, monkeypatch):
  """By a branch on a CPU, and by a choice of each value elsewhere."""
  cfg = small_runs.line(optim={"name": name})
  tx, schedule = optim.create(cfg, 30, 1.25)
  first = state_lib.create(Task(), tx, 0, 0.5)

  def steps():
    state = first
    for i in range(3):
      state, _ = jax.jit(lambda state, batch: step.train_step(
          state, batch, task=Task(), tx=tx, schedule=schedule, seed=0,
          ema_decay=0.5, accumulate=1))(state, {"x": i + jnp.arange(8.0)})
    return jax.tree.leaves(state)

  on_a_cpu = steps()
  not_on_a_cpu(monkeypatch)
  for a, b in zip(on_a_cpu, steps(), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
  assert not np.array_equal(on_a_cpu[0], jax.tree.leaves(first)[0])


def test_skipped_steps_are_counted_and_the_run_continues(tmp_path, caplog):
  bad = (3, 7, 8, 9, 10, 11)
  summary = run(small_runs.line(), Task(Points(bad)), tmp_path)
  assert summary["skipped_steps"] == 6 and summary["step"] == 30
  assert np.isfinite(summary["error"])
  found = {r["step"]: r for r in records(tmp_path)}
  for i, record in found.items():
    assert record["skipped_steps"] == sum(b <= i for b in bad)
    assert ("loss" in record) == (i not in bad)
  assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
  warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
  assert [w.partition(" is skipped")[0] for w in warned] == [
      f"step {i}" for i in bad]
  assert "as it is not finite: the loss, the gradient of a" in warned[0]


def test_too_many_in_a_row_end_the_run(tmp_path):
  cfg = small_runs.line(train={"max_skipped": 4})
  with pytest.raises(errors.DivergedError) as e:
    run(cfg, Task(Points(range(13, 63)), steep=True), tmp_path)
  assert e.value.exit_code == 3
  assert "steps 13 to 16 were not finite" in str(e.value)
  assert "the first one in the gradient of a;" in str(e.value)
  saved = checkpoints.Checkpoints(tmp_path, cfg.checkpoint, cfg.best_measure)
  assert saved.latest_step() == 15  # Skipped steps did not change it.
  saved.close()
  variables = checkpoints.read_variables(tmp_path)
  assert np.isfinite(variables["params"]["a"]).all()
  with pytest.raises(errors.DivergedError):  # When started again, too.
    run(cfg, Task(Points(range(13, 63)), steep=True), tmp_path)


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  cfg = small_runs.line(optim={"base_lr": 4e40, "name": "sgd"},
                      train={"steps": 1})
  with pytest.raises(errors.DivergedError, match=r"after step 1 .* params/a"):
    run(cfg, Task(), tmp_path)
  assert not [p for p in (tmp_path / "checkpoints").glob("*")
              if p.name.isdecimal()]


def test_folder_has_one_run_at_a_time(tmp_path):
  with workdir.hold(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"is in use \(pid \d+ on "):
      run(small_runs.line(), Task(), tmp_path)
    # Readers need no lock.
    assert not (tmp_path / "checkpoints").exists()
  summary = run(small_runs.line(), Task(), tmp_path)
  cfg = small_runs.line()
  with workdir.hold(tmp_path):
    result = evaluate.evaluate_checkpoint(
        cfg, Task(), devices.make_mesh(cfg), tmp_path, "last")
  assert result["error"] == summary["error"]


def test_folder_that_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.ConfigError, match=r"--workdir: .*Not a directory"):
    run(small_runs.line(), Task(), tmp_path / "file" / "run")


def test_a_path_in_which_nothing_can_be_saved_is_refused(tmp_path):
  with pytest.raises(errors.ConfigError, match="choose another path"):
    run(small_runs.line(), Task(), tmp_path / "a\\b" / "run")
  assert not list(tmp_path.iterdir())


def test_a_hung_input_is_shown(tmp_path, capfd):
  points = Points()
  slow = points.train_batches

  def hang(position):
    for i, batch in enumerate(slow(position)):
      if i == 3:
        time.sleep(2.5)
      yield batch

  points.train_batches = hang
  cfg = small_runs.line(train={"steps": 5}, log={"hang_seconds": 1.0})
  run(cfg, Task(points), tmp_path)
  err = capfd.readouterr().err
  said = "waiting for the batch of step 4; config.log.hang_seconds"
  assert 1 <= err.count(said) <= 2  # A busy machine is slow to notice.
  assert "in hang" in err and "The stack of every thread" in err


@pytest.mark.parametrize("said,kind", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
     "for HLO temporaries (36.03G) exceeds available HBM (15.75G).\nmore",
     errors.ConfigError),
    ("INTERNAL: of the compiler", jax.errors.JaxRuntimeError)])
def test_step_that_does_not_fit_is_a_config_error(
    tmp_path, monkeypatch, said, kind):
  """A supervisor must not restart it; after other errors it may."""
  class Compiler:
    def lower(self, *arguments):
      return self

    def compile(self):
      raise jax.errors.JaxRuntimeError(said)

  build = step.build
  monkeypatch.setattr(step, "build", lambda *arguments: build(
      *arguments)._replace(step=Compiler()))
  cfg = small_runs.line()
  with pytest.raises(kind, match=re.escape(said.partition("\n")[0])) as e:
    run(cfg, Task(), tmp_path)
  if kind is errors.ConfigError:
    assert "config.train.accumulate" in str(e.value)
    assert "\n" not in str(e.value)
    assert e.value.exit_code == 2


class ReplacingTask(Task):
  """With batches that mark bad examples."""

  def train_batches(self, batch_size):
    batch, = super().train_batches(batch_size)
    return [{**batch, "replaced": jax.ShapeDtypeStruct(
        (batch_size,), jnp.bool_)}]


class Replacing(Points):
  """Marks the examples at some positions of the stream as bad."""

  def __init__(self, bad, bad_to_evaluate=()):
    super().__init__()
    self._replaced, self._masked = bad, bad_to_evaluate

  def train_batches(self, position):
    for batch in super().train_batches(position):
      places = range(position, position + 8)
      yield {**batch, "replaced": np.array(
          [p in self._replaced for p in places])}
      position += 8

  def eval_batches(self):
    for i, batch in enumerate(super().eval_batches()):
      replaced = np.array([8 * i + p in self._masked for p in range(8)])
      yield {**batch, "mask": batch["mask"] & ~replaced, "replaced": replaced}


def test_bad_images_are_counted_over_restarts(tmp_path):
  """Each replaced image counts once, although some steps are repeated."""
  bad = (3, 17, 18, 100, 239)
  cfg = small_runs.line(data={"max_bad_fraction": 0.3})
  with pytest.raises(errors.DivergedError):
    run(cfg, ReplacingTask(Broken(bad, [2])), tmp_path)
  summary = run(cfg, ReplacingTask(Replacing(bad, [2])), tmp_path)
  assert summary["bad_images"] == 1 and summary["bad_train_images"] == 5
  found = {r["step"]: r["bad_images"] for r in records(tmp_path)}
  assert found == {i: sum(b < 8 * i for b in bad) for i in range(1, 31)}
  assert summary["n_examples"] == 9


class Broken(Replacing):
  """Not finite from step 17 on."""

  def train_batches(self, position):
    for i, batch in enumerate(super().train_batches(position), position // 8):
      if i >= 16:
        batch["x"] += np.nan
      yield batch


@pytest.mark.parametrize(("bad", "to_evaluate", "what"), [
    pytest.param((5, 11, 13, 14), (), "4 of 16 images are", id="train"),
    pytest.param((), (1, 2, 9), "3 of 10 evaluation images", id="evaluate"),
    pytest.param((), range(10), "10 of 10 evaluation images", id="all")])
def test_too_many_bad_images_end_the_run(tmp_path, bad, to_evaluate, what):
  fraction = 1.0 if len(to_evaluate) == 10 else 0.2
  cfg = small_runs.line(data={"max_bad_fraction": fraction})
  with pytest.raises(errors.DataError, match=what) as e:
    run(cfg, ReplacingTask(Replacing(bad, to_evaluate)), tmp_path)
  assert "max_bad_fraction" in str(e.value) and e.value.exit_code == 1


class Time:
  """Both clocks, moved by hand."""

  def __init__(self, now):
    self.now = now

  def perf_counter(self):
    return self.now + 1e6

  def time(self):
    return self.now


def test_time_is_divided_among_activities(monkeypatch):
  fake = Time(1000.0)
  monkeypatch.setattr(accounting, "time", fake)
  record = accounting.Record()
  clock = accounting.Clock(record)
  for what, seconds in (("setup", 20), ("input", 1), ("step", 9), ("input", 2),
                        ("step", 8), ("evaluation", 4), ("checkpoint", 6)):
    clock.switch_to(what)
    fake.now += seconds
  figures = clock.window(2, 100)
  assert figures["step_seconds"] == pytest.approx(10)
  assert figures["images_per_second"] == pytest.approx(10)
  assert figures["input_wait"] == pytest.approx(0.15)
  assert figures["checkpoint_stall"] == pytest.approx(6 / 50)
  assert figures["goodput"] == pytest.approx(17 / 50)
  # The machine is lost; the run is restarted 50 seconds later.
  fake.now += 50
  record.productive_seconds = clock.productive_seconds
  record = accounting.Record(**json.loads(json.dumps(
      dataclasses.asdict(record))))
  clock = accounting.Clock(record)
  clock.switch_to("step")
  fake.now += 10
  figures = clock.window(1, 100)
  assert figures["goodput"] == pytest.approx(27 / 110)
  assert figures["checkpoint_stall"] == 0 == figures["input_wait"]
  assert 2**24 < figures["host_memory_gib"] * 2**30 < 2**40


@pytest.mark.slow
def test_counts_continue_after_a_restart(tmp_path):
  bad = (3, 12)
  with pytest.raises(errors.DivergedError):
    run(small_runs.line(), Task(Points((*bad, *range(17, 40)))), tmp_path)
  summary = run(small_runs.line(), Task(Points(bad)), tmp_path)
  assert summary["skipped_steps"] == 2 + len(range(17, 26))
  after = records(tmp_path)
  assert [r["step"] for r in after] == list(range(1, 31))
  assert [r["skipped_steps"] for r in after[:17]] == [
      *[0] * 2, *[1] * 9, *[2] * 5, 3]
  assert 0 < after[-1]["goodput"] < 1


def test_agreeing_passes_exceptions_on():
  with pytest.raises(errors.DataError, match="own"), processes.agreeing():
    raise errors.DataError("own")
