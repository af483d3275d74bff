"""Measuring processes, seen from the tool: they are asked in turns.

Each stays alive, so that it compiles once, and only one computes at a time.
`serving` has their side, and the protocol.
"""

import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.config import tasks as sections
from metaformer_jax.config.hub import timm

_THEIRS = pathlib.Path(__file__).with_name("theirs.py")


class WorkerError(errors.UserError):
  """A measuring process has failed."""


class Worker:
  """A measuring process.

  Attributes:
    name: in tables.
    facts: of the program, once `start` has returned.
    rounds: what it has measured.
    memory: facts of its memory, after the last round.
  """

  def __init__(self, name: str, command: Sequence[str], spec: Mapping[str, Any],
               env: Mapping[str, str] | None = None, foreign: bool = False):
    """Does not start it.

    Args:
      name: in tables.
      command: that runs `serving.serve`.
      spec: the first line of the protocol.
      env: of the process.
      foreign: whether it runs other code than this package's: its stderr is not
        shown, and its errors are not known.
    """
    self.name, self._command, self._spec = name, command, spec
    self._env, self._foreign = env, foreign
    self.facts: dict[str, Any] = {}
    self.rounds: list[dict[str, Any]] = []
    self.memory: dict[str, Any] = {}

  @contextlib.contextmanager
  def running(self) -> Iterator["Worker"]:
    """Within it, the process is alive and ready.

    Raises:
      WorkerError: it cannot be started, or has failed.
      UserError: what of the experiment is wrong.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as self._log:
      try:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log if self._foreign else None, text=True,
            env=self._env)
      except OSError as e:
        raise WorkerError(f"{self._command[0]}: cannot be run: {e}") from e
      try:
        self.facts = self._ask(self._spec)["ready"]
        yield self
      finally:
        self._process.terminate()
        self._process.communicate()

  def measure(self, seconds: float) -> None:
    """One round of about so many seconds."""
    found = self._ask({"round": seconds})
    self.memory = {key: found.pop(key) for key in ("memory", "memory_of")}
    self.rounds.append(found)

  def trace(self, folder: pathlib.Path) -> list[dict[str, Any]]:
    """The operations of a profile, which is written into the folder."""
    return self._ask({"trace": str(folder)})["operations"]

  def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(request) + "\n")
      self._process.stdin.flush()
    line = self._process.stdout.readline()
    try:
      answer = json.loads(line)
    except ValueError:
      raise WorkerError(f"{self.name}: {self._death(line)}") from None
    if "error" in answer:
      kind = getattr(errors, answer["type"], None)
      if kind and not self._foreign:
        raise kind(answer["error"])
      raise WorkerError(f"{self.name}: {answer['type']}: {answer['error']}")
    return answer

  def _death(self, line: str) -> str:
    """Why there was no answer."""
    if line:
      return f"answered {errors.one_line(line)[:100]!r}, not JSON"
    code = self._process.wait()
    self._log.seek(0)
    said = self._log.read().strip().splitlines()[-1:]
    return (f"{self._command[0]} ended with {code}"
            + (f": {said[0]}" if said else ""))

  @property
  def images_per_second(self) -> list[float]:
    """Of each round, with a batch of `batch_size` images."""
    batch_size = self._spec["batch_size"]
    return [batch_size * found["calls"] / found["seconds"]
            for found in self.rounds]

  def row(self) -> dict[str, Any]:
    """All that was measured, as a row of a table; times in ms, MiB."""
    latencies = [1e3 * x for found in self.rounds for x in found["latencies"]]
    return {
        "images/s": statistics.median(self.images_per_second),
        **{f"p{q} ms": percentile(latencies, q) for q in (50, 90, 99)},
        "calls": len(latencies), "MiB": self.memory["memory"] / 2**20,
        "memory of": self.memory["memory_of"],
        "compile s": self.facts["compile_seconds"],
        "versions": ", ".join(f"{name} {version}" for name, version in
                              self.facts["versions"].items())}


def percentile(values: Sequence[float], q: float) -> float:
  """The q-th percentile; between two values, in proportion."""
  values = sorted(values)
  low, part = divmod((len(values) - 1) * q / 100, 1)
  low = int(low)
  high = min(low + 1, len(values) - 1)
  return values[low] + part * (values[high] - values[low])


def ratios(one: Worker, other: Worker) -> dict[str, Any]:
  """How many times as fast one is: over pairs of rounds next to each other."""
  found = [a / b for a, b in zip(one.images_per_second,
                                 other.images_per_second)]
  return {"than": other.name, "median": statistics.median(found),
          "min": min(found), "max": max(found), "pairs": len(found)}


def in_turns(workers: Sequence[Worker], rounds: int, seconds: float,
             say: Callable[[str], None]) -> dict[str, str]:
  """Measures all in turns; the first one must not fail.

  Args:
    workers: that are running.
    rounds: of each.
    seconds: about how long a round takes.
    say: is called with a line about each round, so that what was measured is
      not lost if the command is stopped.

  Returns:
    Why those that have failed did, by name; they are left out from then on.

  Raises:
    UserError: the first one has failed.
  """
  failed = {}
  for i in range(rounds):
    for worker in workers:
      if worker.name in failed:
        continue
      try:
        worker.measure(seconds)
      except WorkerError as e:
        if worker is workers[0]:
          raise
        failed[worker.name] = errors.one_line(e)
    say(f"round {i + 1} of {rounds}: images/s " + ", ".join(
        f"{worker.images_per_second[-1]:.1f} {worker.name}"
        for worker in workers if worker.name not in failed))
  return failed


def ours(cfg: Mapping[str, Any], mode: str, batch_size: int,
         n_devices: int | None, env: Mapping[str, str]) -> Worker:
  """A step of this package, or its prediction; `ours.Program`.

  Args:
    cfg: the experiment, as nested dicts.
    mode: "train" or "infer".
    batch_size: of the experiment.
    n_devices: to use; None for all.
    env: of the process.
  """
  command = [sys.executable, "-m", "metaformer_jax.benchmark.ours"]
  return Worker("metaformer_jax", command, {
      "config": cfg, "mode": mode, "batch_size": batch_size,
      "n_devices": n_devices}, env)


def theirs(python: str, spec: Mapping[str, Any]) -> Worker:
  """timm's model in another interpreter; `theirs.Program`."""
  return Worker(f"timm {spec['form']}", [python, str(_THEIRS)], spec,
                foreign=True)


def timm_spec(cfg: schema.Experiment, mode: str) -> dict[str, Any]:
  """What `benchmark.theirs` is to prepare, but for the form and the platform.

  Raises:
    ConfigError: timm does not have the model.
  """
  if not isinstance(cfg.task, sections.Classification):
    raise errors.ConfigError(f"--against=timm: timm has classifiers only, no "
                             f"models for {cfg.task.name}")
  try:
    found = timm.write(cfg, in_chans=3)
  except ValueError as e:
    raise errors.ConfigError(f"--against=timm: {e}") from e
  optim, n = cfg.optim, cfg.train.batch_size
  return {
      "model": found["architecture"],
      "model_args": found.get("model_args", {}), "mode": mode,
      "batch_size": n, "dtype": cfg.model.dtype,
      "image_size": cfg.task.image_size, "num_classes": cfg.task.num_classes,
      "drop_path_rate": cfg.model.drop_path_rate or 0.0,
      "label_smoothing": cfg.task.label_smoothing,
      "optim": {"lr": optim.base_lr * n / 1024,
                "weight_decay": optim.weight_decay,
                "betas": (optim.beta1, optim.beta2), "eps": optim.eps or 1e-8},
      "threads": len(os.sched_getaffinity(0))}
