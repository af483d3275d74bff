"""Runs that hang: shown, and ended in the end; slow ones are not."""

import os
import pathlib
import subprocess
import sys
import time

import line_task
import pytest
import small_runs

from metaformer_jax.runtime import watchdog
from metaformer_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]

SCRIPT = """
import ctypes, hashlib, time
from metaformer_jax.runtime import watchdog
class Slow:
  def __del__(self):
    print("cleaned up", flush=True)
slow = Slow()
try:
  with watchdog.Watchdog(60, {seconds}) as dog:
    dog.beat("batch 1", limited=True)
    time.sleep(0.1)
    dog.beat("batch 2", limited={limited})
    {work}
finally:
  print("went on", flush=True)
"""
IN_PYTHON = "time.sleep({})"
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
WITH_LOCK = "ctypes.PyDLL(None).sleep({})"  # Of Python: no other thread runs.


def run(work, seconds=1.0, limited=True):
  start = time.monotonic()
  done = subprocess.run(
      [sys.executable, "-c", SCRIPT.format(
          work=work, seconds=seconds, limited=limited)],
      capture_output=True, text=True, timeout=100,
      env={**os.environ, "PYTHONPATH": str(ROOT)})
  assert time.monotonic() - start < 60
  return done


@pytest.mark.parametrize("work", [IN_PYTHON.format(600), IN_C])
def test_a_process_that_hangs_ends_at_once(work):
  """With the reason and all stacks; no other code runs, nothing is saved."""
  done = run(work)
  assert done.returncode == 1 and done.stdout == ""
  line, *stacks = done.stderr.splitlines()
  assert line == (
      "no progress for 1 s, waiting for batch 2; config.log.exit_after_seconds "
      "= 1: ending with exit code 1; nothing is saved, and the same command "
      "continues from the last checkpoint. The stack of every thread:")
  assert any("in <module>" in text for text in stacks)


def test_even_one_that_keeps_pythons_lock():
  done = run(WITH_LOCK.format(600))
  assert done.returncode == 1 and done.stdout == ""
  assert "in <module>" in done.stderr


@pytest.mark.parametrize("work,how", [
    (IN_PYTHON, {"limited": False}), (WITH_LOCK, {"limited": False}),
    (IN_PYTHON, {"seconds": None}), (IN_PYTHON, {"seconds": 0})])
def test_what_is_not_limited_may_take_any_time(work, how):
  done = run(work.format(2), **how)
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == "went on\ncleaned up\n"


def test_the_phases_of_a_run_that_are_limited(tmp_path, monkeypatch):
  """Batches and steps; not the first state, compilations, saves, measures."""
  found = {}
  beat = watchdog.Watchdog.beat

  def noted(self, waiting_for, limited=False):
    found.setdefault(waiting_for, []).append(limited)
    beat(self, waiting_for, limited)

  monkeypatch.setattr(watchdog.Watchdog, "beat", noted)
  compile_step = loop.Run._compile

  def compiled(self):
    assert not self.watchdog._limited
    compile_step(self)

  monkeypatch.setattr(loop.Run, "_compile", compiled)
  cfg = small_runs.line(train={"steps": 4}, eval={"every_epochs": 1.6},
                        checkpoint={"every_steps": 2})
  small_runs.run(cfg, line_task.LineTask(), tmp_path)
  assert found == {
      **{f"the batch of step {i}": [True] for i in range(1, 5)},
      "step 1": [False],  # It is compiled.
      **{f"step {i}": [True] for i in range(2, 5)},
      **{f"the checkpoint of step {i}": [False] for i in (2, 4)},
      # The second evaluation compiles nothing.
      "batch 0 of an evaluation": [True, False, True, True],
      "batch 1 of an evaluation": [True] * 4,
      "batch 2 of an evaluation": [True] * 2,
      "the measures of an evaluation": [False] * 2}
