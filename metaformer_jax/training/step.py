"""A training step as a pure function, and as the program that a run compiles.

`build` neither reads data nor touches a device: a run compiles the program for
its own devices, the preflight for those of a TPU elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from metaformer_jax import errors
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import finite, freeze, optim, rng
from metaformer_jax.training import state as state_lib
from metaformer_jax.training.schedules import Schedule
from metaformer_jax.training.state import TrainState

# Of a CPU: bytes of temporary arrays for which micro-batches are advised, and
# images of each at least.
_LARGE, _MICRO_BATCH = 2**30, 8


def train_step(state: TrainState, batch: base.Batch, *, task: base.Task,
               tx: optax.GradientTransformation, schedule: Schedule, seed: int,
               ema_decay: float, accumulate: int,
               frozen: freeze.Frozen = freeze.NOTHING):
  """One optimizer step over the global batch.

  If the loss or a gradient is not finite, only `step` changes. The optimizer
  sees only what is not `frozen`.

  Returns:
    (state, metrics): scalars, and "finite" of `finite.of_step`.
  """
  rngs = rng.for_step(seed, state.step, task.rng_names)
  grads, metrics, model_state = gradients(task, state, batch, rngs, accumulate,
                                          frozen)
  trained, fixed = frozen.split(state.params)
  with jax.named_scope("checks"):
    ok = finite.of_step(metrics["loss"], grads)
    metrics |= {"learning_rate": schedule(state.step),
                "grad_norm": optax.tree.norm(grads), "finite": ok}
  with jax.named_scope("optimizer"):
    trained, opt_state = _update(tx, ok.all(), grads, trained,
                                 state.opt_state)
    params = freeze.merge(trained, fixed)
  ema_params, ema_state = state.ema_params, state.ema_state
  if ema_params is not None:
    with jax.named_scope("average"):
      ema_params, ema_state = state_lib.average_trained(
          (params, state_lib.averaged(model_state)), (ema_params, ema_state),
          ema_decay, frozen)
  with jax.named_scope("average"):  # The choice is fused with it.
    model_state, ema_params, ema_state = jax.tree.map(
        functools.partial(jnp.where, ok.all()),
        (model_state, ema_params, ema_state),
        (state.model_state, state.ema_params, state.ema_state))
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state,
                    model_state=model_state, ema_params=ema_params,
                    ema_state=ema_state), metrics


def _update(tx, ok, grads, params, opt_state):
  """Parameters and the optimizer's state after a step; the same unless ok."""
  @functools.partial(jax.jit, inline=True)  # It is traced once.
  def update(grads, params, opt_state):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  def select(ok, grads, *old):  # The choice is fused with the update.
    return jax.tree.map(functools.partial(jnp.where, ok), update(grads, *old),
                        old)

  def branch(ok, grads, *old):  # With `select`, a CPU copies the moments.
    return lax.cond(ok, update, lambda _, *old: old, grads, *old)

  return lax.platform_dependent(ok, grads, params, opt_state,
                                default=select, cpu=branch)


