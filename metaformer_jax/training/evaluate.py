"""Evaluation of variables on a whole split, and of a run's checkpoints."""

import contextlib
import functools
import pathlib
from typing import Any

import jax
import optax

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import sharding, signals
from metaformer_jax.runtime.watchdog import Watchdog
from metaformer_jax.tasks import base
from metaformer_jax.training import state as state_lib
from metaformer_jax.training import step


class Evaluation:
  """Measures variables on the whole of a split; compiled once."""

  def __init__(self, task: base.Task, mesh, data: base.Data,
               max_bad_fraction: float):
    self._task, self._mesh, self._data = task, mesh, data
    self._max_bad = max_bad_fraction * data.n_examples

    def run(variables, batch, stop):
      return (step.eval_step(variables, batch, task=task),
              step.notes(batch, stop))

    self._run = jax.jit(run, out_shardings=sharding.replicated(mesh))

  def __call__(self, variables: base.Variables, stop: signals.StopSignal,
               watchdog: Watchdog) -> dict[str, float] | None:
    """Returns the measures, and "bad_images", which are left out of them.

    None: a process was told to end.

    Raises:
      DataError: there are too many bad images.
    """
    evaluators = self._task.make_evaluators()
    pending = []  # Fetched a batch late: the device is at the next one then.
    n_bad = 0

    def update(found) -> int:
      statistics, notes = jax.device_get(found)
      for name, value in statistics.items():
        evaluators[name].update(value)
      nonlocal n_bad
      n_bad += int(notes["bad_images"])
      return int(notes["stop"])

    with contextlib.closing(self._data.eval_batches()) as batches:
      for i, batch in enumerate(batches):
        pending.append(self._run(
            variables, sharding.put_batch(batch, self._mesh),
            stop.flags(self._mesh)))
        if len(pending) > 1 and update(pending.pop(0)):
          return None
        watchdog.beat(f"batch {i + 1} of an evaluation")
    for found in pending:
      update(found)
    if n_bad > self._max_bad or n_bad == self._data.n_examples:
      raise errors.DataError(
          f"{n_bad} of {self._data.n_examples} images to evaluate cannot be "
          "used, more than config.data.max_bad_fraction; the first are named "
          "above")
    results = {}
    for evaluator in evaluators.values():
      results |= evaluator.result()
    return results | {"bad_images": n_bad}


def evaluate_checkpoint(cfg: Experiment, task: base.Task, mesh,
                        workdir: pathlib.Path, which: str | int,
                        ) -> dict[str, Any]:
  """Evaluates a checkpoint of a workdir.

  Args:
    cfg: the experiment; its data may differ from the training run's.
    task: what to measure.
    mesh: from `sharding.make_mesh(cfg)`.
    workdir: of the training run.
    which: "last", "best" (config.checkpoint.best_metric) or a step.

  Returns:
    {"step", the evaluators' measures...}.

  Raises:
    ConfigError: there is no such checkpoint, or it is of another model.
    DataError: there are too many bad images.
    Preempted: told to end.
  """
  if not (workdir / "checkpoints").is_dir():
    raise errors.ConfigError(f"--workdir: {workdir} holds no checkpoints")
  checkpoints = checkpoints_lib.Checkpoints(workdir, cfg.checkpoint)
  try:
    i = checkpoints.find(which)
    shapes = jax.eval_shape(functools.partial(
        state_lib.create, task, optax.identity(), cfg.seed,
        cfg.train.ema_decay))
    shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)
    state = checkpoints.restore_variables(
        i, sharding.abstract(shapes, shardings))
  finally:
    checkpoints.close()
  evaluate = Evaluation(task, mesh, task.make_data("eval"),
                        cfg.data.max_bad_fraction)
  with signals.StopSignal() as stop, Watchdog(cfg.log.hang_seconds) as watchdog:
    result = evaluate(state.eval_variables(), stop, watchdog)
  if result is None:
    raise errors.Preempted("told to end during the evaluation")
  return {"step": i, **result}
