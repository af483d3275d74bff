"""One step of training, and one of evaluation: pure functions."""

import jax
import jax.numpy as jnp
import optax

from metaformer_jax.tasks import base
from metaformer_jax.training import rng
from metaformer_jax.training import state as state_lib
from metaformer_jax.training.schedules import Schedule
from metaformer_jax.training.state import TrainState


def train_step(state: TrainState, batch: base.Batch, *, task: base.Task,
               tx: optax.GradientTransformation, schedule: Schedule, seed: int,
               ema_decay: float, accumulate: int):
  """One optimizer step over the global batch. Returns (state, scalars)."""
  rngs = rng.for_step(seed, state.step)
  grads, metrics, model_state = gradients(task, state, batch, rngs, accumulate)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params, ema_state = state.ema_params, state.ema_state
  if ema_params is not None:
    ema_params, ema_state = state_lib.average(
        (params, state_lib.averaged(model_state)), (ema_params, ema_state),
        ema_decay)
  metrics |= {"learning_rate": schedule(state.step),
              "grad_norm": optax.tree.norm(grads)}
  return TrainState(step=state.step + 1, params=params, opt_state=opt_state,
                    model_state=model_state, ema_params=ema_params,
                    ema_state=ema_state), metrics


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
