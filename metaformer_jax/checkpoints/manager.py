"""Saving and restoring; all calls of Orbax are here.

A step is saved as separate items, so that variables and their moving averages
can be read without the optimizer's state, which is larger. Orbax writes them
into a temporary folder; `manifest` decides when that is a complete step, and
which steps are still intact. Orbax itself restores much damaged data without an
error.
"""

import contextlib
import dataclasses
import logging
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from metaformer_jax import errors
from metaformer_jax.checkpoints import manifest
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import accounting, processes, sharding

log = logging.getLogger(__name__)

# The items of a step: trees of arrays, those that are not empty.
_TREES = ("params", "model_state", "opt_state", "ema_params", "ema_state")
Trees = Mapping[str, Any]

# Weights take about the memory of their files; 256 MiB may be all zeros.
_MAX_EXPANSION, _ALWAYS_READ = 20, 2**28

# Orbax warns when single items are read, and about the handler below; its
# threads log tracebacks of failures that are raised here as well.
_EXPECTED = ("Metadata file does not exist", "_SignalingThread.run() raised",
             "Handler Commit operations or the Commit",
             "Failed to write metadata", "overriding jax.Array")
logging.getLogger("absl").addFilter(
    lambda record: not any(s in record.getMessage() for s in _EXPECTED))

# By default each copy of an array writes a part of it, for which Orbax compiles
# a program per part: for arrays as small as these, far slower than letting one
# copy write everything.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**24), override=True)


