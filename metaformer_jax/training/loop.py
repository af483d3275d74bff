"""The training loop: one function for the command line, tests and notebooks."""

import contextlib
import functools
import logging
import os
import pathlib
import statistics
import time
from typing import Any

import jax
import optax

from metaformer_jax import config as config_lib
from metaformer_jax import errors
from metaformer_jax.experiment import Experiment
from metaformer_jax.models import registry
from metaformer_jax.tasks import base
from metaformer_jax.training import checkpoints as checkpoints_lib
from metaformer_jax.training import metrics as metrics_lib
from metaformer_jax.training import (
  optim,
  pretrained,
  report,
  sharding,
  signals,
  step,
  writers,
)
from metaformer_jax.training import state as state_lib

log = logging.getLogger(__name__)


def total_steps(cfg: Experiment, n_examples: int) -> int:
  """Steps of the run: `train.steps`, or its epochs and the cool-down's."""
  if cfg.train.steps is not None:
    return cfg.train.steps
  epochs = cfg.train.epochs + cfg.optim.cooldown_epochs
  return max(1, round(epochs * n_examples / cfg.train.batch_size))


def train_and_evaluate(cfg: Experiment, task: base.Task, mesh,
                       workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to the end, from where the workdir's last checkpoint is.

  Args:
    cfg: the experiment.
    task: what it learns.
    mesh: from `sharding.make_mesh(cfg)`.
    workdir: made if need be; holds the run when this returns, and what is
      needed to resume it whenever this is interrupted.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: the workdir holds another experiment, or data is missing.
    DivergedError: the loss was not finite.
    Preempted: told to end by SIGTERM or SIGINT; the last step is saved.
  """
  train_data, eval_data = task.make_data("train"), task.make_data("eval")
  n_train = train_data.n_examples
  n_steps = total_steps(cfg, n_train)
  steps_per_epoch = n_train / cfg.train.batch_size
  tx, schedule = optim.create(cfg, n_steps, steps_per_epoch)

  create = functools.partial(state_lib.create, task, tx, cfg.seed,
                             cfg.train.ema_decay)
  try:
    shapes = jax.eval_shape(create)
  except ValueError as e:  # What a model says of settings that do not fit.
    raise errors.ConfigError(f"config.model: {e}") from e
  shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)
  first = jax.process_index() == 0
  claim_workdir(cfg, workdir, write=first)
  checkpoints = checkpoints_lib.Checkpoints(workdir, cfg.checkpoint)
  if first:
    log.info("%s", report.plan(cfg, shapes, mesh, n_train,
                               eval_data.n_examples, n_steps))

  # How the state starts; the first that applies wins.
  # 1. The workdir has a checkpoint: resume it, data position included.
  # 2. The weights of config.init; a head of other classes begins anew.
  # 3. From scratch.
  restored = checkpoints.latest_step()
  if restored is not None:
    state, position = checkpoints.restore(
        restored, sharding.abstract(shapes, shardings))
    if first:
      log.info("resumed %s at step %d", workdir, restored)
  else:
    weights = cfg.init and pretrained.read(
        cfg.init, registry.get_spec(cfg.model.name).family,
        {"params": shapes.params, **shapes.model_state},
        (cfg.data.image_size,) * 2, new_head=True)
    state = jax.jit(create, out_shardings=shardings)()
    if weights:
      state = pretrained.warm_start(state, weights)
    restored, position = 0, 0

  everywhere = sharding.replicated(mesh)
  train_step = jax.jit(
      functools.partial(step.train_step, task=task, tx=tx, schedule=schedule,
                        seed=cfg.seed, ema_decay=cfg.train.ema_decay,
                        accumulate=cfg.train.accumulate),
      donate_argnums=0, out_shardings=(shardings, everywhere))
  evaluate = Evaluation(task, mesh, eval_data)

  writer = writers.Writer(workdir, cfg.log, restored, enabled=first)
  progress = report.Progress(restored, n_steps, cfg.train.batch_size, n_train,
                             enabled=first)
  eval_every = max(1, round(cfg.eval.every_epochs * steps_per_epoch))
  batches = train_data.train_batches(position)
  window = metrics_lib.Window()
  stop = signals.StopSignal()
  result = _last_evaluation(writer.records, restored)

  def log_window(i):
    metrics = window.means() | progress.window(i)
    writer.write(i, "train", metrics)
    progress.show(i, metrics)

  def evaluate_now(i):
    result = evaluate(state.eval_variables())
    writer.write(i, "eval", result)
    progress.say(f"step {i}  eval  {report.measures(result)}")
    return result

  try:
    with stop, jax.transfer_guard("disallow"):
      if result is None and restored and (
          restored % eval_every == 0 or restored == n_steps):
        result = evaluate_now(restored)  # The run ended before it came to it.
      for i in range(restored + 1, n_steps + 1):
        start = time.perf_counter()
        batch = sharding.put_batch(next(batches), mesh)
        if i == restored + 1:
          compiling = time.perf_counter()
          train_step = train_step.lower(state, batch).compile()
          progress.say("compiled the training step in "
                       f"{time.perf_counter() - compiling:.1f} s")
          start = progress.restart(restored)
        progress.wait(time.perf_counter() - start)
        state, metrics = train_step(state, batch)
        position += cfg.train.batch_size
        # Waits for the step before: the device has this one to work on.
        window.add(i, metrics)
        if window.is_due(i - 1, cfg.log.every_steps):
          log_window(i - 1)
        progress.advance()

        last = i == n_steps or stop.signal is not None
        evaluating = i == n_steps or (i % eval_every == 0 and not last)
        saving = evaluating or last or i % cfg.checkpoint.every_steps == 0
        if saving:
          window.flush()  # What is not finite must not be saved.
          if i == n_steps or window.is_due(i, cfg.log.every_steps):
            log_window(i)
          result = evaluate_now(i) if evaluating else None
          checkpoints.save(state, position, result)
          progress.restart(i)
        if last and i < n_steps:
          raise errors.Preempted(
              f"{stop.signal.name} at step {i}; saved in "
              f"{workdir}; the same command goes on from there")
  finally:
    progress.close()
    batches.close()
    checkpoints.close()
    writer.close()

  speeds = [r["images_per_second"] for r in writer.records
            if r["split"] == "train"]
  summary = {
      "step": n_steps, **result,
      "n_params": sum(x.size for x in jax.tree.leaves(shapes.params)),
      "images_per_second": statistics.median(speeds) if speeds else None,
      "checkpoint": str(checkpoints.directory / str(n_steps)),
  }
  curves = writer.finish(summary)
  if curves:
    log.info("done: %s\ncheckpoint %s\ncurves     %s",
             report.measures(result), summary["checkpoint"], curves)
  return summary


class Evaluation:
  """Measures variables on the whole of a split; compiled once."""

  def __init__(self, task: base.Task, mesh, data: base.Data):
    self._task, self._mesh, self._data = task, mesh, data
    self._step = jax.jit(functools.partial(step.eval_step, task=task),
                         out_shardings=sharding.replicated(mesh))

  def __call__(self, variables: base.Variables) -> dict[str, float]:
    evaluators = self._task.make_evaluators()
    pending = []  # Fetched a batch late: the device is at the next one then.
    with contextlib.closing(self._data.eval_batches()) as batches:
      for batch in batches:
        pending.append(self._step(
            variables, sharding.put_batch(batch, self._mesh)))
        if len(pending) > 1:
          self._update(evaluators, pending.pop(0))
    for found in pending:
      self._update(evaluators, found)
    results = {}
    for evaluator in evaluators.values():
      results |= evaluator.result()
    return results

  @staticmethod
  def _update(evaluators, found) -> None:
    for name, value in jax.device_get(found).items():
      evaluators[name].update(value)


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
  """
  if not (workdir / "checkpoints").is_dir():
    raise errors.ConfigError(f"--workdir: {workdir} holds no checkpoints")
  checkpoints = checkpoints_lib.Checkpoints(workdir, cfg.checkpoint)
  try:
    steps = checkpoints.steps()
    i = {"last": checkpoints.latest_step, "best": checkpoints.best_step}.get(
        which, lambda: which)()
    if i not in steps:
      raise errors.ConfigError(
          f"--checkpoint: {workdir} holds no checkpoint {which}; it holds "
          f"{', '.join(map(str, steps)) or 'none'}")
    shapes = jax.eval_shape(functools.partial(
        state_lib.create, task, optax.identity(), cfg.seed,
        cfg.train.ema_decay))
    shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)
    state = checkpoints.restore_variables(
        i, sharding.abstract(shapes, shardings))
  finally:
    checkpoints.close()
  evaluate = Evaluation(task, mesh, task.make_data("eval"))
  return {"step": i, **evaluate(state.eval_variables())}


def claim_workdir(cfg: Experiment, workdir: pathlib.Path, write: bool) -> None:
  """Makes the workdir this experiment's.

  Raises:
    ConfigError: it holds a run of another experiment, or cannot be written.
  """
  path = workdir / "config.json"
  if path.is_file():
    try:
      different = config_lib.differences(cfg, path.read_text())
    except (OSError, ValueError, AttributeError) as e:
      raise errors.ConfigError(
          f"--workdir: {path} cannot be read ({e}); choose a new folder") from e
    if different:
      raise errors.ConfigError(
          f"--workdir: {workdir} holds another experiment "
          f"({'; '.join(different)}); choose a new folder")
  if not write:
    return
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(config_lib.to_json(cfg))
    os.replace(beside, path)
  except OSError as e:
    raise errors.ConfigError(f"--workdir: {e}") from e


def _last_evaluation(records, i: int) -> dict[str, float] | None:
  """What the evaluation after step i measured, if that was recorded."""
  for record in reversed(records):
    if record["split"] == "eval" and record["step"] == i:
      return {k: v for k, v in record.items() if k not in ("step", "split")}
  return None
