"""Threads and worker processes that read ahead, and how they end."""

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from loader_cases import Numbers, draw, take

from metaformer_jax import errors
from metaformer_jax.data import loader, readers

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Odd:
  """Arrays of many types and shapes, which depend on the number alone."""

  seed: int

  def __call__(self, number):
    rng = np.random.default_rng((self.seed, number))
    dtypes = ("?", "u1", "i4", ">u2", "f4", "i8", "f8", "c16", "U3")
    return {f"{i}": (100 * rng.random((2, *rng.integers(0, 40, rank)))
                     ).astype(dtypes[rng.integers(len(dtypes))])
            for i, rank in enumerate(rng.integers(0, 4, rng.integers(1, 5)))}


def test_parts_of_any_arrays_come_as_they_are():
  """They grow and shrink, and some are empty."""
  reader = readers.Workers(Odd(0), 2, 3)
  try:
    for numbers in (range(40), range(7), range(40, 60)):
      for i, got in zip(numbers, readers.batches(reader, numbers, 1),
                        strict=True):
        want = Odd(0)(i)
        assert got.keys() == want.keys()
        for name in want:
          assert got[name].dtype == want[name].dtype.newbyteorder("=") or (
              got[name].dtype == want[name].dtype)
          assert got[name].flags.owndata
          np.testing.assert_array_equal(got[name], want[name])
  finally:
    reader.close()


@dataclasses.dataclass(frozen=True)
class Place:
  """A transform: the index, and the process that made it."""

  seconds: float = 0.0

  def __call__(self, record, rng):
    time.sleep(self.seconds)
    return {"index": np.int32(record["label"]), "pid": np.int64(os.getpid())}


def read(batches):
  got = list(batches)
  return {k: np.concatenate([b[k] for b in got]) for k in got[0]}


def test_evaluations_share_their_workers():
  """Started once; again only if an evaluation was not read to its end."""
  made = loader.Loader(Numbers(10), Place(), 3, workers=2)
  first, second = read(made.eval_batches()), read(made.eval_batches())
  np.testing.assert_equal(first, second)
  assert len(set(first["pid"].tolist())) == 2
  take(made.eval_batches(), 1)
  third = read(made.eval_batches())
  assert third["index"].tolist() == first["index"].tolist()
  assert not set(third["pid"].tolist()) & set(first["pid"].tolist())
  # Training has its own.
  batches = made.train_batches(0)
  assert not set(next(batches)["pid"].tolist()) & set(third["pid"].tolist())
  batches.close()


def test_training_takes_the_workers_that_were_started():
  """From any position; what it returns ends them, used or not."""
  made = loader.Loader(Numbers(10), Place(), 4, workers=2)
  before = set(multiprocessing.active_children())
  end = made.start_workers()
  started = {p.pid for p in set(multiprocessing.active_children()) - before}
  assert len(started) == 2
  batches = made.train_batches(8)
  first, second = next(batches), next(batches)
  assert set(first["pid"].tolist()) | set(second["pid"].tolist()) == started
  expected = loader.Loader(Numbers(10), Place(), 4).train_batches(8)
  for batch in (first, second):
    assert batch["index"].tolist() == next(expected)["index"].tolist()
  batches.close()
  expected.close()
  end()
  assert set(multiprocessing.active_children()) <= before
  end = made.start_workers()
  end()
  assert set(multiprocessing.active_children()) <= before
  batches = made.train_batches(8)  # They are started again.
  assert next(batches)["index"].tolist() == first["index"].tolist()
  batches.close()


def test_a_worker_that_is_killed_is_reported():
  made = loader.Loader(Numbers(10), draw, 4, workers=2)
  before = set(multiprocessing.active_children())
  batches = made.train_batches(0)
  next(batches)
  workers = set(multiprocessing.active_children()) - before
  os.kill(min(workers, key=lambda p: p.pid).pid, signal.SIGKILL)
  with pytest.raises(errors.WorkerLostError, match=(
      r"^config\.data\.workers: worker process [12] of 2 \(pid \d+\) was ended "
      "by SIGKILL, as when memory runs out; use fewer workers")):
    for _ in range(20):
      next(batches)
  assert not any(p.is_alive() for p in workers)


class Ends:
  """A transform that ends its process, as a crash in a decoder does."""

  def __call__(self, record, rng):
    os._exit(7)