class Checkpoints:
  """The checkpoints of a workdir, saved in the background.

  Reading changes nothing in the workdir; `save` and `latest_good` are for the
  run that owns it. With several processes, all make the same calls, and the
  first one looks at the disk for all.
  """

  def __init__(self, workdir: pathlib.Path, cfg: schema.Checkpoint,
               best: tasks.Measure):
    """Takes the workdir, how many steps to keep, and what ranks them."""
    self.directory = workdir.absolute() / "checkpoints"
    self._cfg, self._best = cfg, best
    self._orbax = _open_orbax()
    self._thread: threading.Thread | None = None
    self._failure: tuple[int, Exception] | None = None
    self._verified: int | None = None

  def save(self, step: int, trees: Trees, record: accounting.Record,
           metrics: Mapping[str, float] | None = None,
           data: Mapping[str, Any] | None = None) -> None:
    """Starts to save a step; returns once it is copied off the devices.

    Args:
      step: how many steps the state has taken.
      trees: the state, by item.
      record: what the run has counted.
      metrics: of this state's evaluation, if there was one.
      data: the fingerprint of the data set, by split.

    Raises:
      ConfigError: the metrics do not include the one that ranks checkpoints.
      StorageError: this save, or the previous one, cannot be written.
    """
    self.wait()
    facts = {"step": step, "record": dataclasses.asdict(record),
             "metrics": {k: float(v) for k, v in (metrics or {}).items()},
             "tree": _arrays(trees), "data": dict(data or {})}
    try:
      self._orbax.save(
          self._temporary(step), force=True, args=ocp.args.Composite(
              **{name: ocp.args.StandardSave(tree)
                 for name, tree in trees.items()}))
    except Exception as e:
      self._failure = step, e
      self.check()
    self._thread = threading.Thread(
        target=self._complete, args=(facts,), name="complete_checkpoint")
    self._thread.start()
    wanted = self._best.name
    if metrics is not None and self._cfg.keep_best and wanted not in metrics:
      raise errors.ConfigError(
          f"config.checkpoint.best_metric: {wanted!r} was not measured"
          f"{errors.did_you_mean(wanted, metrics)}")

  def _temporary(self, step: int) -> pathlib.Path:
    return self.directory / f"{step}.saving"

  def _complete(self, facts: dict[str, Any]) -> None:
    """In the background: once everything is written, makes it a step."""
    try:
      self._orbax.wait_until_finished()  # For every process.
      if jax.process_index():
        return
      temporary = self._temporary(facts["step"])
      manifest.write(temporary, **facts)
      os.rename(temporary, self.directory / str(facts["step"]))
      manifest.sync(self.directory)
      good, _ = manifest.survey(self.directory)
      for step in good.keys() - manifest.kept(
          good, self._cfg.keep_last, self._cfg.keep_best, self._best):
        manifest.remove(self.directory / str(step))
    except Exception as e:
      self._failure = facts["step"], e

  def check(self) -> None:
    """Raises StorageError, once, if a save has failed. Does not wait."""
    if not self._failure:
      return
    (step, e), self._failure = self._failure, None
    with contextlib.suppress(Exception):  # Orbax raises its failures again.
      self._orbax.close()
    self._orbax = _open_orbax()
    code = e.errno if isinstance(e, OSError) else None
    found = re.search(r"os_error_code='(\d+)'", str(e))  # TensorStore's.
    code = int(found[1]) if found else code
    if code is None:
      raise e
    raise errors.StorageError(
        f"{self.directory}: step {step} cannot be saved: {os.strerror(code)}; "
        "earlier steps are unchanged; free space or grant write permission, "
        "then run the same command to continue from them") from e

  def wait(self) -> None:
    """Waits until everything is written; StorageError if that fails."""
    if self._thread:
      self._thread.join()
      self._thread = None
    self.check()

  def close(self) -> None:
    """Like `wait`; also ends Orbax's threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def steps(self) -> list[int]:
    """The complete steps in ascending order; checksums are not compared."""
    return sorted(manifest.survey(self.directory)[0])

  def latest_step(self) -> int | None:
    """The newest of `steps`."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step with the best measure; None if none was evaluated."""
    good, _ = manifest.survey(self.directory)
    ranked = manifest.ranked(good, self._best)
    return ranked[-1] if ranked else None

  def find(self, which: str | int) -> int:
    """Returns the step for "last", "best" or a step number.

    Raises:
      ConfigError: there is no such step, or it is damaged.
    """
    return self._on_first(lambda: self._find(which))

  def _find(self, which: str | int) -> int:
    good, bad = manifest.survey(self.directory)
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

    Newer ones are moved into the folder `damaged`, and the remains of an
    interrupted save are deleted, with one warning each. Returns None if no step
    was ever complete.

    Raises:
      ConfigError: there were complete steps, but none is intact; all stay in
        place.
      StorageError: a damaged step cannot be moved.
    """
    self._verified = self._on_first(self._choose)
    return self._verified

  def _choose(self) -> int | None:
    chosen, bad = None, {}
    for step in reversed(manifest.steps(self.directory)):
      folder = self.directory / str(step)
      try:
        manifest.verify(folder)
        chosen = step
        break
      except manifest.DamagedError as e:
        bad[folder] = e
    lost = [f"{folder.name}: {e}" for folder, e in bad.items()
            if not isinstance(e, manifest.PartialError)]
    if chosen is None and lost:
      raise errors.ConfigError(
          f"{self.directory}: no step is intact ({'; '.join(lost)}); restore a "
          "copy of one, or delete the folder to start from the beginning")
    start = "the beginning" if chosen is None else f"step {chosen}"
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for folder, e in bad.items():
        log.warning("%s: %s; moved to %s; continuing from %s", folder, e,
                    manifest.set_aside(folder), start)
      for remains in manifest.unfinished(self.directory):
        if not remains.name.endswith(".deleting"):
          log.warning("%s: the save was interrupted; deleted; continuing from "
                      "%s", remains, start)
        manifest.discard(remains)
    except OSError as e:
      raise errors.StorageError(
          f"{self.directory}: cannot be cleaned up: {e}") from e
    return chosen

  def data(self, step: int) -> dict[str, Any]:
    """The fingerprint of the data set that a complete step was saved with."""
    return manifest.read(self.directory / str(step)).data

  def restore(self, step: int, abstract_trees: Trees,
              ) -> tuple[dict[str, Any], accounting.Record]:
    """Returns a saved step and what the run had counted then.

    Args:
      step: its number.
      abstract_trees: shapes, dtypes and shardings of the items to read; other
        items of the step are left unread.

    Raises:
      ConfigError: the step is damaged, or its arrays differ from those wanted;
        one line lists all differences.
    """
    folder = self.directory / str(step)

    def verify():
      try:
        return manifest.verify(folder, contents=step != self._verified).step
      except manifest.DamagedError as e:
        raise errors.ConfigError(
            f"{folder}: {e}; choose another checkpoint") from e

    self._on_first(verify)
    found = manifest.read(folder)
    self._compare(folder, found.tree, abstract_trees)
    trees = self._orbax.restore(folder, args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree)
           for name, tree in abstract_trees.items()}))
    return dict(trees.items()), accounting.Record(**found.record)

  @staticmethod
  def _compare(folder, have: dict[str, str], abstract_trees: Trees) -> None:
    """Raises ConfigError that lists every array that differs."""
    items = {name.partition("/")[0] for name in have}
    problems = [f"{item} is missing" for item in abstract_trees.keys() - items]
    shared = items & abstract_trees.keys()
    want = _arrays({item: abstract_trees[item] for item in shared})
    have = {name: array for name, array in have.items()
            if name.partition("/")[0] in shared}
    problems += [f"{name} is missing" for name in want.keys() - have]
    problems += [f"{name} is not in the model"
                 for name in have.keys() - want]
    problems += [f"{name} is {have[name]}, not {want[name]}"
                 for name in have.keys() & want if have[name] != want[name]]
    if problems:
      raise errors.ConfigError(
          f"{folder}: cannot be restored into this experiment: "
          f"{'; '.join(sorted(problems))}")

  @staticmethod
  def _on_first(decide: Callable[[], int | None]) -> int | None:
    """Returns on every process what the first one decides, or raises."""
    step = None
    with processes.agreeing():
      if jax.process_index() == 0:
        step = decide()
    if jax.process_count() > 1:
      found = int(multihost_utils.broadcast_one_to_all(
          np.int32(-1 if step is None else step)))
      step = None if found < 0 else found
    return step


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
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

  def read(item):
    metadata = reader.metadata(step / item).item_metadata
    _require_plausible(metadata.tree, found.n_bytes)
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return reader.restore(step / item, args=ocp.args.PyTreeRestore(
        restore_args=as_numpy))

  try:
    variables = {"params": read(params)}
    for item in ("model_state", "ema_state"):  # Averages replace values.
      if item in items:
        variables |= read(item)
  except Exception as e:  # Orbax and its libraries raise many types.
    reason = " ".join(str(e).split())
    raise errors.WeightsError(f"{step}: cannot be read: {reason}") from e
  return variables


def _require_plausible(tree: Any, n_bytes: int) -> None:
  """Raises ValueError if arrays take far more memory than the step's files.

  Zeros are compressed well, so that forged arrays could have any size.
  """
  needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize
               for x in jax.tree.leaves(tree))
  if needed > max(_MAX_EXPANSION * n_bytes, _ALWAYS_READ):
    raise ValueError(f"its arrays have {needed:,} bytes, more than "
                     f"{_MAX_EXPANSION} times its files")


def _open_orbax() -> ocp.AsyncCheckpointer:
  return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(
      **{name: ocp.StandardCheckpointHandler() for name in _TREES}))


def _arrays(tree) -> dict[str, str]:
  """Name -> "dtype[shape]" for every array of a tree, or its metadata."""
  return {
      sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)}


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
    steps = manifest.steps(folder)
    step = (folder / str(steps[-1]) if steps else folder).absolute()
    if not steps and not (step / manifest.NAME).is_file():
      raise errors.WeightsError(
          f"{path}: has no checkpoint; give a workdir, its checkpoints "
          "folder or one complete step in it, or a file")
    return step, manifest.verify(step)
  except manifest.DamagedError as e:
    raise errors.WeightsError(
        f"{step}: is damaged or incomplete: {e}") from e
  except errors.ConfigError as e:
    raise errors.WeightsError(str(e)) from e