def gradients(task, state, batch, rngs, accumulate, frozen=freeze.NOTHING):
  """Means over the batch, computed by `accumulate` micro-batches in sequence.

  Returns (gradients of what is trained, scalars, model state). Micro-batch i
  has the examples i, i + k, i + 2k, ...: each device divides its own part of
  the batch.
  """

  trained, fixed = frozen.split(state.params)

  def loss_fn(trained, model_state, batch, rngs):
    params = freeze.merge(trained, fixed)
    with frozen.in_evaluation_mode():
      loss, metrics, model_state = task.loss(
          {"params": params, **model_state}, batch, rngs, train=True)
    return loss, (metrics, model_state)

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if accumulate == 1:
    grads, (metrics, model_state) = grad_fn(
        trained, state.model_state, batch, rngs)
    return grads, metrics, model_state

  def micro_step(carry, inputs):
    total, model_state = carry
    i, batch = inputs
    keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
    grads, (metrics, model_state) = grad_fn(
        trained, model_state, batch, keys)
    return (jax.tree.map(jnp.add, total, grads), model_state), metrics

  micro_batches = jax.tree.map(
      lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
  zeros = jax.tree.map(jnp.zeros_like, trained)
  (total, model_state), metrics = lax.scan(
      micro_step, (zeros, state.model_state),
      (jnp.arange(accumulate), micro_batches))
  grads, metrics = (jax.tree.map(lambda g: g / accumulate, total),
                    jax.tree.map(lambda m: m.mean(0), metrics))
  return grads, metrics, model_state


def eval_step(variables: base.Variables, batch: base.Batch, *, task: base.Task,
              evaluators: Mapping[str, base.Evaluator]):
  """The statistics of one batch, by evaluator; gathered on every device."""
  outputs = task.predict(variables, batch)
  return {name: evaluator.statistics(outputs, batch)
          for name, evaluator in evaluators.items()}


def notes(batch: base.Batch, stop: jax.Array) -> dict[str, jax.Array]:
  """What every process must know about the others' parts of a batch.

  Args:
    batch: a global batch; "replaced", if present, marks bad images.
    stop: from `signals.StopSignal.flags`.
  """
  replaced = batch.get("replaced", jnp.zeros((), bool))
  return {"stop": stop.max(), "bad_images": replaced.sum()}


class Program(NamedTuple):
  """What a run computes with.

  Attributes:
    n_steps: of the whole run.
    steps_per_epoch: batches per epoch; not always a whole number.
    create: () -> TrainState; to be traced.
    frozen: the parameters that are not trained.
    shapes: the state's shapes and dtypes.
    shardings: where each array of the state is placed.
    step: `train_step` and `notes`, jitted: (state, batch, flags) -> (state,
      metrics). The state is donated; flags are those of `signals.StopSignal`.
  """

  n_steps: int
  steps_per_epoch: float
  create: Callable[[], TrainState]
  frozen: freeze.Frozen
  shapes: TrainState
  shardings: TrainState
  step: Any


def total_steps(cfg: Experiment, n_examples: int) -> int:
  """Steps of the run: `train.steps`, or its epochs and the cool-down's.

  Raises:
    ConfigError: there are more than an int32 can count.
  """
  if cfg.train.steps is not None:
    return cfg.train.steps
  epochs = cfg.train.epochs + cfg.optim.cooldown_epochs
  n_steps = max(1, round(epochs * n_examples / cfg.train.batch_size))
  if n_steps >= 2**31:
    raise errors.ConfigError(
        f"config.train.epochs: {epochs:g} epochs of {n_examples} images are "
        f"{n_steps} steps of {cfg.train.batch_size}; largest: {2**31 - 1}")
  return n_steps


def build(cfg: Experiment, task: base.Task, mesh: Mesh,
          n_examples: int) -> Program:
  """Traces what can be traced of a run.

  Args:
    cfg: the experiment.
    task: its task.
    mesh: of the devices to compile for.
    n_examples: of the training split.

  Raises:
    ConfigError: the run is too long, the settings of the model do not fit each
      other, or `config.mesh.rules`, `optim.layer_decay` or `train.freeze` do
      not fit the model.
  """
  n_steps = total_steps(cfg, n_examples)
  steps_per_epoch = n_examples / cfg.train.batch_size
  path = None if task.pretrained is None else task.pretrained.path
  try:
    variables = jax.eval_shape(
        functools.partial(state_lib.init, task, cfg.seed))
  except ValueError as e:  # A model's error about settings that do not fit.
    raise errors.ConfigError(f"config.model: {e}") from e
  params = variables["params"]
  frozen = freeze.find(cfg.train.freeze, params, task.pretrained)
  if cfg.compile.scan:
    freeze.require_alike(frozen, params)
  tx, schedule = optim.create(cfg, n_steps, steps_per_epoch, path, params,
                              frozen)
  create = functools.partial(state_lib.create, task, tx, cfg.seed,
                             cfg.train.ema_decay, frozen)
  shapes = jax.eval_shape(functools.partial(
      state_lib.of_variables, tx=tx, ema_decay=cfg.train.ema_decay,
      frozen=frozen), variables)
  shardings = sharding.state_shardings(mesh, shapes, cfg.mesh)

  def step(state, batch, flags):
    # The mesh is for kernels, which a compiler cannot split.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      state, metrics = train_step(
          state, batch, task=task, tx=tx, schedule=schedule, seed=cfg.seed,
          ema_decay=cfg.train.ema_decay, accumulate=cfg.train.accumulate,
          frozen=frozen)
    return state, metrics | notes(batch, flags)

  return Program(
      n_steps, steps_per_epoch, create, frozen, shapes, shardings,
      jax.jit(step, donate_argnums=0,
              out_shardings=(shardings, sharding.replicated(mesh))))


