"""Requests to stop, at every stage: acknowledged at once, and what is saved."""

import logging
import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import line_task
import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.runtime import devices, signals
from metaformer_jax.training import evaluate

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def usual_effect():
  """Of SIGINT, which a shell makes its background processes ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


class Signalled(line_task.LineTask):
  """Sends SIGINT to this process while the batch of some steps is made."""

  def __init__(self, *at):
    self.at = at

  def make_data(self, split):
    at = self.at

    class Points(line_task.Points):
      def train_batches(self, position):
        for batch in super().train_batches(position):
          position += 8
          if position // 8 in at:
            os.kill(os.getpid(), signal.SIGINT)
          yield batch

    return Points()


def wait_until(done):
  end = time.monotonic() + 10
  while not done():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_a_listener_gets_every_signal_and_restores_the_handlers():
  before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
  got = []
  with signals.Listener(got.append):
    for i, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGINT)):
      os.kill(os.getpid(), number)
      wait_until(lambda i=i: len(got) > i)
  assert got == [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
  assert before == [signal.getsignal(n)
                    for n in (signal.SIGTERM, signal.SIGINT)]
  assert signal.set_wakeup_fd(-1) == -1


def test_before_the_first_step_nothing_is_saved(tmp_path):
  cfg = small_runs.line(log={"every_steps": 5})
  with pytest.raises(KeyboardInterrupt):  # Its usual effect outside `command`.
    small_runs.run(cfg, Signalled(1), tmp_path)
  assert not any((tmp_path / "checkpoints").iterdir())
  assert not small_runs.records(tmp_path)


def test_later_the_step_is_saved_whatever_follows(tmp_path, caplog):
  """Every signal is acknowledged; the run resumes as if there had been none."""
  cfg = small_runs.line(train={"steps": 12})
  whole = small_runs.run(cfg, line_task.LineTask(), tmp_path / "whole")
  caplog.set_level(logging.WARNING)
  with pytest.raises(errors.Preempted, match="SIGINT at step") as e:
    small_runs.run(cfg, Signalled(7, 8), tmp_path / "parts")
  assert e.value.exit_code == 143
  assert caplog.messages[0] == (
      "SIGINT: saving after this step, then ending; further signals change "
      "nothing")
  assert set(caplog.messages[1:]) <= {
      "SIGINT: the run is already ending; it saves first"}
  saved = max(int(p.name) for p in (tmp_path / "parts/checkpoints").iterdir())
  assert 7 <= saved < 12
  summary = small_runs.run(cfg, line_task.LineTask(), tmp_path / "parts")
  assert summary["error"] == whole["error"]


def test_an_evaluation_of_a_checkpoint_has_nothing_to_save(tmp_path):
  cfg = small_runs.line(train={"steps": 2})
  small_runs.run(cfg, line_task.LineTask(), tmp_path)

  class Interrupted(line_task.LineTask):
    def make_evaluators(self):
      os.kill(os.getpid(), signal.SIGINT)
      return super().make_evaluators()

  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate_checkpoint(cfg, Interrupted(), devices.make_mesh(cfg),
                                 tmp_path, "last")


class Hung(line_task.Points):
  """At some batch, a signal comes and the next batch does not."""

  def __init__(self, train_at=0, eval_at=0):
    self._train_at, self._eval_at = train_at, eval_at

  def _hang(self):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)

  def train_batches(self, position):
    for batch in super().train_batches(position):
      position += 8
      if position // 8 == self._train_at:
        self._hang()
      yield batch

  def eval_batches(self):
    for i, batch in enumerate(super().eval_batches(), 1):
      if i == self._eval_at:
        self._hang()
      yield batch


def with_data(train, evaluation):
  task = line_task.LineTask()
  task.make_data = {"train": train, "eval": evaluation}.get
  return task


@pytest.mark.parametrize("hung,saved", [
    pytest.param({"train_at": 8}, 7, id="train"),
    pytest.param({"eval_at": 2}, 12, id="eval", marks=pytest.mark.slow)])
def test_an_input_that_hangs_does_not_keep_a_run_from_saving(
    tmp_path, monkeypatch, hung, saved):
  """What was trained is saved, and the run continues as if nothing was."""
  monkeypatch.setattr(signals, "_INPUT_SECONDS", 0.3)
  cfg = small_runs.line(train={"steps": 20})
  whole = small_runs.run(cfg, line_task.LineTask(), tmp_path / "whole")
  data = [Hung(**hung), Hung(**hung)]
  with pytest.raises(errors.Preempted, match=(
      r"^SIGTERM: no batch came for 0\.3 s; the same command")) as e:
    small_runs.run(cfg, with_data(*data), tmp_path / "parts")
  assert e.value.exit_code == 143
  steps = [int(p.name) for p in (tmp_path / "parts/checkpoints").iterdir()]
  assert max(steps) == saved
  summary = small_runs.run(cfg, line_task.LineTask(), tmp_path / "parts")
  assert summary["error"] == whole["error"]


class Ending(line_task.Points):
  """Batches that end with an error, as if a worker process was killed."""

  def __init__(self, at):
    self._at = at

  def train_batches(self, position):
    for batch in super().train_batches(position):
      position += 8
      if position // 8 == self._at:
        raise errors.WorkerLostError("killed")
      yield batch


@pytest.mark.parametrize("at,saved", [(1, None), (2, 1), (6, 5), (9, 8)])
def test_a_run_whose_input_ends_saves_its_last_step(tmp_path, at, saved):
  """At step 5 there is a checkpoint already; before step 1 nothing is saved."""
  cfg = small_runs.line(train={"steps": 12})
  task = with_data(Ending(at), line_task.Points())
  with pytest.raises(errors.WorkerLostError, match="killed"):
    small_runs.run(cfg, task, tmp_path)
  steps = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
  assert max(steps, default=None) == saved
  # Resumed, it ends at once, and has nothing more to save.
  task = with_data(Ending((saved or 0) + 1), line_task.Points())
  with pytest.raises(errors.WorkerLostError, match="killed"):
    small_runs.run(cfg, task, tmp_path)
  assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir()] == steps


# A compiler, which does not return to Python for long; and other code.
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
IN_PYTHON = "time.sleep(60)"
SCRIPT = """
import hashlib, sys, time
from metaformer_jax import command
with command.one_line_errors():
  try:
    print("ready", flush=True)
    {work}
  finally:
    print("orderly", flush=True)
"""


@pytest.mark.parametrize("work,number,out", [
    (IN_C, signal.SIGINT, ""), (IN_PYTHON, signal.SIGINT, "orderly\n"),
    (IN_PYTHON, signal.SIGTERM, "orderly\n")])
def test_entry_points_end_soon_with_one_line(work, number, out):
  with subprocess.Popen(
      [sys.executable, "-c", SCRIPT.format(work=work)], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
    try:
      assert process.stdout.readline() == "ready\n"
      time.sleep(0.2)  # Until the work has begun.
      process.send_signal(number)
      start = time.monotonic()
      assert select.select([process.stderr], [], [], 5)[0]
      said = process.stderr.readline()
      assert process.wait(10) == 143
      assert time.monotonic() - start < 10
      assert said == (f"Preempted: {number.name}: ending; nothing is to be "
                      "saved\n")
      assert (process.stdout.read(), process.stderr.read()) == (out, "")
    finally:
      process.kill()
