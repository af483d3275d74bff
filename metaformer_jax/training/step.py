"""One step of training, and one of evaluation: pure functions."""

import functools

import jax
import jax.numpy as jnp
import optax

from metaformer_jax import errors
from metaformer_jax.runtime import metrics as metrics_lib
from metaformer_jax.runtime import sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import rng
from metaformer_jax.training import state as state_lib
from metaformer_jax.training.schedules import Schedule
from metaformer_jax.training.state import TrainState


def train_step(state: TrainState, batch: base.Batch, *, task: base.Task,
               tx: optax.GradientTransformation, schedule: Schedule, seed: int,
               ema_decay: float, accumulate: int):
  """One optimizer step over the global batch.

  Where the loss or a gradient is not finite, nothing but `step` changes.

  Returns:
    (state, metrics): scalars, and "finite", bool [1 + n]: of the loss and of
    the gradient of each of the n parameters (`checked` names them).
  """
  rngs = rng.for_step(seed, state.step)
  grads, metrics, model_state = gradients(task, state, batch, rngs, accumulate)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params, ema_state = state.ema_params, state.ema_state
  if ema_params is not None:
    ema_params, ema_state = state_lib.average(
        (params, state_lib.averaged(model_state)), (ema_params, ema_state),
        ema_decay)
  # A norm that overflows is of no more use than a value that does.
  finite = jnp.isfinite(jnp.stack([
      metrics["loss"].astype(jnp.float32),
      *(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))]))
  metrics |= {"learning_rate": schedule(state.step),
              "grad_norm": optax.tree.norm(grads), "finite": finite}
  new = TrainState(step=state.step, params=params, opt_state=opt_state,
                   model_state=model_state, ema_params=ema_params,
                   ema_state=ema_state)
  state = jax.tree.map(
      functools.partial(jnp.where, finite.all()), new, state)
  return state.replace(step=state.step + 1), metrics


def checked(params) -> list[str]:
  """Names the entries of "finite" in a step's metrics."""
  names = (sharding.path_name(path) for path, _ in
           jax.tree_util.tree_leaves_with_path(params))
  return ["the loss", *(f"the gradient of {name}" for name in names)]


def require_finite(state: TrainState) -> None:
  """Raises DivergedError that names what of a state is not finite."""
  floats = {sharding.path_name(path): x for path, x in
            jax.tree_util.tree_leaves_with_path(state)
            if jnp.issubdtype(x.dtype, jnp.floating)}
  finite = jax.device_get(_are_finite(list(floats.values())))
  if not finite.all():
    raise errors.DivergedError(
        f"after step {int(jax.device_get(state.step))} the state is not "
        f"finite: {metrics_lib.name_all(list(floats), finite)}; lower "
        "config.optim.base_lr; the last checkpoint is from before")


@jax.jit
def _are_finite(arrays):
  return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def notes(batch: base.Batch, stop: jax.Array) -> dict[str, jax.Array]:
  """What every process must know of the others' parts of a batch.

  Args:
    batch: a global batch; "replaced", where it has that, marks bad images.
    stop: from `signals.StopSignal.flags`.
  """
  replaced = batch.get("replaced", jnp.zeros((), bool))
  return {"stop": stop.max(), "bad_images": replaced.sum()}


def gradients(task, state, batch, rngs, accumulate):
  """Means over the batch, `accumulate` micro-batches one after the other.

  Returns (gradients, scalars, model state). Micro-batch i holds the examples
  i, i + k, i + 2k, ...: every device cuts up the part of the batch it has.
  """

  def loss_fn(params, model_state, batch, rngs):
    loss, metrics, model_state = task.loss(
        {"params": params, **model_state}, batch, rngs, train=True)
    return loss, (metrics, model_state)

  grad_fn = jax.grad(loss_fn, has_aux=True)
  if accumulate == 1:
    grads, (metrics, model_state) = grad_fn(
        state.params, state.model_state, batch, rngs)
    return grads, metrics, model_state

  def micro_step(carry, inputs):
    total, model_state = carry
    i, batch = inputs
    keys = {name: jax.random.fold_in(key, i) for name, key in rngs.items()}
    grads, (metrics, model_state) = grad_fn(
        state.params, model_state, batch, keys)
    return (jax.tree.map(jnp.add, total, grads), model_state), metrics

  micro_batches = jax.tree.map(
      lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
  zeros = jax.tree.map(jnp.zeros_like, state.params)
  (total, model_state), metrics = jax.lax.scan(
      micro_step, (zeros, state.model_state),
      (jnp.arange(accumulate), micro_batches))
  grads, metrics = (jax.tree.map(lambda g: g / accumulate, total),
                    jax.tree.map(lambda m: m.mean(0), metrics))
  return grads, metrics, model_state


def eval_step(variables: base.Variables, batch: base.Batch, *,
              task: base.Task):
  """The statistics of one batch, by evaluator; gathered on every device."""
  outputs = task.predict(variables, batch)
  return {name: evaluator.statistics(outputs, batch)
          for name, evaluator in task.make_evaluators().items()}