def abstract_arguments(cfg: Experiment, task: base.Task, mesh: Mesh,
                       program: Program) -> list[tuple[Any, Any, Any]]:
  """Shapes and placement of what `program.step` takes, for each batch shape."""
  split = NamedSharding(mesh, sharding.BATCH)
  state = sharding.abstract(program.shapes, program.shardings)
  flags = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=split)
  return [
      (state, {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)
               for name, x in batch.items()}, flags)
      for batch in task.train_batches(cfg.train.batch_size)]


def lower(cfg: Experiment, task: base.Task, mesh: Mesh, program: Program,
          warn: Callable[[str], None],
          ) -> Iterator[tuple[tuple[Any, Any, Any], jax.stages.Lowered]]:
  """Lowers `program.step`, which must not have been traced before.

  Args:
    cfg, task, mesh: of which the program is made.
    program: of the run.
    warn: is called once with each line of what to warn of: why a stage has no
      kernel, with `config.compile.kernels`.

  Yields:
    (arguments, step) for each of `abstract_arguments`.

  Raises:
    ConfigError: kernels are asked for, and no branch has one.
  """
  said = set()
  for arguments in abstract_arguments(cfg, task, mesh, program):
    with cfg.compile.traced() as branches:
      lowered = program.step.lower(*arguments)
    for line in _about_kernels(cfg, mesh, branches):
      if line not in said:
        warn(line)
      said.add(line)
    yield arguments, lowered


def compiled(cfg: Experiment, task: base.Task, mesh: Mesh, program: Program,
             say: Callable[[str], None],
             ) -> Iterator[tuple[tuple[Any, Any, Any], jax.stages.Compiled]]:
  """As `lower`, compiled; `say` is also called with what may be faster."""
  for arguments, lowered in lower(cfg, task, mesh, program, say):
    step = lowered.compile()
    # BatchNorm's statistics would be those of a micro-batch.
    if (mesh.devices.flat[0].platform == "cpu"
        and "batch_stats" not in program.shapes.model_state):
      hint = micro_batches(cfg, mesh.size,
                           step.memory_analysis().temp_size_in_bytes)
      if hint:
        say(hint)
    yield arguments, step


def micro_batches(cfg: Experiment, n_devices: int, n_bytes: int) -> str:
  """Advice for a step on a CPU with large temporary arrays; empty for none.

  Their memory is new in each step, and its pages are cleared when they are
  first used. Micro-batches use the same memory one after the other
  (docs/benchmarks.md).

  Args:
    cfg: the experiment.
    n_devices: of the mesh.
    n_bytes: of a device's temporary arrays.
  """
  if cfg.train.accumulate > 1 or n_bytes < _LARGE:
    return ""
  n = cfg.train.batch_size // n_devices
  for k in range(n // _MICRO_BATCH, 1, -1):
    changed = dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, accumulate=k))
    if n % k == 0 and not list(cfg.task.check(changed, files=False)):
      return (f"the step has {n_bytes / 2**30:.1f} GiB of temporary arrays; on "
              "a CPU, micro-batches may be faster: "
              f"--config.train.accumulate={k}")
  return ""


def _about_kernels(cfg, mesh, branches) -> Iterator[str]:
  if cfg.compile.kernels == "xla":
    return
  platform = mesh.devices.flat[0].platform
  if platform != "tpu":
    yield (f"config.compile.kernels: {cfg.compile.kernels} is for TPUs; a "
           f"program for a {platform} has none")
    return
  branches.require()
  yield from branches.warnings()


def advice(cfg: Experiment) -> str:
  """What to do if a step does not fit in memory."""
  train = cfg.train
  return (f"config.train.batch_size: a step of {train.batch_size} images with "
          f"config.train.accumulate = {train.accumulate} does not fit in "
          "memory; raise accumulate, reduce the batch size, or use more "
          "devices; tools.preflight shows what fits")
