"""Checkpoints: every call of Orbax is here.

A step is saved as separate items: the variables and their moving averages can
be read without the optimizer's state, which is the larger part.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from metaformer_jax import errors, experiment
from metaformer_jax.training import sharding
from metaformer_jax.training.state import TrainState

log = logging.getLogger(__name__)

# The items of a step that are trees of arrays; empty ones are not written.
_TREES = ("params", "model_state", "opt_state", "ema_params", "ema_state")

# Orbax warns of checkpoints that follow no evaluation, of items that are read
# without their step, and of what is then an error.
_EXPECTED = ("did not provide metrics", "Metadata file does not exist",
             "Failed to get item metadata")
logging.getLogger("absl").addFilter(
    lambda record: not any(s in record.getMessage() for s in _EXPECTED))


class Checkpoints:
  """The checkpoints of a workdir, saved in the background."""

  def __init__(self, workdir: pathlib.Path, cfg: experiment.Checkpoint):
    self._cfg = cfg

    def score(metrics):
      return metrics[cfg.best_metric]

    policy = ocp.checkpoint_managers
    keep = [policy.LatestN(cfg.keep_last)]
    if cfg.keep_best:
      keep.append(policy.BestN(
          get_metric_fn=score, n=cfg.keep_best,
          keep_checkpoints_without_metrics=False))
    self.directory = workdir.absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
        self.directory,
        item_handlers={name: ocp.StandardCheckpointHandler()
                       for name in _TREES}
        | {"position": ocp.JsonCheckpointHandler()},
        options=ocp.CheckpointManagerOptions(
            best_fn=score,  # Without it no metrics are kept.
            preservation_policy=policy.AnyPreservationPolicy(keep),
            cleanup_tmp_directories=True))

  def save(self, state: TrainState, position: int,
           metrics: dict[str, float] | None = None) -> None:
    """Starts to save a state; returns once it is copied off the devices.

    Args:
      state: after `state.step` steps.
      position: training examples consumed: where the data goes on.
      metrics: of this state's evaluation, if there was one.

    Raises:
      ConfigError: the metrics lack what the best one is chosen by.
    """
    items = {name: ocp.args.StandardSave(tree) for name, tree in
             _present(state).items()}
    step = int(jax.device_get(state.step))
    ranked = metrics is not None and self._cfg.best_metric in metrics
    self._manager.save(
        step, metrics=metrics if ranked else None,
        args=ocp.args.Composite(
            position=ocp.args.JsonSave({"step": step, "examples": position}),
            **items))
    if metrics is not None and not ranked and self._cfg.keep_best:
      raise errors.ConfigError(
          f"config.checkpoint.best_metric: {self._cfg.best_metric!r} is not "
          f"measured{errors.did_you_mean(self._cfg.best_metric, metrics)}")

  def steps(self) -> list[int]:
    """The steps that are complete on disk, ascending."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def best_step(self) -> int | None:
    """The step of the highest metric; None where none was evaluated."""
    return self._manager.best_step()

  def restore(self, step: int, abstract_state: TrainState,
              ) -> tuple[TrainState, int]:
    """Returns a saved state, placed like `abstract_state`, and the position."""
    trees = self._read(step, _present(abstract_state), position=True)
    position = trees.pop("position")
    arrays = {**{name: getattr(abstract_state, name) for name in _TREES},
              **trees}
    restored = jax.device_put(
        position["step"], abstract_state.step.sharding).astype(
            abstract_state.step.dtype)
    return TrainState(step=restored, **arrays), position["examples"]

  def restore_variables(self, step: int, abstract_state: TrainState,
                        ) -> TrainState:
    """Returns a saved state without what only the optimizer needs."""
    trees = self._read(step, {
        name: tree for name, tree in _present(abstract_state).items()
        if name != "opt_state"})
    return abstract_state.replace(opt_state=(), **trees)

  def _read(self, step, abstract_trees, position=False) -> dict[str, Any]:
    self._compare(step, abstract_trees)
    args = {name: ocp.args.StandardRestore(tree)
            for name, tree in abstract_trees.items()}
    if position:
      args["position"] = ocp.args.JsonRestore()
    return dict(self._manager.restore(step, args=ocp.args.Composite(**args)))

  def _compare(self, step: int, abstract_trees) -> None:
    """Raises ConfigError that lists every array that is not as saved."""
    found = self._manager.item_metadata(step)
    problems = []
    for item, tree in abstract_trees.items():
      saved = found.get(item)
      if saved is None:
        problems.append(f"{item} is missing")
        continue
      have, want = _arrays(saved), _arrays(tree)
      problems += [f"{item}/{name} is missing" for name in want.keys() - have]
      problems += [f"{item}/{name} has no place" for name in have.keys() - want]
      problems += [
          f"{item}/{name} is {have[name]}, not {want[name]}"
          for name in have.keys() & want if have[name] != want[name]]
    if problems:
      raise errors.ConfigError(
          f"{self.directory / str(step)}: cannot be restored into this "
          f"experiment: {'; '.join(sorted(problems))}")

  def close(self) -> None:
    """Waits until everything is written."""
    self._manager.wait_until_finished()
    self._manager.close()


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
    steps = [int(p.name) for p in folder.iterdir()
             if p.is_dir() and p.name.isdecimal()]
  except OSError as e:
    raise errors.WeightsError(f"{folder}: cannot be read: {e}") from e
  step = (folder / str(max(steps)) if steps else folder).absolute()
  params = "ema_params" if (step / "ema_params").is_dir() else "params"
  if not (step / params).is_dir():
    raise errors.WeightsError(
        f"{path}: holds no checkpoint; give a workdir, its checkpoints folder "
        "or one step in it, or a file")
  log.info("%s: reading %s", step, params)
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

  def read(item):
    metadata = reader.metadata(step / item).item_metadata
    if metadata is None:
      raise ValueError(f"{item} has no metadata")
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
    return reader.restore(step / item, args=ocp.args.PyTreeRestore(
        restore_args=as_numpy))

  try:
    variables = {"params": read(params)}
    for item in ("model_state", "ema_state"):  # The second replaces.
      if (step / item).is_dir():
        variables |= read(item)
  except Exception as e:  # Of what Orbax and its libraries raise.
    reason = " ".join(str(e).split())
    raise errors.WeightsError(
        f"{step}: is damaged or not complete: {reason}") from e
  return variables


def _arrays(tree) -> dict[str, str]:
  """Name -> "dtype[shape]" of every array of a tree, or of its metadata."""
  return {
      sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _present(state: TrainState) -> dict[str, Any]:
  return {name: getattr(state, name) for name in _TREES
          if jax.tree.leaves(getattr(state, name))}
