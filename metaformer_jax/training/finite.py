"""Steps and states that are not finite."""

import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from metaformer_jax import errors
from metaformer_jax.runtime import sharding
from metaformer_jax.training.state import TrainState

log = logging.getLogger(__name__)

# How many tensors, and how many skipped steps, are named in the log.
_NAMED_TENSORS = 3
_NAMED_STEPS = 10


def of_step(loss: jax.Array, grads) -> jax.Array:
  """bool [1 + n]: whether the loss and each of the n gradients are finite."""
  # A gradient whose norm overflows is of no use either.
  return jnp.isfinite(jnp.stack([
      loss.astype(jnp.float32),
      *(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads))]))


class SkippedSteps:
  """Logs the steps that were skipped; ends the run after too many in a row."""

  def __init__(self, params, max_in_a_row: int):
    """Takes the parameters, or their shapes: `of_step` is in their order."""
    names = (sharding.path_name(path) for path, _ in
             jax.tree_util.tree_leaves_with_path(params))
    self._names = ["the loss", *(f"the gradient of {name}" for name in names)]
    self._max_in_a_row = max_in_a_row
    self._first = None  # Of those in a row: (step, what was not finite).
    self._n_logged = 0

  def note(self, step: int, finite: np.ndarray) -> bool:
    """Takes `of_step` of a step; returns whether it was skipped.

    Raises:
      DivergedError: it is the last of `max_in_a_row` skipped steps.
    """
    if finite.all():
      self._first = None
      return False
    what = _name(self._names, finite)
    self._first = self._first or (step, what)
    since, first = self._first
    if step - since + 1 >= self._max_in_a_row:
      raise errors.DivergedError(
          f"steps {since} to {step} were not finite, the first one in {first}; "
          "lower config.optim.base_lr, or set config.optim.clip_norm=1.0; the "
          "last checkpoint is from before")
    self._n_logged += 1
    if self._n_logged <= _NAMED_STEPS:
      log.warning("step %d is skipped, as it is not finite: %s%s", step, what,
                  "; further ones are only counted"
                  if self._n_logged == _NAMED_STEPS else "")
    return True


def require(state: TrainState) -> None:
  """Raises DivergedError that names the arrays of a state with such values."""
  floats = {sharding.path_name(path): x for path, x in
            jax.tree_util.tree_leaves_with_path(state)
            if jnp.issubdtype(x.dtype, jnp.floating)}
  finite = jax.device_get(_are_finite(list(floats.values())))
  if not finite.all():
    raise errors.DivergedError(
        f"after step {int(jax.device_get(state.step))} the state is not "
        f"finite: {_name(list(floats), finite)}; lower config.optim.base_lr; "
        "the last checkpoint is from before")


@jax.jit
def _are_finite(arrays):
  return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def _name(names: Sequence[str], finite: np.ndarray) -> str:
  """Names what is not finite: the first few, and how many more there are."""
  bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
  n_more = len(bad) - _NAMED_TENSORS
  more = f" and {n_more} more" if n_more > 0 else ""
  return ", ".join(bad[:_NAMED_TENSORS]) + more
