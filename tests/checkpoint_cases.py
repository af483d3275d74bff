"""States to save, comparison of states, and damage to files."""

import jax
import jax.numpy as jnp
import numpy as np

from metaformer_jax.checkpoints import manager
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import accounting
from metaformer_jax.training import state as state_lib

CFG = schema.Checkpoint(keep_last=2, keep_best=1)
TOP1 = tasks.Measure("top1", higher_is_better=True)


def opened(workdir, cfg=CFG, best=TOP1, lock=None):
  """The checkpoints of a workdir."""
  return manager.Checkpoints(workdir, cfg, best, lock)


def save(checkpoints, state, position=0, metrics=None, **counts):
  """Saves a state as a run does, then what its evaluation has measured."""
  checkpoints.save(int(state.step), state.trees(),
                   accounting.Record(position=position, **counts))
  if metrics is not None:
    checkpoints.add_metrics(int(state.step), metrics)


def restore(checkpoints, step, abstract_state):
  """Returns (state, record) of a step."""
  trees, record = checkpoints.restore(step, abstract_state.trees())
  return abstract_state.with_trees(step, trees), record


def make_state(step, seed=0, ema=True, stats=False, rows=16):
  rng = np.random.default_rng(seed)
  kernel = rng.normal(size=(rows, 8))
  params = {"a": {"kernel": jnp.asarray(kernel, jnp.float32)},
            "b": jnp.asarray(rng.normal(size=(3,)), jnp.bfloat16)}
  model_state = {
      "batch_stats": {"mean": jnp.asarray(rng.normal(size=(4,)), jnp.float32),
                      "n_batches": jnp.int32(step)},
      "frozen": {"matrix": jnp.eye(4)}} if stats else {}
  off = {} if ema else None
  state = state_lib.TrainState(
      step=jnp.int32(step), params=params, model_state=model_state,
      opt_state=(jax.tree.map(lambda x: x * 2, params), jnp.int32(step)),
      ema_params=off, ema_state=off).start_average()
  return state.replace(**jax.tree.map(lambda x: x * 3, {
      "ema_params": state.ema_params, "ema_state": state.ema_state}))


def abstract(state, sharding_of=None):
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=sharding_of(x) if sharding_of else device),
      state)


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    assert a.dtype == b.dtype
    assert np.array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


def flip(path, bit):
  """Flips one bit of a file in place."""
  with open(path, "r+b") as f:
    f.seek(bit // 8)
    byte = f.read(1)[0]
    f.seek(bit // 8)
    f.write(bytes([byte ^ 1 << bit % 8]))
