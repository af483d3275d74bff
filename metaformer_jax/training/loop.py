"""The training loop: one function for the command line, tests and notebooks."""

import contextlib
import logging
import pathlib
import statistics
from typing import Any, NamedTuple

import jax

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry
from metaformer_jax.runtime import (
  accounting,
  processes,
  report,
  sharding,
  signals,
  watchdog,
  writers,
)
from metaformer_jax.runtime import metrics as metrics_lib
from metaformer_jax.runtime import workdir as workdir_lib
from metaformer_jax.tasks import base
from metaformer_jax.training import evaluate, step
from metaformer_jax.training import program as program_lib

log = logging.getLogger(__name__)


def train_and_evaluate(cfg: Experiment, task: base.Task, mesh,
                       workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to the end, from where the workdir's last checkpoint is.

  Every process of a run calls it; the first one writes.

  Args:
    cfg: the experiment.
    task: what it learns.
    mesh: from `sharding.make_mesh(cfg)`.
    workdir: made if need be; holds the run when this returns, and what is
      needed to resume it whenever this is interrupted.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: the workdir holds another experiment or is in use, or data is
      missing.
    DataError: there are too many bad images.
    DivergedError: too many steps in a row were not finite.
    Preempted: a process was told to end by SIGTERM or SIGINT; the last step is
      saved.
    StorageError: the workdir can no longer be written.
  """
  with contextlib.ExitStack() as stack:
    stop = stack.enter_context(signals.StopSignal())
    with processes.agreeing():
      parts = _prepare(cfg, task, mesh)
      if jax.process_index() == 0:
        stack.enter_context(workdir_lib.hold(workdir))
        workdir_lib.claim(cfg, workdir)
    checkpoints = checkpoints_lib.Checkpoints(workdir, cfg.checkpoint)
    stack.callback(checkpoints.close)
    dog = stack.enter_context(watchdog.Watchdog(cfg.log.hang_seconds))
    stack.enter_context(processes.leaving(cfg.mesh.heartbeat_seconds))
    return _run(cfg, task, mesh, workdir, parts, checkpoints, stop, dog)


class _Parts(NamedTuple):
  """What a run is made of, before it has a state."""

  train_data: base.Data
  eval_data: base.Data
  program: program_lib.Program


def _prepare(cfg: Experiment, task: base.Task, mesh) -> _Parts:
  """What can fail without a device having done anything."""
  train_data, eval_data = task.make_data("train"), task.make_data("eval")
  return _Parts(train_data, eval_data, program_lib.build(
      cfg, task, mesh, train_data.n_examples))


def _first_state(cfg: Experiment, program: program_lib.Program, checkpoints):
  """How the state starts; the first that applies wins.

  1. The workdir has a checkpoint: resume it, data position included.
  2. The weights of config.init; a head of other classes begins anew.
  3. From scratch.

  Returns:
    (state, position in the data, what is counted over restarts).
  """
  shapes = program.shapes
  restored = checkpoints.latest_good()
  if restored is not None:
    return *checkpoints.restore(
        restored, sharding.abstract(shapes, program.shardings)
    ), checkpoints.totals(restored)
  with processes.agreeing():
    weights = cfg.init and pretrained.read(
        cfg.init, registry.get_spec(cfg.model.name).family,
        {"params": shapes.params, **shapes.model_state},
        (cfg.data.image_size,) * 2, new_head=True)
  state = jax.jit(program.create, out_shardings=program.shardings)()
  if weights:
    state = pretrained.warm_start(state, weights)
  return state, 0, {}


def _run(cfg: Experiment, task: base.Task, mesh, workdir: pathlib.Path,
         parts: _Parts, checkpoints, stop: signals.StopSignal,
         dog: watchdog.Watchdog) -> dict[str, Any]:
  """From the first state to the summary."""
  program, n_train = parts.program, parts.train_data.n_examples
  n_steps = program.n_steps
  first = jax.process_index() == 0
  if first:
    log.info("%s", report.plan(cfg, program.shapes, mesh, n_train,
                               parts.eval_data.n_examples, n_steps))
  state, position, saved = _first_state(cfg, program, checkpoints)
  restored = int(jax.device_get(state.step))
  if first and restored:
    log.info("resumed %s at step %d", workdir, restored)
  totals = accounting.new_totals(saved)
  clock = accounting.Clock(totals)

  train_step = program.step
  evaluation = evaluate.Evaluation(task, mesh, parts.eval_data,
                                   cfg.data.max_bad_fraction)
  writer = writers.Writer(workdir, cfg.log, restored, enabled=first)
  progress = report.Progress(restored, n_steps, enabled=first)
  eval_every = max(1, round(cfg.eval.every_epochs * program.steps_per_epoch))
  batches = parts.train_data.train_batches(position)
  window = metrics_lib.Window(step.checked(program.shapes.params),
                              cfg.train.max_skipped, totals)
  result = _last_evaluation(writer.records, restored)
  logged = restored

  def log_window(i):
    nonlocal logged
    metrics = window.means() | clock.window(
        i - logged, cfg.train.batch_size) | {
            "epoch": i * cfg.train.batch_size / n_train}
    logged = i
    writer.write(i, "train", metrics)
    progress.show(i, metrics)
    checkpoints.check()  # A full disk is told as soon as it is known.

  def evaluate_now(i):
    clock.turn_to("evaluation")
    result = evaluation(state.eval_variables(), stop, dog)
    if result is not None:
      writer.write(i, "eval", result)
      progress.say(f"step {i}  eval  {report.measures(result)}")
    return result

  try:
    with jax.transfer_guard("disallow"):
      if result is None and restored and (
          restored % eval_every == 0 or restored == n_steps):
        result = evaluate_now(restored)  # The run ended before it came to it.
        if result is None:
          raise errors.Preempted(
              f"told to end during an evaluation; {workdir} is as it was")
      for i in range(restored + 1, n_steps + 1):
        clock.turn_to("input")
        dog.beat(f"the batch of step {i}")
        batch = sharding.put_batch(next(batches), mesh)
        flags = stop.flags(mesh)
        dog.beat(f"step {i}")
        if i == restored + 1:
          clock.turn_to("setup")
          train_step = _compile(train_step, state, batch, flags)
          progress.say(f"compiled the training step in {clock.spent():.1f} s")
          flags = stop.flags(mesh)  # It took minutes, perhaps.
        clock.turn_to("step")
        state, metrics = train_step(state, batch, flags)
        position += cfg.train.batch_size
        # Waits for the step before: the device has this one to work on.
        window.add(i, metrics)
        _check_images(cfg, totals, n_train, position - cfg.train.batch_size)
        if window.is_due(i - 1, cfg.log.every_steps):
          log_window(i - 1)
        progress.advance()

        evaluating = i == n_steps or i % eval_every == 0
        if not (evaluating or window.stop
                or i % cfg.checkpoint.every_steps == 0):
          continue
        window.flush()
        if i == n_steps or window.is_due(i, cfg.log.every_steps):
          log_window(i)
        step.require_finite(state)
        told = signals.name(window.stop)
        result = evaluate_now(i) if evaluating and not told else None
        clock.turn_to("checkpoint")
        dog.beat(f"the checkpoint of step {i}")
        checkpoints.save(state, position, result, totals)
        if told or (evaluating and result is None):
          raise errors.Preempted(
              f"{told or 'told to end'} at step {i}; saved in {workdir}; the "
              "same command goes on from there")
  finally:
    progress.close()
    batches.close()
    writer.close()
  checkpoints.wait()

  last = [r for r in writer.records if r["split"] == "train"
          and {"images_per_second", "goodput"} <= r.keys()]
  summary = {
      "step": n_steps, **result,
      "n_params": sum(x.size for x in jax.tree.leaves(program.shapes.params)),
      "images_per_second": statistics.median(
          r["images_per_second"] for r in last) if last else None,
      "goodput": last[-1]["goodput"] if last else None,
      "skipped_steps": int(totals["skipped_steps"]),
      "bad_train_images": int(totals["bad_images"]),
      "checkpoint": str(checkpoints.directory / str(n_steps)),
  }
  curves = writer.finish(summary)
  if curves:
    log.info("done: %s\ncheckpoint %s\ncurves     %s",
             report.measures(result), summary["checkpoint"], curves)
  return summary


def _compile(train_step, *arguments):
  """Compiles the step; ConfigError: it does not fit the devices' memory."""
  try:
    return train_step.lower(*arguments).compile()
  except jax.errors.JaxRuntimeError as e:
    reason, _, _ = str(e).partition("\n")
    if not reason.startswith("RESOURCE_EXHAUSTED"):
      raise
    raise errors.ConfigError(
        "config.train.batch_size: a step does not fit the memory of the "
        "devices; raise config.train.accumulate, lower it, or take more "
        f"devices; tools.preflight tells what fits ({reason})") from e


def _check_images(cfg: Experiment, totals: accounting.Totals, n_train: int,
                  n_seen: int) -> None:
  """Raises DataError when too many of the images so far were bad."""
  n_bad, n = int(totals["bad_images"]), max(n_train, n_seen)
  if n_bad > cfg.data.max_bad_fraction * n:
    raise errors.DataError(
        f"{n_bad} of {n} images cannot be used, more than "
        f"config.data.max_bad_fraction = {cfg.data.max_bad_fraction:g}; the "
        "first are named above: mend the data, or allow more")


def _last_evaluation(records, i: int) -> dict[str, float] | None:
  """What the evaluation after step i measured, if that was recorded."""
  for record in reversed(records):
    if record["split"] == "eval" and record["step"] == i:
      return {k: v for k, v in record.items() if k not in ("step", "split")}
  return None
