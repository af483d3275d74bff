"""All that a training run carries from one step to the next."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from metaformer_jax.tasks import base
from metaformer_jax.training import rng


@struct.dataclass
class TrainState:
  """The state after `step` steps.

  Attributes:
    step: int32 scalar.
    params: what the optimizer changes.
    model_state: the model's other collections, e.g. "batch_stats".
    opt_state: the optimizer's.
    ema_params: the moving average of `params`; None where it is off.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  ema_params: Any

  def eval_variables(self) -> base.Variables:
    """What to evaluate: the moving average if there is one."""
    params = self.params if self.ema_params is None else self.ema_params
    return {"params": params, **self.model_state}


def create(task: base.Task, tx: optax.GradientTransformation, seed: int,
           ema_decay: float) -> TrainState:
  """The state before the first step. Pure: trace it to place it."""
  variables = dict(task.model.init(rng.named(seed, "init"),
                                   *task.init_inputs()))
  params = variables.pop("params")
  return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=variables,
      opt_state=tx.init(params),
      ema_params=jax.tree.map(jnp.copy, params) if ema_decay else None,
  )
