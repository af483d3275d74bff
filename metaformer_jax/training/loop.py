"""The training loop: one function for the command line, tests and notebooks."""

import contextlib
import dataclasses
import logging
import pathlib
import statistics
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager, pretrained
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import (
  accounting,
  agreement,
  metrics,
  processes,
  report,
  sharding,
  signals,
  watchdog,
  writers,
)
from metaformer_jax.runtime import workdir as workdir_lib
from metaformer_jax.tasks import base
from metaformer_jax.training import backbone, evaluate, finite, same_data, step
from metaformer_jax.training.state import TrainState

log = logging.getLogger(__name__)


def train_and_evaluate(cfg: Experiment, task: base.Task, mesh: Mesh,
                       workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to the end, starting from the workdir's last checkpoint.

  Every process of a run calls it; the first one writes.

  Args:
    cfg: the experiment.
    task: its task.
    mesh: from `devices.make_mesh(cfg)`.
    workdir: created if necessary; has the finished run when this returns, and
      what is needed to resume it if this is interrupted.

  Returns:
    The summary, as in summary.json.

  Raises:
    ConfigError: the workdir is of another run or in use, or data is missing.
    DataError: there are too many bad images.
    DivergedError: too many steps in a row were not finite.
    OutOfMemoryError: a step or an evaluation does not fit in memory.
    Preempted: a process received SIGTERM or SIGINT; the last step is saved.
    StorageError: the workdir can no longer be written.
  """
  with contextlib.ExitStack() as stack:
    run = Run.start(cfg, task, mesh, workdir, stack)
    run.evaluate_restored()
    for i in run.remaining_steps():
      run.train(i)
      if run.should_log(i - 1):
        run.log(i - 1)
      if not run.should_save(i):
        continue
      run.finish_step(i)
      if run.should_log(i):
        run.log(i)
      run.save(i)
      if run.should_evaluate(i):
        run.evaluate(i)
      run.raise_if_stopped(i)
    return run.finish()


@dataclasses.dataclass
class Run:
  """A run between its first state and its summary.

  The metrics of a step are fetched after the next one is dispatched, so that
  the device never waits for the host: `train(i)` accounts for step i - 1, and
  `finish_step(i)` for step i.

  Attributes:
    record: what is counted over restarts; a checkpoint holds it.
    result: of the evaluation of the current state; None if there was none.
    stopping: why the run ends after this step; empty if it does not.
  """

  cfg: Experiment
  task: base.Task
  mesh: Mesh
  workdir: pathlib.Path
  train_data: base.Data
  data: same_data.Fingerprints
  program: step.Program
  state: TrainState
  record: accounting.Record
  clock: accounting.Clock
  batches: Iterator[dict[str, Any]]
  evaluation: evaluate.Evaluation
  checkpoints: manager.Checkpoints
  writer: writers.Writer
  progress: report.Progress
  stop: signals.StopSignal
  watchdog: watchdog.Watchdog
  restored_step: int
  result: dict[str, float] | None = None
  stopping: str = ""

  def __post_init__(self):
    self._compiled: dict[tuple, Any] = {}
    self._window = metrics.Window()
    trained, _ = self.program.frozen.split(self.program.shapes.params)
    self._skipped = finite.SkippedSteps(trained, self.cfg.train.max_skipped)
    self._pending: tuple[int, dict[str, jax.Array]] | None = None
    self._learning_rate = 0.0
    self._accounted = self._logged = self.restored_step
    self._eval_every = max(1, round(
        self.cfg.eval.every_epochs * self.program.steps_per_epoch))

  @classmethod
  def start(cls, cfg: Experiment, task: base.Task, mesh: Mesh,
            workdir: pathlib.Path, stack: contextlib.ExitStack) -> "Run":
    """Opens everything; what must be closed is left to `stack`."""
    stop = stack.enter_context(signals.StopSignal())
    first = jax.process_index() == 0
    with processes.agreeing():
      workdir_lib.check_path(workdir)
      train_data, eval_data = task.make_data("train"), task.make_data("eval")
      program = step.build(cfg, task, mesh, train_data.n_examples)
      names = dict.fromkeys(("loss", cfg.best_measure.name))
    data = same_data.agree(training=train_data, evaluation=eval_data)
    with processes.agreeing():
      if first:
        writers.check(cfg.log)
        lock = stack.enter_context(workdir_lib.hold(workdir))
        workdir_lib.claim(cfg, workdir, report.parameters(
            program.shapes.params, program.frozen))
      if hasattr(train_data, "start_workers"):
        stack.callback(train_data.start_workers())
    checkpoints = manager.Checkpoints(
        workdir, cfg.checkpoint, cfg.best_measure, lock if first else None)
    stack.callback(checkpoints.close)
    dog = stack.enter_context(watchdog.Watchdog(
        cfg.log.hang_seconds, cfg.log.exit_after_seconds))
    stack.enter_context(processes.leaving(cfg.mesh.heartbeat_seconds))
    stack.enter_context(errors.fitting_memory(step.advice(cfg)))
    if first:
      log.info("%s\n", report.plan(
          cfg, program.shapes, program.frozen, mesh, train_data.n_examples,
          eval_data.n_examples, program.n_steps, workdir / "parameters.txt"))
    with errors.fitting_memory(
        f"config.model: its state of {sharding.n_bytes(program.shapes):,} "
        "bytes does not fit in memory; divide it among devices with "
        "config.mesh.fsdp, or choose a smaller model"):
      state, record = _first_state(cfg, task, program, checkpoints, dog, data)
    restored = int(jax.device_get(state.step))
    if first and restored:
      log.info("resumed %s at step %d", workdir, restored)
    run = cls(
        cfg, task, mesh, workdir, train_data, data, program, state, record,
        accounting.Clock(record), processes.reading(
            stop.batches(train_data.train_batches(record.position))),
        evaluate.Evaluation(cfg, task, mesh, eval_data),
        checkpoints, stack.enter_context(writers.Writer(
            workdir, cfg, restored, [*names, "learning_rate"], enabled=first)),
        report.Progress(restored, program.n_steps, list(names), enabled=first),
        stop, dog, restored)
    stack.callback(run.batches.close)
    stack.callback(run.progress.close)
    stack.enter_context(jax.transfer_guard("disallow"))
    return run

  def remaining_steps(self) -> range:
    """The numbers of the steps to do, from 1 for the first of the run."""
    return range(self.restored_step + 1, self.program.n_steps + 1)

  def train(self, i: int) -> None:
    """Dispatches step i, and accounts for the step before."""
    self.clock.switch_to("input")
    self.watchdog.beat(f"the batch of step {i}", limited=True)
    with self._saved_if_input_ends(i - 1):
      batch = sharding.put_batch(next(self.batches), self.mesh)
    self.watchdog.beat(f"step {i}", limited=bool(self._compiled))
    if not self._compiled:
      self._compile()
      self.stop.listen()
    flags = self.stop.flags(self.mesh)
    self.clock.switch_to("step")
    self.state, found = self._step_for(batch)(self.state, batch, flags)
    self.record.position += self.cfg.train.batch_size
    self._account()
    self._pending = i, found
    self._check_images(self.record.position - self.cfg.train.batch_size)
    self.progress.advance()

  def _compile(self) -> None:
    """Compiles the step for each shape of a batch."""
    self.clock.switch_to("setup")
    self.progress.say("compiling the training step; a large model takes "
                      "minutes")
    for arguments, compiled in step.compiled(
        self.cfg, self.task, self.mesh, self.program, self.progress.say):
      self._compiled[base.signature(arguments[1])] = compiled
    self.progress.say(
        f"compiled the training step in {self.clock.spent():.1f} s")

  def _step_for(self, batch: base.Batch):
    shapes = base.signature(batch)
    if shapes not in self._compiled:
      raise ValueError(
          f"the training data gave a batch of {shapes}, but the task's "
          f"train_batches() are {'; '.join(map(str, self._compiled))}")
    return self._compiled[shapes]

  def _account(self) -> None:
    """Waits for the metrics of the last step, and adds them up."""
    if self._pending is None:
      return
    (i, found), self._pending = self._pending, None
    found = jax.device_get(found)
    self.stopping = signals.name(int(found.pop("stop")))
    self.record.bad_images += int(found.pop("bad_images"))
    self._learning_rate = float(found.pop("learning_rate"))
    self._accounted = i
    if self._skipped.note(i, found.pop("finite")):
      self.record.skipped_steps += 1
    else:
      self._window.add(found)

  def _check_images(self, n_seen: int) -> None:
    """Raises DataError if too many of the images so far were bad."""
    n_bad, n = self.record.bad_images, max(self.train_data.n_examples, n_seen)
    limit = self.cfg.data.max_bad_fraction
    if n_bad > limit * n:
      raise errors.DataError(
          f"{n_bad} of {n} images are unusable, more than "
          f"config.data.max_bad_fraction = {limit:g}; the first ones are named "
          "above: repair the data, or raise the limit")

  def should_log(self, i: int) -> bool:
    """Whether the metrics up to step i are due, and not logged yet."""
    due = i % self.cfg.log.every_steps == 0 or i == self.program.n_steps
    return due and self._logged < i == self._accounted

  def log(self, i: int) -> None:
    """Writes the means since the last call, and shows them."""
    batch_size = self.cfg.train.batch_size
    found = self._window.means() | {
        "learning_rate": self._learning_rate,
        "skipped_steps": self.record.skipped_steps,
        "bad_images": self.record.bad_images,
        **self.clock.window(i - self._logged, batch_size),
        "epoch": i * batch_size / self.train_data.n_examples}
    self._logged = i
    self.writer.write(i, "train", found)
    self.progress.show(i, found)
    self.checkpoints.check()  # To report a full disk as soon as possible.

  def should_save(self, i: int) -> bool:
    """Whether step i is followed by a save: for evaluations, and to stop."""
    return (self._is_evaluated(i) or bool(self.stopping)
            or i % self.cfg.checkpoint.every_steps == 0)

  def finish_step(self, i: int) -> None:
    """Waits for step i.

    Raises:
      DivergedError: its state is not finite.
    """
    self._account()
    self.result = None
    finite.require(self.state)

  def _is_evaluated(self, i: int) -> bool:
    return evaluate.is_due(i, self.program.n_steps, self._eval_every)

  def should_evaluate(self, i: int) -> bool:
    """Whether step i is followed by an evaluation."""
    return self._is_evaluated(i) and not self.stopping

  def evaluate(self, i: int) -> None:
    """Measures the saved step i, unless a process is asked to stop."""
    self.clock.switch_to("evaluation")
    self.result = self.evaluation(self.state.eval_variables(), self.stop,
                                  self.watchdog)
    if self.result is None:
      self.stopping = "asked to stop"
      return
    # A run that ended before the manifest was written has recorded it.
    if writers.last_evaluation(self.writer.records, i) is None:
      self.writer.write(i, "eval", self.result)
    self.checkpoints.add_metrics(i, self.result, self.writer.store)
    self.progress.show_evaluation(i, self.result)

  def evaluate_restored(self) -> None:
    """Does the restored step's evaluation, if it is due and missing."""
    i = self.restored_step
    if i:
      self.result = self.checkpoints.read(i).metrics or None
    if i and self._is_evaluated(i) and self.result is None:
      self.evaluate(i)
      self.raise_if_stopped(i)

  def save(self, i: int) -> None:
    """Starts to save the state after step i."""
    self.clock.switch_to("checkpoint")
    self.watchdog.beat(f"the checkpoint of step {i}")
    self.record.productive_seconds = self.clock.productive_seconds
    self.checkpoints.save(i, self.state.trees(), self.record, self.data,
                          before=self.writer.store, needed=bool(
                              self.stopping) or i == self.program.n_steps)

  @contextlib.contextmanager
  def _saved_if_input_ends(self, i: int) -> Iterator[None]:
    """If it raises, saves step i first, if that can and need be.

    Of several processes, the others do not know of the error.
    """
    try:
      yield
    except errors.UserError:
      if i > self.restored_step and jax.process_count() == 1:
        self.finish_step(i)
        self.checkpoints.wait()
        if self.checkpoints.latest_step() != i:
          self.save(i)
      raise

  def raise_if_stopped(self, i: int) -> None:
    """Raises Preempted if a process was asked to stop."""
    if self.stopping:
      raise errors.Preempted(
          f"{self.stopping} at step {i}; saved in {self.workdir}; the same "
          "command continues from there")

  def finish(self) -> dict[str, Any]:
    """Waits for the last checkpoint, and writes the summary."""
    self.checkpoints.wait()
    n_steps, params = self.program.n_steps, self.program.shapes.params
    logged = [r for r in self.writer.records if r["split"] == "train"
              and {"images_per_second", "goodput"} <= r.keys()]
    summary = {
        "step": n_steps, **(self.result or {}),
        "n_params": sum(x.size for x in jax.tree.leaves(params)),
        "images_per_second": statistics.median(
            r["images_per_second"] for r in logged) if logged else None,
        "goodput": logged[-1]["goodput"] if logged else None,
        "skipped_steps": self.record.skipped_steps,
        "bad_train_images": self.record.bad_images,
        "checkpoint": str(self.checkpoints.directory / str(n_steps)),
    }
    # All wait for the first one: jax gives an orderly exit less time.
    with processes.agreeing():
      curves = self.writer.finish(summary)
    self.progress.finish(
        self.result or {}, f"checkpoint {summary['checkpoint']}",
        f"curves     {curves}")
    return summary


def _first_state(cfg: Experiment, task: base.Task, program: step.Program,
                 checkpoints: manager.Checkpoints, dog: watchdog.Watchdog,
                 data: same_data.Fingerprints,
                 ) -> tuple[TrainState, accounting.Record]:
  """How the state starts; the first that applies wins.

  1. The workdir has a checkpoint: resume it, data position included.
  2. The weights of config.init, on each host downloaded if they are published
     ones; a head with other classes is re-initialised.
  3. From scratch.
  """
  shapes = program.shapes
  restored = checkpoints.latest_good()
  if restored is not None:
    same_data.require_unchanged(cfg, checkpoints, restored, data,
                                program.n_steps)
    abstract = sharding.abstract(shapes, program.shardings)
    trees, record = checkpoints.restore(
        restored, abstract.trees(), restored * cfg.train.batch_size)
    return abstract.with_trees(restored, trees), record
  with processes.agreeing():
    initial = cfg.init and backbone.read_weights(
        cfg.init, task.pretrained,
        {"params": shapes.params, **shapes.model_state},
        lambda: dog.beat(f"the download of {cfg.init}"),
        **backbone.head(cfg, task))
  processes.require_same(
      lambda: {"weights of config.init": agreement.of_arrays(initial or {})})
  state = jax.jit(program.create, out_shardings=program.shardings)()
  if initial:
    variables = pretrained.warm_start(
        {"params": state.params, **state.model_state}, initial)
    params = variables.pop("params")
    state = state.replace(params=params, model_state=variables).start_average()
  return state, accounting.Record()
