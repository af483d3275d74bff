"""The training step of an experiment as one program, before there is a state.

Nothing here reads data or touches a device: a run compiles it for the devices
it has, the preflight for those of a TPU that is elsewhere.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from metaformer_jax import errors
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import optim, step
from metaformer_jax.training import state as state_lib


class Program(NamedTuple):
  """What a run computes with.

  Attributes:
    n_steps: of the whole run.
    steps_per_epoch: batches of an epoch; not always a whole number.
    create: () -> TrainState; to be traced.
    shapes: the state's shapes and dtypes.
    shardings: where each array of the state lives.
    step: jitted (state, batch, flags) -> (state, metrics); the state is
      donated; flags are those of `signals.StopSignal`.
  """

  n_steps: int
  steps_per_epoch: float
  create: Callable[[], state_lib.TrainState]
  shapes: state_lib.TrainState
  shardings: state_lib.TrainState
  step: Any


def total_steps(cfg: Experiment, n_examples: int) -> int:
  """Steps of the run: `train.steps`, or its epochs and the cool-down's.

  Raises:
    ConfigError: there are more than an int32 counts.
  """
  if cfg.train.steps is not None:
    return cfg.train.steps
  epochs = cfg.train.epochs + cfg.optim.cooldown_epochs
  n_steps = max(1, round(epochs * n_examples / cfg.train.batch_size))
  if n_steps >= 2**31:
    raise errors.ConfigError(
        f"config.train.epochs: {epochs:g} epochs of {n_examples} images are "
        f"{n_steps} steps of {cfg.train.batch_size}; the most: {2**31 - 1}")
  return n_steps


def build(cfg: Experiment, task: base.Task, mesh: Mesh,
          n_examples: int) -> Program:
  """Traces what can be traced of a run.

  Args:
    cfg: the experiment.
    task: what it learns.
    mesh: of the devices that it is for.
    n_examples: of the training split.

  Raises:
    ConfigError: the run is too long, the model's settings do not fit, or a
      rule of `config.mesh.rules` does not.
  """
  n_steps = total_steps(cfg, n_examples)
  steps_per_epoch = n_examples / cfg.train.batch_size
  tx, schedule = optim.create(cfg, n_steps, steps_per_epoch)
  create = functools.partial(state_lib.create, task, tx, cfg.seed,
                             cfg.train.ema_decay)
  try:
    shapes = jax.eval_shape(create)
  except ValueError as e:  # What a model says of settings that do not fit.
    raise errors.ConfigError(f"config.model: {e}") from e
  shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)

  def step_and_notes(state, batch, flags):
    state, metrics = step.train_step(
        state, batch, task=task, tx=tx, schedule=schedule, seed=cfg.seed,
        ema_decay=cfg.train.ema_decay, accumulate=cfg.train.accumulate)
    return state, metrics | step.notes(batch, flags)

  return Program(
      n_steps, steps_per_epoch, create, shapes, shardings,
      jax.jit(step_and_notes, donate_argnums=0,
              out_shardings=(shardings, sharding.replicated(mesh))))


def abstract_arguments(cfg: Experiment, task: base.Task, mesh: Mesh,
                       program: Program) -> tuple[Any, Any, Any]:
  """The shapes and places of what `program.step` takes."""
  flags = jax.ShapeDtypeStruct((mesh.size,), jnp.int32)
  split = NamedSharding(mesh, sharding.BATCH)
  batch, flags = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split),
      (dict(task.train_batch(cfg.train.batch_size)), flags))
  return sharding.abstract(program.shapes, program.shardings), batch, flags
