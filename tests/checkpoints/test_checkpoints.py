"""Checkpoints: what is saved comes back; the last and the best are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from checkpoint_cases import (
  CFG,
  abstract,
  assert_same,
  make_state,
  opened,
  restore,
  save,
)

from metaformer_jax import errors
from metaformer_jax.checkpoints import arrays
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import accounting, sharding


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("stats", [True, False])
def test_round_trip_is_exact(tmp_path, ema, stats):
  state = make_state(7, ema=ema, stats=stats)
  saved = opened(tmp_path)
  save(saved, state, 224, bad_images=3, started=2.5)
  saved.close()
  again = opened(tmp_path)
  assert again.latest_step() == 7 and again.best_step() is None
  got, record = restore(again, 7, abstract(
      make_state(0, seed=1, ema=ema, stats=stats)))
  assert record == accounting.Record(position=224, bad_images=3, started=2.5)
  assert_same(got, state)
  # Without the optimizer's state.
  wanted = abstract(state).replace(opt_state=())
  trees, _ = again.restore(7, wanted.trees())
  variables = wanted.replace(**trees).eval_variables()
  assert_same(variables, state.eval_variables())
  again.close()
  # Reading a model's variables gives the averages where there are any.
  assert_same(checkpoints_lib.read_variables(tmp_path), variables)


def test_restores_onto_another_mesh(tmp_path):
  state = make_state(1)
  saved = opened(tmp_path)
  save(saved, state)
  saved.close()
  mesh = jax.make_mesh((2, 4), ("data", "fsdp"),
                       axis_types=(jax.sharding.AxisType.Auto,) * 2)
  place = sharding.state_shardings(
      mesh, state, schema.Mesh(min_size=8))
  again = opened(tmp_path)
  got, _ = restore(again, 1, sharding.abstract(state, place))
  again.close()
  assert_same(got, state)
  kernel = got.params["a"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (4, 8)


def test_keeps_the_last_and_the_best(tmp_path):
  cfg = dataclasses.replace(CFG, keep_last=2, keep_best=1)
  scores = ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None))
  saved = opened(tmp_path, cfg)
  for step, top1 in scores:
    save(saved, make_state(step), step,
         None if top1 is None else {"top1": top1, "loss": 1.0})
  saved.close()
  again = opened(tmp_path, cfg)
  assert again.steps() == [2, 4, 5]
  assert again.best_step() == 2 and again.latest_step() == 5
  again.close()


def test_the_best_may_be_the_lowest(tmp_path):
  best = tasks.Measure("loss", higher_is_better=False)
  saved = opened(tmp_path, best=best)
  for step, loss in ((1, 0.3), (2, 0.2), (3, 0.2), (4, 0.5), (5, 0.6)):
    save(saved, make_state(step), step, {"loss": loss})
  saved.close()
  assert saved.steps() == [3, 4, 5] and saved.best_step() == 3


def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path):
  saved = opened(tmp_path)
  save(saved, make_state(1))
  saved.close()
  again = opened(tmp_path)
  state = make_state(1)
  other_shape = state.replace(
      params={**state.params, "b": jnp.zeros((4,), jnp.bfloat16)})
  other_name = state.replace(
      params={"a": state.params["a"], "c": state.params["b"]})
  for other, what in (
      (other_shape, r"params/b is bfloat16\[3\], not bfloat16\[4\]"),
      (other_name, "params/b is not in the model; params/c is missing"),
      (state.replace(model_state={"batch_stats": {"mean": jnp.zeros(2)}}),
       "model_state is missing")):
    with pytest.raises(errors.ConfigError, match=f"restored.*: {what}$") as e:
      again.restore(1, abstract(other).trees())
    assert str(tmp_path) in str(e.value)
  again.close()


def test_arrays_that_are_far_larger_than_their_files_are_refused(
    tmp_path, monkeypatch):
  """Zeros are compressed well, so a small forged step could have any size."""
  state = make_state(1)
  state = state.replace(ema_params=jax.tree.map(
      lambda x: jnp.zeros((1000, 1000)), state.params))
  checkpoints = opened(tmp_path)
  save(checkpoints, state)
  checkpoints.close()
  found = checkpoints_lib.read_variables(tmp_path)
  assert found["params"]["b"].nbytes == 4 * 10**6
  monkeypatch.setattr(arrays, "_ALWAYS_READ", 2**20)
  with pytest.raises(errors.WeightsError, match="8,000,000 bytes, more than"):
    checkpoints_lib.read_variables(tmp_path)
