"""Checkpoints: every call of Orbax is here.

A step is saved as separate items: the variables and their moving averages can
be read without the optimizer's state, which is the larger part. Orbax writes
them into a folder beside; `manifest` says when that is a step, and of which
steps everything is still there. Orbax itself would restore a good part of what
is damaged without an error.
"""

import contextlib
import logging
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
from metaformer_jax.config import schema
from metaformer_jax.runtime import processes, sharding
from metaformer_jax.training.state import TrainState

log = logging.getLogger(__name__)

# The items of a step that are trees of arrays; empty ones are not written.
_TREES = ("params", "model_state", "opt_state", "ema_params", "ema_state")

# Orbax warns of items that are read without their step, and of the handler
# below; its threads log with tracebacks what makes a save fail and is raised.
_EXPECTED = ("Metadata file does not exist", "_SignalingThread.run() raised",
             "Handler Commit operations or the Commit",
             "Failed to write metadata", "overriding jax.Array")
logging.getLogger("absl").addFilter(
    lambda record: not any(s in record.getMessage() for s in _EXPECTED))

# Orbax has each copy of an array write a part of it, and compiles a program for
# each part: for the small arrays of these models that takes far longer than to
# have one of them write all.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**24), override=True)


class Checkpoints:
  """The checkpoints of a workdir, saved in the background.

  Who only reads changes nothing in the workdir; `save` and `latest_good` are
  for the run that owns it. In many processes, all make the same calls, and the
  first looks at the disk for all.
  """

  def __init__(self, workdir: pathlib.Path, cfg: schema.Checkpoint):
    self.directory = workdir.absolute() / "checkpoints"
    self._cfg = cfg
    self._orbax = _open_orbax()
    self._thread: threading.Thread | None = None
    self._failure: tuple[int, Exception] | None = None
    self._verified: int | None = None

  def save(self, state: TrainState, position: int,
           metrics: Mapping[str, float] | None = None,
           totals: Mapping[str, float] | None = None) -> None:
    """Starts to save a state; returns once it is copied off the devices.

    Args:
      state: after `state.step` steps.
      position: training examples consumed: where the data goes on.
      metrics: of this state's evaluation, if there was one.
      totals: what the run counts over its restarts.

    Raises:
      ConfigError: the metrics lack what the best one is chosen by.
      StorageError: this save, or the one before, cannot be written.
    """
    self.wait()
    step = int(jax.device_get(state.step))
    trees = _present(state)
    facts = {"step": step, "position": position,
             "metrics": {k: float(v) for k, v in (metrics or {}).items()},
             "totals": {k: float(v) for k, v in (totals or {}).items()},
             "tree": _arrays(trees)}
    try:
      self._orbax.save(
          self._beside(step), force=True, args=ocp.args.Composite(
              **{name: ocp.args.StandardSave(tree)
                 for name, tree in trees.items()}))
    except Exception as e:
      self._failure = step, e
      self.check()
    self._thread = threading.Thread(
        target=self._complete, args=(facts,), name="complete_checkpoint")
    self._thread.start()
    wanted = self._cfg.best_metric
    if metrics is not None and self._cfg.keep_best and wanted not in metrics:
      raise errors.ConfigError(
          f"config.checkpoint.best_metric: {wanted!r} is not measured"
          f"{errors.did_you_mean(wanted, metrics)}")

  def _beside(self, step: int) -> pathlib.Path:
    return self.directory / f"{step}.saving"

  def _complete(self, facts: dict[str, Any]) -> None:
    """In the background: when all is written, makes it a step."""
    try:
      self._orbax.wait_until_finished()  # For every process.
      if jax.process_index():
        return
      beside = self._beside(facts["step"])
      manifest.write(beside, **facts)
      os.rename(beside, self.directory / str(facts["step"]))
      manifest.sync(self.directory)
      good, _ = manifest.survey(self.directory)
      cfg = self._cfg
      for step in good.keys() - manifest.kept(
          good, cfg.keep_last, cfg.keep_best, cfg.best_metric):
        manifest.remove(self.directory / str(step))
    except Exception as e:
      self._failure = facts["step"], e

  def check(self) -> None:
    """Raises StorageError if a save has failed; told once. Does not wait."""
    if not self._failure:
      return
    (step, e), self._failure = self._failure, None
    with contextlib.suppress(Exception):  # What fails next to `e` is kept too.
      self._orbax.close()
    self._orbax = _open_orbax()
    code = e.errno if isinstance(e, OSError) else None
    found = re.search(r"os_error_code='(\d+)'", str(e))  # TensorStore's.
    code = int(found[1]) if found else code
    if code is None:
      raise e
    raise errors.StorageError(
        f"{self.directory}: step {step} cannot be saved: {os.strerror(code)}; "
        "the steps before it are as they were: make room or give leave to "
        "write, and the same command goes on from them") from e

  def wait(self) -> None:
    """Waits until everything is written. StorageError: it cannot be."""
    if self._thread:
      self._thread.join()
      self._thread = None
    self.check()

  def close(self) -> None:
    """As `wait`, and ends the threads."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def steps(self) -> list[int]:
    """The complete steps, ascending; their checksums are not compared."""
    return sorted(manifest.survey(self.directory)[0])

  def latest_step(self) -> int | None:
    """The newest of `steps`."""
    return max(self.steps(), default=None)

  def best_step(self) -> int | None:
    """The step of the highest metric; None where none was evaluated."""
    good, _ = manifest.survey(self.directory)
    ranked = manifest.ranked(good, self._cfg.best_metric)
    return ranked[-1] if ranked else None

  def find(self, which: str | int) -> int:
    """Returns the step that is "last", "best", or has a number.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    return self._on_first(lambda: self._find(which))

  def _find(self, which: str | int) -> int:
    good, bad = manifest.survey(self.directory)
    if which in bad:
      raise errors.ConfigError(
          f"--checkpoint: {self.directory / str(which)}: {bad[which]}")
    for step, e in bad.items():
      log.warning("%s: %s; passed over", self.directory / str(step), e)
    found = {"last": sorted(good),
             "best": manifest.ranked(good, self._cfg.best_metric),
             }.get(which, [which] if which in good else [])
    if not found:
      raise errors.ConfigError(
          f"--checkpoint: {self.directory.parent} holds no checkpoint {which}; "
          f"it holds {', '.join(map(str, sorted(good))) or 'none'}")
    return found[-1]

  def latest_good(self) -> int | None:
    """Returns the newest step of which every byte is as it was saved.

    Newer ones are moved into the folder `damaged`, and what is left of a save
    that was cut off is deleted, each with one warning. None where no step was
    ever complete.

    Raises:
      ConfigError: steps were complete, and none is intact; all stay in place.
      StorageError: one cannot be moved.
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
          f"{self.directory}: no step is intact ({'; '.join(lost)}); put back "
          "a copy of one, or delete the folder to start anew")
    start = "the start" if chosen is None else f"step {chosen}"
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      for folder, e in bad.items():
        log.warning("%s: %s; moved to %s; going on from %s", folder, e,
                    manifest.set_aside(folder), start)
      for left in manifest.unfinished(self.directory):
        if not left.name.endswith(".deleting"):
          log.warning("%s: was cut off while it was saved; deleted; going on "
                      "from %s", left, start)
        manifest.discard(left)
    except OSError as e:
      raise errors.StorageError(
          f"{self.directory}: cannot be put in order: {e}") from e
    return chosen

  def restore(self, step: int, abstract_state: TrainState,
              ) -> tuple[TrainState, int]:
    """Returns a saved state, placed like `abstract_state`, and the position.

    Raises:
      ConfigError: the step is damaged, or of other arrays; one line tells all.
    """
    found, trees = self._read(step, _present(abstract_state))
    arrays = {**{name: getattr(abstract_state, name) for name in _TREES},
              **trees}
    restored = jax.device_put(
        found.step, abstract_state.step.sharding).astype(
            abstract_state.step.dtype)
    return TrainState(step=restored, **arrays), found.position

  def totals(self, step: int) -> dict[str, float]:
    """What was counted until a step that was restored."""
    return dict(manifest.read(self.directory / str(step)).totals)

  def restore_variables(self, step: int, abstract_state: TrainState,
                        ) -> TrainState:
    """As `restore`, without what only the optimizer needs."""
    _, trees = self._read(step, {
        name: tree for name, tree in _present(abstract_state).items()
        if name != "opt_state"})
    return abstract_state.replace(opt_state=(), **trees)

  def _read(self, step, abstract_trees):
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
    return found, dict(trees.items())

  @staticmethod
  def _compare(folder, have: dict[str, str], abstract_trees) -> None:
    """Raises ConfigError that lists every array that is not as saved."""
    items = {name.partition("/")[0] for name in have}
    problems = [f"{item} is missing" for item in abstract_trees.keys() - items]
    shared = items & abstract_trees.keys()
    want = _arrays({item: abstract_trees[item] for item in shared})
    have = {name: array for name, array in have.items()
            if name.partition("/")[0] in shared}
    problems += [f"{name} is missing" for name in want.keys() - have]
    problems += [f"{name} has no place" for name in have.keys() - want]
    problems += [f"{name} is {have[name]}, not {want[name]}"
                 for name in have.keys() & want if have[name] != want[name]]
    if problems:
      raise errors.ConfigError(
          f"{folder}: cannot be restored into this experiment: "
          f"{'; '.join(sorted(problems))}")

  @staticmethod
  def _on_first(decide: Callable[[], int | None]) -> int | None:
    """Returns to every process what the first decides, or raises."""
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
  """Reads what a model needs of a checkpoint, whatever it was placed on.

  Args:
    path: a workdir or its checkpoints folder, of which the last step is taken,
      or the folder of one step.

  Returns:
    Variables of numpy arrays: the moving averages where there are any.

  Raises:
    WeightsError: there is no checkpoint, or it is damaged.
  """
  folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
  try:
    steps = manifest.steps(folder)
    step = (folder / str(steps[-1]) if steps else folder).absolute()
    if not steps and not (step / manifest.NAME).is_file():
      raise errors.WeightsError(
          f"{path}: holds no checkpoint; give a workdir, its checkpoints "
          "folder or one complete step in it, or a file")
    items = manifest.verify(step).items
  except manifest.DamagedError as e:
    raise errors.WeightsError(
        f"{step}: is damaged or not complete: {e}") from e
  except errors.ConfigError as e:
    raise errors.WeightsError(str(e)) from e
  params = "ema_params" if "ema_params" in items else "params"
  log.info("%s: reading %s", step, params)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

  def read(item):
    metadata = reader.metadata(step / item).item_metadata
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return reader.restore(step / item, args=ocp.args.PyTreeRestore(
        restore_args=as_numpy))

  try:
    variables = {"params": read(params)}
    for item in ("model_state", "ema_state"):  # The second replaces.
      if item in items:
        variables |= read(item)
  except Exception as e:  # Of what Orbax and its libraries raise.
    reason = " ".join(str(e).split())
    raise errors.WeightsError(f"{step}: cannot be read: {reason}") from e
  return variables


def _open_orbax() -> ocp.AsyncCheckpointer:
  return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(
      **{name: ocp.StandardCheckpointHandler() for name in _TREES}))


def _arrays(tree) -> dict[str, str]:
  """Name -> "dtype[shape]" of every array of a tree, or of its metadata."""
  return {
      sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _present(state: TrainState) -> dict[str, Any]:
  return {name: getattr(state, name) for name in _TREES
          if jax.tree.leaves(getattr(state, name))}