def test_a_worker_that_ends_by_itself_is_reported():
  made = loader.Loader(Numbers(10), Ends(), 4, workers=1)
  with pytest.raises(errors.WorkerLostError, match=r"has ended with code 7"):
    next(made.eval_batches())


def test_what_no_process_can_be_sent_is_a_config_error():
  made = loader.Loader(Numbers(10), lambda record, rng: {}, 4, workers=1)
  with pytest.raises(errors.ConfigError,
                     match=r"^config\.data\.workers: .* or use 0 workers$"):
    next(made.train_batches(0))


class Broken:
  """A stream with a mistake."""

  def __call__(self, number):
    raise ZeroDivisionError("a mistake")


def test_a_mistake_in_a_worker_has_its_traceback():
  with pytest.raises(RuntimeError, match=r"(?s)in __call__.*Error: a mistake"):
    next(readers.batches(readers.Workers(Broken(), 1, 2), range(4), 1))


# In processes of their own.

SCRIPT = """
import os, signal, sys, threading, time
sys.path.insert(0, "tests")
import numpy as np
import loader_cases, test_readers
from metaformer_jax.data import loader, readers

def main():
  {}

if __name__ == "__main__":
  main()
"""


@contextlib.contextmanager
def script(tmp_path, body: str) -> Iterator[subprocess.Popen]:
  """A process that runs it; nothing of its group is left at the end."""
  path = tmp_path / "script.py"
  path.write_text(SCRIPT.format(body.strip().replace("\n", "\n  ")))
  with subprocess.Popen(
      [sys.executable, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
      stderr=subprocess.PIPE, start_new_session=True,
      env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'data'}"},
      ) as process:
    try:
      yield process
    finally:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# As a run does once it can save, the parent notes signals.
SIGNALLED = """
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, lambda *args: None)
def disturb():
  while True:
    os.killpg(0, signal.SIGINT)
    os.killpg(0, signal.SIGTERM)
    time.sleep(0.003)
threading.Thread(target=disturb, daemon=True).start()
made = loader_cases.numbers(workers=2)
print(loader_cases.take(made.train_batches(0), 5)["index"].tolist())
print(len(list(made.eval_batches())))
"""


def test_signals_to_the_group_do_not_end_workers_that_start(tmp_path):
  """Hundreds, from before the first instruction of a worker on."""
  with script(tmp_path, SIGNALLED) as process:
    out, err = process.communicate(timeout=120)
  expected = take(loader.Loader(Numbers(10), draw, 4).train_batches(0), 5)
  assert (out, err) == (f"{expected['index'].tolist()}\n3\n", "")
  assert process.returncode == 0


UNCLOSED = """
batches = loader_cases.numbers(workers=2).train_batches(0)
evaluation = loader_cases.numbers(workers=1)
print(len(next(batches)["index"]), len(list(evaluation.eval_batches())),
      flush=True)
{}
"""


def shared_memory() -> set[str]:
  with contextlib.suppress(FileNotFoundError):
    return {name for name in os.listdir("/dev/shm")
            if name.startswith(("psm_", "sem."))}
  return set()


@pytest.mark.parametrize("end,code", [
    ("pass", 0), ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)])
def test_nothing_is_left_however_the_process_ends(tmp_path, end, code):
  """No process, no shared memory with a name, no line about either."""
  before = shared_memory()
  with script(tmp_path, UNCLOSED.format(end)) as process:
    # Ends when all that have it as their stdout have ended.
    out, err = process.communicate(timeout=60)
  assert (out, err, process.returncode) == ("4 3\n", "", code)
  assert not shared_memory() - before


# SIGINT may be ignored where the tests run, as in the background of a shell.
HUNG = """
signal.signal(signal.SIGINT, signal.default_int_handler)
made = loader.Loader(loader_cases.Numbers(9), test_readers.Place(600), 3)
batches = made.train_batches(0)
threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
  next(batches)
except KeyboardInterrupt:
  print("interrupted")
"""


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path):
  with script(tmp_path, HUNG) as process:
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
  assert (out, err, process.returncode) == ("interrupted\n", "", 0)
  assert time.monotonic() - start < 50


def test_batches_are_read_ahead_but_not_without_end():
  asked = []

  def read(number):
    asked.append(number)
    return {"n": np.array([number])}

  reader = readers.Threads(read, 3, 8)
  got = readers.batches(reader, itertools.count(), 2)
  assert next(got)["n"].tolist() == [0, 1]
  deadline = time.monotonic() + 10
  while len(asked) < 10 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert sorted(asked) == list(range(10))
  got.close()
