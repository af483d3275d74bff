"""All that a training run carries from one step to the next."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from metaformer_jax.tasks import base
from metaformer_jax.training import rng

# The collections that are averaged as the parameters are.
AVERAGED = ("batch_stats",)


@struct.dataclass
class TrainState:
  """The state after `step` steps.

  Attributes:
    step: int32 scalar.
    params: what the optimizer changes.
    model_state: the model's other collections, e.g. "batch_stats".
    opt_state: the optimizer's.
    ema_params: the moving average of `params`; None where it is off.
    ema_state: of those of the model's other collections that are `AVERAGED`,
      as in timm's ModelEmaV2; None where it is off.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  ema_params: Any
  ema_state: Any

  def eval_variables(self) -> base.Variables:
    """What to evaluate: the moving average if there is one."""
    params = self.params if self.ema_params is None else self.ema_params
    return {"params": params, **self.model_state, **(self.ema_state or {})}

  def start_average(self) -> "TrainState":
    """Returns the state with its average, if it has one, begun anew."""
    if self.ema_params is None:
      return self
    return self.replace(ema_params=_copy(self.params),
                        ema_state=_copy(averaged(self.model_state)))


def averaged(model_state: Mapping[str, Any]) -> dict[str, Any]:
  """The collections of a model's state that are averaged."""
  return {k: v for k, v in model_state.items() if k in AVERAGED}


def average(new: Any, old: Any, decay: float) -> Any:
  """decay old + (1 - decay) new; of integers, which count, the new."""
  return jax.tree.map(
      lambda n, o: decay * o + (1 - decay) * n
      if jnp.issubdtype(n.dtype, jnp.floating) else n, new, old)


def _copy(tree):
  """Other buffers: each array of a state is donated once."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def create(task: base.Task, tx: optax.GradientTransformation, seed: int,
           ema_decay: float) -> TrainState:
  """The state before the first step. Pure: trace it to place it."""
  variables = dict(task.model.init(rng.named(seed, "init"),
                                   *task.init_inputs()))
  params = variables.pop("params")
  off = None if not ema_decay else {}
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, model_state=variables,
      opt_state=tx.init(params), ema_params=off, ema_state=off).start_average()
