"""Saves, keeps and restores the steps of a workdir.

`arrays` writes them into their folders, which are steps when they have their
manifests (`steps`). `manifest` knows whether they are still intact: Orbax
itself restores much damaged data without an error.
"""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax

from metaformer_jax import errors, storage
from metaformer_jax.checkpoints import arrays, manifest, outages, steps
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import accounting, leases, processes
from metaformer_jax.runtime import workdir as workdir_lib

log = logging.getLogger(__name__)

Trees = arrays.Trees


class Checkpoints:
  """The checkpoints of a workdir, saved in the background.

  Reading changes nothing in the workdir; `save` and `latest_good` are for the
  run that owns it. With several processes, all make the same calls, and the
  first one looks at the disk for all.
  """

  def __init__(self, workdir: pathlib.Path, cfg: schema.Checkpoint,
               best: tasks.Measure,
               lock: workdir_lib.Lock | leases.Lease | None = None):
    """Takes the workdir, how many steps to keep, and what ranks them.

    Each save requires `lock`, which the run's first process holds.
    """
    self.directory = workdir_lib.real_path(workdir) / "checkpoints"
    self._cfg, self._best, self._lock = cfg, best, lock
    self._store = arrays.Store()
    self._thread = futures.ThreadPoolExecutor(1, "checkpoints")
    self._last: futures.Future | None = None
    self._failure: tuple[int, Exception] | None = None
    self._verified: int | None = None
    self._is_remote = storage.is_remote(self.directory)
    self._outage = outages.Outage(self.directory, lock)

  def save(self, step: int, trees: Trees, record: accounting.Record,
           data: Mapping[str, Any] | None = None, *, needed: bool = True,
           before: Callable[[], None] = lambda: None) -> None:
    """Starts to save a step; returns once it is copied off the devices.

    While object storage does not answer, a step that is not needed is left out
    with a warning, for at most `outages.PATIENCE` seconds. One that is needed
    is complete when this returns.

    Args:
      step: how many steps the state has taken.
      trees: the state, by item.
      record: what the run has counted.
      data: the fingerprint of the data set, by split.
      needed: the run ends with this step.
      before: what must be stored before it is a step.

    Raises:
      StorageError: this save, or the previous one, cannot be written; or the
        workdir's lock is lost.
    """
    facts = {"step": step, "record": dataclasses.asdict(record), "metrics": {},
             "data": dict(data or {}), "tree": arrays.described(trees),
             "before": before}

    def start():
      self.wait()
      try:
        self._begin(step, trees)
      except Exception as e:
        self._failure = step, e
        self.check()
      else:
        self._start(self._complete, step, {**facts})

    if not self._is_remote:
      start()
    elif needed:
      self._persist(lambda: (start(), self.wait(), self._outage.require(step)),
                    step)
    elif self._outage.can_save_after(step, self._last):
      # Requests take long, and the devices do not wait for them.
      self.wait()
      self._start(self._save, step, {
          **facts, "trees": arrays.copied(trees)})

  def _begin(self, step: int, trees: Trees) -> None:
    """Starts to write a step; returns once it is copied off the devices."""
    folder = self.directory / str(step)
    if jax.process_index() == 0:
      self._require_lock()
      steps.begin(folder)
    self._store.save(folder, trees)

  def add_metrics(self, step: int, metrics: Mapping[str, float],
                  before: Callable[[], None] = lambda: None) -> None:
    """Adds an evaluation's measures to a step that is saved, or being saved.

    Those of a step that was left out are dropped.

    Args:
      step: its number.
      metrics: of this step's state.
      before: as for `save`.

    Raises:
      ConfigError: they do not include the one that ranks checkpoints.
    """
    wanted = self._best.name
    if self._cfg.keep_best and wanted not in metrics:
      raise errors.ConfigError(
          f"config.checkpoint.best_metric: {wanted!r} was not measured"
          f"{errors.did_you_mean(wanted, metrics)}")
    self._start(self._rank, step, {"before": before, "metrics": {
        k: v if type(v) is int else float(v) for k, v in metrics.items()}})

  def _start(self, task: Callable[[int, dict], None], step: int,
             facts: dict[str, Any]) -> None:
    """Starts a task in the background, after the ones before."""
    def run():
      try:
        if not self._failure:
          task(step, facts)
      except Exception as e:
        self._failure = step, e
    self._last = self._thread.submit(run)

  def _save(self, step: int, facts: dict[str, Any]) -> None:
    """Writes a step and completes it, if object storage answers."""
    trees = facts.pop("trees")
    if self._outage.can_save(step, f"the save of step {step}"):
      self._begin(step, trees)
      self._complete(step, facts)

  def _complete(self, step: int, facts: dict[str, Any]) -> None:
    """Once everything is written, makes it a step."""
    self._store.wait()  # For every process.
    if jax.process_index():
      return
    folder, before = self.directory / str(step), facts.pop("before")

    def commit():
      before()
      arrays.require(folder, facts["tree"])
      self._require_lock()
      manifest.write(folder, **facts)
      steps.finish(folder)
      self._outage.end()

    self._persist(commit, step)
    self._persist(self._prune, step)

  def _rank(self, step: int, facts: dict[str, Any]) -> None:
    def commit():
      facts["before"]()
      self._require_lock()
      manifest.add_metrics(self.directory / str(step), facts["metrics"])
      self._prune()

    if jax.process_index() == 0 and step not in self._outage.missing:
      self._persist(commit, step)

  def _persist(self, act: Callable[[], None], step: int) -> None:
    """Calls it, again while object storage is away; on disk, once."""
    seconds = outages.PATIENCE if self._is_remote else 0.0
    storage.persist(act, seconds, f"saving step {step}")

  def _prune(self) -> None:
    """Deletes the steps that are not to be kept.

    Measures that are still missing change nothing: they can only add the newest
    step to the best ones, and it is kept anyway.
    """
    good, _ = steps.survey(self.directory)
    for step in good.keys() - manifest.kept(
        good, self._cfg.keep_last, self._cfg.keep_best, self._best):
      steps.remove(self.directory / str(step))

  def _require_lock(self) -> None:
    if self._lock:
      self._lock.require()

  def check(self) -> None:
    """Raises StorageError, once, if a save has failed. Does not wait."""
    if not self._failure:
      return
    (step, e), self._failure = self._failure, None
    self._renew()
    if self._is_remote and storage.is_unavailable(e) and (
        jax.process_count() == 1):
      self._outage.leave_out(step, e)
      return
    code = e.errno if isinstance(e, OSError) else None
    found = re.search(r"os_error_code='(\d+)'", str(e))  # TensorStore's.
    code = int(found[1]) if found else code
    if code is None and not isinstance(e, manifest.DamagedError) and (
        not self._is_remote or isinstance(e, errors.UserError)):
      raise e
    why = (errors.one_line(e) if code is None or self._is_remote
           else os.strerror(code))
    raise errors.StorageError(
        f"{self.directory}: step {step} cannot be saved: {why}; "
        "earlier steps are unchanged; free space or grant write permission, "
        "then run the same command to continue from them") from e

  def _renew(self) -> None:
    """Replaces the store, which has failed."""
    with contextlib.suppress(Exception):  # Orbax raises its failures again.
      self._store.close()
    self._store = arrays.Store()

  def wait(self) -> None:
    """Waits until everything is written; StorageError if that fails."""
    if self._last:
      self._last.result()
      self._last = None
    self.check()

  def close(self) -> None:
    """Like `wait`; also ends the threads."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._store.close()

  def steps(self) -> list[int]:
    """The complete steps in ascending order; checksums are not compared."""
    return sorted(steps.survey(self.directory)[0])

  def read(self, step: int) -> manifest.Manifest:
    """The facts about a complete step, without its arrays."""
    return manifest.read(self.directory / str(step))

  def latest_step(self) -> int | None:
    """The newest of `steps`."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the best measure; None if none was evaluated."""
    good, _ = steps.survey(self.directory)
    ranked = manifest.ranked(good, self._best)
    return ranked[-1] if ranked else None

  def find(self, which: str | int) -> int:
    """Returns the step for "last", "best" or a step number.

    Raises:
      ConfigError: there is no such step, or it is damaged.
    """
    return processes.on_first(lambda: self._find(which))

  def _find(self, which: str | int) -> int:
    good, bad = steps.survey(self.directory)
    if which in bad:
      raise errors.ConfigError(
          f"--checkpoint: {self.directory / str(which)}: {bad[which]}")
    for step, e in bad.items():
      log.warning("%s: %s; ignored", self.directory / str(step), e)
    found = {"last": sorted(good),
             "best": manifest.ranked(good, self._best),
             }.get(which, [which] if which in good else [])
    if not found:
      raise errors.ConfigError(
          f"--checkpoint: {self.directory.parent} has no checkpoint {which}, "
          f"only {', '.join(map(str, sorted(good))) or 'none'}")
    return found[-1]

  def latest_good(self) -> int | None:
    """Returns the newest step of which every byte is intact.

    The first process tidies up, and all raise what `steps.choose` raises.
    """
    self._verified = processes.on_first(lambda: steps.choose(self.directory))
    return self._verified

  def restore(self, step: int, abstract_trees: Trees,
              position: int | None = None,
              ) -> tuple[dict[str, Any], accounting.Record]:
    """Returns a saved step and what the run had counted then.

    Args:
      step: its number.
      abstract_trees: shapes, dtypes and shardings of the items to read; other
        items of the step are left unread.
      position: where the data must continue; None: anywhere.

    Raises:
      ConfigError: the step is damaged, or its arrays or its position differ
        from those wanted; one line lists all differences.
    """
    folder = self.directory / str(step)

    def verify():
      try:
        return manifest.verify(folder, contents=step != self._verified).step
      except manifest.DamagedError as e:
        raise errors.ConfigError(
            f"{folder}: {e}; choose another checkpoint") from e

    processes.on_first(verify)
    found = self.read(step)
    if position not in (None, found.record["position"]):
      raise errors.ConfigError(
          f"{folder}: its record is of {found.record['position']} examples, "
          f"but {step} steps of config.train.batch_size take {position}; "
          "choose another checkpoint")
    arrays.require_same(folder, found.tree, abstract_trees)
    try:
      trees = self._store.restore(folder, abstract_trees)
    except Exception as e:
      if not (self._is_remote and storage.is_unavailable(e)):
        raise
      raise errors.StorageError(
          f"{folder}: object storage does not answer: "
          f"{errors.one_line(e)}") from e
    return trees, accounting.Record(**found.record)


