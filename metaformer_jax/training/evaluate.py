"""Evaluation on a whole split, during a run and of its checkpoints."""

import contextlib
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import processes, sharding, signals
from metaformer_jax.runtime.watchdog import Watchdog
from metaformer_jax.tasks import base
from metaformer_jax.training import same_data, step
from metaformer_jax.training import state as state_lib


class Evaluation:
  """Measures variables on a whole split; compiled once per batch shape."""

  def __init__(self, cfg: Experiment, task: base.Task, mesh, data: base.Data):
    self._cfg, self._mesh, self._data = cfg, mesh, data
    self._evaluators = task.make_evaluators()

    def run(variables, batch, stop):
      return (step.eval_step(variables, batch, task=task,
                             evaluators=self._evaluators),
              step.notes(batch, stop))

    self._run = jax.jit(run, out_shardings=sharding.replicated(mesh))
    self._compiled = set()  # The shapes of batches that it was called with.

  def __call__(self, variables: base.Variables, stop: signals.StopSignal,
               watchdog: Watchdog) -> dict[str, float] | None:
    """Returns the measures, and "bad_images", which they do not include.

    Returns None if a process was asked to stop.

    Raises:
      ConfigError: two evaluators report the same measure.
      DataError: there are too many bad images.
      OutOfMemoryError: a batch does not fit in memory.
    """
    with errors.fitting_memory(
        f"config.eval.batch_size: {self._cfg.eval.batch_size} images at a time "
        "do not fit in memory; reduce it, or use more devices"):
      return self._measure(variables, stop, watchdog)

  def _measure(self, variables, stop, watchdog) -> dict[str, float] | None:
    for evaluator in self._evaluators.values():
      evaluator.reset()
    pending = []  # Fetched one batch late, while the device computes the next.
    n_bad = 0

    def update(found) -> int:
      statistics, notes = jax.device_get(found)
      for name, value in statistics.items():
        self._evaluators[name].update(value)
      nonlocal n_bad
      n_bad += int(notes["bad_images"])
      return int(notes["stop"])

    watchdog.beat("batch 0 of an evaluation", limited=True)
    with contextlib.closing(processes.reading(
        stop.batches(self._data.eval_batches()))) as batches:
      for i, batch in enumerate(batches):
        shapes = base.signature(batch)
        watchdog.beat(f"batch {i} of an evaluation",
                      limited=shapes in self._compiled)
        pending.append(self._run(
            variables, sharding.put_batch(batch, self._mesh),
            stop.flags(self._mesh)))
        self._compiled.add(shapes)
        if len(pending) > 1 and update(pending.pop(0)):
          return None
        watchdog.beat(f"batch {i + 1} of an evaluation", limited=True)
    for found in pending:
      update(found)
    watchdog.beat("the measures of an evaluation")
    n = self._data.n_examples
    if n_bad > self._cfg.data.max_bad_fraction * n or n_bad == n:
      raise errors.DataError(
          f"{n_bad} of {n} evaluation images are unusable, "
          "more than config.data.max_bad_fraction; the first ones are named "
          "above")
    return collect(self._evaluators) | {"bad_images": n_bad}

  def rows(self, kind: str) -> base.Rows:
    """What evaluators have besides the last measures; for a user.

    Args:
      kind: the method that gives it, "table" or "predictions".
    """
    return [row for evaluator in self._evaluators.values()
            if hasattr(evaluator, kind) for row in getattr(evaluator, kind)()]


def is_due(step: int, n_steps: int, every: int) -> bool:
  """Whether a run evaluates after a step: every so many, and after the last.

  One that is less than half an interval before the end is left out.

  Args:
    step: from 1.
    n_steps: of the whole run.
    every: steps from one evaluation to the next.
  """
  return step == n_steps or (
      step % every == 0 and n_steps - step >= every / 2)


def collect(evaluators: Mapping[str, base.Evaluator]) -> dict[str, float]:
  """The measures of all evaluators.

  Raises:
    ConfigError: one of them is reported twice, or is named "bad_images".
  """
  results, owners = {}, {"bad_images": "the loop"}
  for name, evaluator in evaluators.items():
    found = evaluator.result()
    for measure in found:
      if measure in owners:
        raise errors.ConfigError(
            f"config.task: the evaluator {name} reports {measure!r}, as does "
            f"{owners[measure]}; give one of the measures another name")
      owners[measure] = name
    results |= found
  return results


def evaluate_checkpoint(cfg: Experiment, task: base.Task, mesh,
                        workdir: pathlib.Path, which: str | int,
                        details: Sequence[str] = ()) -> dict[str, Any]:
  """Evaluates a checkpoint of a workdir.

  Args:
    cfg: the experiment; its data may differ from the training run's.
    task: what to measure.
    mesh: from `devices.make_mesh(cfg)`.
    workdir: of the training run.
    which: "last", "best" (by config.checkpoint.best_metric) or a step.
    details: as for `evaluate_variables`.

  Returns:
    {"step", and what `evaluate_variables` returns}.

  Raises:
    ConfigError: there is no such checkpoint, or it belongs to another model.
    DataError, OutOfMemoryError: as `evaluate_variables`.
  """
  if not (workdir / "checkpoints").is_dir():
    raise errors.ConfigError(f"--workdir: {workdir} has no checkpoints")
  checkpoints = checkpoints_lib.Checkpoints(workdir, cfg.checkpoint,
                                            cfg.best_measure)
  try:
    i = checkpoints.find(which)
    shapes = jax.eval_shape(functools.partial(
        state_lib.create, task, optax.identity(), cfg.seed,
        cfg.train.ema_decay))
    shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)
    abstract = sharding.abstract(shapes, shardings)
    trees, _ = checkpoints.restore(i, abstract.trees())
    state = abstract.replace(**trees)
  finally:
    checkpoints.close()
  return {"step": i,
          **evaluate_variables(cfg, task, mesh, state.eval_variables(),
                               details)}


def evaluate_variables(cfg: Experiment, task: base.Task, mesh,
                       variables: base.Variables,
                       details: Sequence[str] = ()) -> dict[str, Any]:
  """Evaluates variables on the evaluation split.

  Args:
    cfg: the experiment.
    task: what to measure.
    mesh: from `devices.make_mesh(cfg)`.
    variables: of the task's model; the same on all processes.
    details: what to return besides, by the evaluators' methods: "table",
      "predictions".

  Returns:
    The evaluators' measures, "bad_images", and the rows of each of `details`.

  Raises:
    ConfigError: the data does not fit the model.
    DataError: there are too many bad images.
    OutOfMemoryError: a batch does not fit in memory.
  """
  with processes.agreeing():
    data = task.make_data("eval")
  if jax.process_count() > 1:
    same_data.agree(evaluation=data)
  evaluate = Evaluation(cfg, task, mesh, data)
  with Watchdog(cfg.log.hang_seconds, cfg.log.exit_after_seconds) as watchdog:
    # As nothing is saved, signals have their usual effect.
    measures = evaluate(variables, signals.StopSignal(), watchdog)
  return measures | {kind: evaluate.rows(kind) for kind in details}
