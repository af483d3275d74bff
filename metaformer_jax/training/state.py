"""What a training run carries from one step to the next."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from metaformer_jax.tasks import base
from metaformer_jax.training import freeze, rng

# The collections that are averaged like the parameters.
AVERAGED = ("batch_stats",)


@struct.dataclass
class TrainState:
  """The state after `step` steps.

  Attributes:
    step: int32 scalar.
    params: all parameters, with those that `train.freeze` does not train.
    model_state: the model's other collections, e.g. "batch_stats".
    opt_state: of the optimizer.
    ema_params: the moving average of `params`; None if it is off.
    ema_state: the moving average of the collections in `AVERAGED`, as in timm's
      ModelEmaV2; None if it is off.
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

  def trees(self) -> dict[str, Any]:
    """What a checkpoint holds, by name: all but `step` that has arrays."""
    trees = {field.name: getattr(self, field.name)
             for field in dataclasses.fields(self) if field.name != "step"}
    return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}

  def with_trees(self, step: int, trees: Mapping[str, Any]) -> "TrainState":
    """Inverse of `trees`, for a state that has the shapes of the result."""
    placed = jax.device_put(step, self.step.sharding).astype(self.step.dtype)
    return self.replace(step=placed, **trees)

  def start_average(self) -> "TrainState":
    """Restarts the moving average, if there is one, from the parameters."""
    if self.ema_params is None:
      return self
    return self.replace(ema_params=_copy(self.params),
                        ema_state=_copy(averaged(self.model_state)))


def averaged(model_state: Mapping[str, Any]) -> dict[str, Any]:
  """The collections of the model's state that are averaged."""
  return {k: v for k, v in model_state.items() if k in AVERAGED}


def average(new: Any, old: Any, decay: float) -> Any:
  """decay * old + (1 - decay) * new; integers are counters: the new value."""
  return jax.tree.map(
      lambda n, o: decay * o + (1 - decay) * n
      if jnp.issubdtype(n.dtype, jnp.floating) else n, new, old)


def average_trained(new: tuple[Any, Any], old: tuple[Any, Any], decay: float,
                    frozen: freeze.Frozen) -> tuple[Any, Any]:
  """`average` of (parameters, model state); what is frozen stays as it is."""
  (params, state), (old_params, old_state) = new, old
  (params, _), (state, _) = frozen.split(params), frozen.split_state(state)
  old_params, fixed_params = frozen.split(old_params)
  old_state, fixed_state = frozen.split_state(old_state)
  params, state = average((params, state), (old_params, old_state), decay)
  return freeze.merge(params, fixed_params), {
      name: freeze.merge(tree, fixed_state[name])
      for name, tree in state.items()}


def _copy(tree):
  """A copy in new buffers, as each array of a state is donated once."""
  return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def init(task: base.Task, seed: int) -> dict[str, Any]:
  """The initial variables of a task's model; traced."""
  return dict(task.model.init(rng.named(seed, "init"), *task.init_inputs()))


def create(task: base.Task, tx: optax.GradientTransformation, seed: int,
           ema_decay: float,
           frozen: freeze.Frozen = freeze.NOTHING) -> TrainState:
  """The state before the first step; traced, so that it is made in place."""
  return of_variables(init(task, seed), tx, ema_decay, frozen)


def of_variables(variables: Mapping[str, Any],
                 tx: optax.GradientTransformation, ema_decay: float,
                 frozen: freeze.Frozen) -> TrainState:
  """The state before the first step, with these variables; traced."""
  model_state = dict(variables)
  params = model_state.pop("params")
  off = None if not ema_decay else {}
  return TrainState(
      step=jnp.zeros((), jnp.int32), params=params, model_state=model_state,
      opt_state=tx.init(frozen.split(params)[0]), ema_params=off,
      ema_state=off).start_average()
