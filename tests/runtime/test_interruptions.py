"""Runs that are killed or stopped repeatedly, and lose nothing."""

import dataclasses
import itertools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pods
import pytest
import small_runs

from metaformer_jax.config import schema, typed
from metaformer_jax.tasks import classification

ROOT = pathlib.Path(__file__).parents[2]
INTERVAL = 6


def experiment_of(steps: int, dim: int) -> schema.Experiment:
  """The state grows with the square of `dim`, and how long it is written."""
  cfg = pods.small()
  return dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, dims=(dim,)),
      train=dataclasses.replace(cfg.train, steps=steps),
      eval=schema.Eval(every_epochs=1.0),
      checkpoint=schema.Checkpoint(every_steps=INTERVAL))


class Runs:
  """Starts runs in processes of eight devices, and ends them."""

  def __init__(self, folder: pathlib.Path, cfg: schema.Experiment):
    self.cfg, self._folder = cfg, folder
    (folder / "config.json").write_text(typed.to_json(cfg))
    self._server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "fork_server.py")], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)})
    self.workdir = folder / "interrupted"
    self.pid = None

  def _ask(self, question: str) -> int:
    print(question, file=self._server.stdin, flush=True)
    return int(self._server.stdout.readline())

  def start(self, workdir=None) -> None:
    self.stderr = self._folder / "stderr"
    self.stderr.unlink(missing_ok=True)
    self.pid = self._ask(json.dumps([str(self.stderr), [
        f"--config_json={self._folder / 'config.json'}",
        f"--workdir={workdir or self.workdir}"]]))

  def finish(self) -> int:
    return self._ask(f"wait {self.pid}")

  def over(self) -> bool:
    state = pathlib.Path(f"/proc/{self.pid}/stat").read_text()
    return state.rpartition(")")[2].split()[0] == "Z"

  def last_step(self) -> int:
    return max(pods.losses(self.workdir), default=0)

  def saved(self) -> list[int]:
    folder = self.workdir / "checkpoints"
    return sorted(int(p.parent.name) for p in folder.glob("*/manifest.json"))

  def saving(self) -> bool:
    return any((self.workdir / "checkpoints").glob("*.unfinished"))

  def end(self, number: signal.Signals, rng: random.Random,
          during_save: bool) -> bool:
    """Sends a signal at a random moment; returns whether it was saving."""
    first = self.last_step()
    until = first + rng.randrange(INTERVAL)
    while not self.over() and self.last_step() <= until:
      time.sleep(0.002)
    while during_save and not self.over() and not self.saving():
      time.sleep(0.0005)
    time.sleep(rng.random() * 0.03)
    os.kill(self.pid, signal.SIGSTOP)  # So that nothing changes.
    saving = self.saving()
    os.kill(self.pid, number)
    if number != signal.SIGKILL:
      os.kill(self.pid, signal.SIGCONT)
    return saving

  def close(self) -> None:
    self._server.stdin.close()
    self._server.wait()
    self._server.stdout.close()


@pytest.fixture
def runs(tmp_path, request):
  started = Runs(tmp_path, experiment_of(*request.param))
  yield started
  started.close()


def arrays_of(workdir, step):
  """Name -> bytes of every array of a step."""
  folder = workdir / "checkpoints" / str(step)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  found = {}
  for item in (p for p in folder.iterdir() if p.is_dir()):
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
        reader.metadata(item).item_metadata.tree)
    tree = reader.restore(item, args=ocp.args.PyTreeRestore(
        restore_args=as_numpy))
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
      found[item.name + jax.tree_util.keystr(path)] = np.asarray(x).tobytes()
  return found


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


@pytest.mark.parametrize(("numbers", "runs"), [
    pytest.param((KILL, TERM), (36, 64), id="few",
                 marks=pytest.mark.slow),
    pytest.param((KILL,) * 100, (3000, 256), id="kills",
                 marks=pytest.mark.soak),
    pytest.param((TERM, KILL, INT, KILL, TERM) * 10, (1000, 64), id="signals",
                 marks=pytest.mark.soak)], indirect=["runs"])
def test_interrupted_run_equals_an_uninterrupted_one(runs, numbers):
  """Bit for bit: losses, state and batches, however often it is interrupted.

  A kill during a save loses that save, and the run resumes from the one before.
  """
  rng = random.Random(0)
  n_saving, most_lost = 0, 0
  for i, number in enumerate(numbers):
    runs.start()
    n_saving += runs.end(number, rng, during_save=i % 4 != 3)
    code = runs.finish()
    saved, reached = runs.saved(), runs.last_step()
    lost = reached - max(saved, default=0)
    if number == KILL:
      assert code == -KILL, runs.stderr.read_text()
      assert lost <= 2 * INTERVAL + 1, (i, saved, reached)
    else:
      assert code == 143, runs.stderr.read_text()
      # The last line that the run wrote may be of the step before.
      assert lost in (0, -1), (i, saved, reached)
      assert f"{number.name} at step {saved[-1]}" in runs.stderr.read_text()
    most_lost = max(most_lost, lost)
  print(f"{len(numbers)} interruptions, {n_saving} of them during a save; at "
        f"most {most_lost} steps were repeated")
  assert n_saving >= 0.6 * len(numbers) or numbers.count(KILL) < 100
  with (runs.workdir / "metrics.jsonl").open("a") as f:
    f.write('{"step": 99, "spl')  # As a kill during a write leaves it.
  runs.start()
  assert runs.finish() == 0, runs.stderr.read_text()
  assert (f"resumed {runs.workdir} at step {saved[-1]}"
          in runs.stderr.read_text())
  assert_as_uninterrupted(runs)


def assert_as_uninterrupted(runs):
  whole = runs.workdir.with_name("whole")
  runs.start(whole)
  assert runs.finish() == 0, runs.stderr.read_text()
  assert pods.losses(runs.workdir) == pods.losses(whole)
  assert small_runs.records(runs.workdir, "eval") == small_runs.records(
      whole, "eval")
  last = runs.cfg.train.steps
  got, want = arrays_of(runs.workdir, last), arrays_of(whole, last)
  assert any("ema_params" in name for name in want)
  assert any("opt_state" in name for name in want)
  assert got == want


def test_the_next_batches_are_the_same():
  cfg = pods.small()
  data = classification.create(cfg)[1].make_data("train")

  def batches(step, n):
    stream = data.train_batches(step * cfg.train.batch_size)
    yield from itertools.islice(stream, n)
    stream.close()

  whole = list(batches(0, 40))
  for step in (1, 7, 19):
    for got, want in zip(batches(step, 20), whole[step:step + 20], strict=True):
      assert all(np.array_equal(got[name], want[name]) for name in want)