def read_variables(path: pathlib.Path) -> dict[str, Any]:
  """Reads a model's variables from a checkpoint, on any devices.

  Args:
    path: a workdir or its checkpoints folder (the last step is read), or the
      folder of one step.

  Returns:
    Variables of numpy arrays: the moving averages if there are any.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  step, found = _verified(path)
  items = found.items
  params = "ema_params" if "ema_params" in items else "params"
  log.info("%s: reading %s", step, params)
  try:
    variables = {"params": arrays.read(step / params, found.n_bytes)}
    for item in ("model_state", "ema_state"):  # Averages replace values.
      if item in items:
        variables |= arrays.read(step / item, found.n_bytes)
  except Exception as e:  # Orbax and its libraries raise many types.
    reason = " ".join(str(e).split())
    raise errors.WeightsError(f"{step}: cannot be read: {reason}") from e
  return variables


def read_metrics(path: pathlib.Path) -> dict[str, float]:
  """The measures of the variables that `read_variables` reads; may be empty.

  Raises:
    WeightsError: as `read_variables`.
  """
  _, found = _verified(path)
  return found.metrics


def _verified(path: pathlib.Path) -> tuple[pathlib.Path, manifest.Manifest]:
  """The folder of the step that a path means, and its manifest."""
  folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  try:
    numbers = steps.found(folder)
    step = (workdir_lib.real_path(folder) / str(numbers[-1]) if numbers
            else folder.absolute())
    if not numbers and not (step / manifest.NAME).is_file():
      raise errors.WeightsError(
          f"{path}: has no checkpoint; give a workdir, its checkpoints "
          "folder or one complete step in it, or a file")
    return step, manifest.verify(step)
  except manifest.DamagedError as e:
    raise errors.WeightsError(
        f"{step}: is damaged or incomplete: {e}") from e
  except errors.ConfigError as e:
    raise errors.WeightsError(str(e)) from e
