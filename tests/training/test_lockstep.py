"""Short runs against PyTorch: losses, parameters and averages.

The losses, rates and final states that the official models gave with timm's
optimizer, schedule and moving average are in files that
tests/golden/make_lockstep.py makes. The small ones are in the repository; 50
steps of PoolFormer-S12 with AdamW and of CAFormer-S18 with LAMB are compared by

    pytest -m parity tests/training/test_lockstep.py --golden=DIR

with the folder that `make_lockstep.py --full --out=DIR` has filled.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import lockstep_cases
import numpy as np
import parity_cases
import pytest

import metaformer_jax
from metaformer_jax.config import schema, tasks
from metaformer_jax.convert import layouts
from metaformer_jax.tasks import classification
from metaformer_jax.training import optim, step
from metaformer_jax.training import state as state_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def experiment_of(run) -> schema.Experiment:
  """The experiment of a run."""
  return schema.Experiment(
      model=schema.Model(name=run.case.model, **run.case.overrides),
      task=tasks.Classification(
          num_classes=run.case.num_classes, image_size=run.size,
          label_smoothing=lockstep_cases.LABEL_SMOOTHING),
      optim=schema.Optim(base_lr=run.peak * 1024 / run.batch_size,
                         schedule_per="epoch", **run.optim),
      train=schema.Train(batch_size=run.batch_size, epochs=run.epochs,
                         ema_decay=run.ema_decay))


def compare(run, path):
  golden = lockstep_cases.Trajectory.load(path)
  cfg = experiment_of(run)
  task = classification.create(cfg)[1]
  tx, schedule = optim.create(cfg, run.n_steps, run.n_batches)
  train_step = jax.jit(functools.partial(
      step.train_step, task=task, tx=tx, schedule=schedule, seed=0,
      ema_decay=run.ema_decay, accumulate=1), donate_argnums=0,
      # Steps would take longer than it takes to optimise them.
      compiler_options={"xla_backend_optimization_level": 1})
  create = functools.partial(state_lib.create, task, tx, 0, run.ema_decay)
  shapes = jax.eval_shape(create)
  family = metaformer_jax.get_spec(run.case.model).family
  first = parity_cases.weights(golden.shapes)
  variables = layouts.to_flax(
      family, first, {"params": shapes.params, **shapes.model_state})

  @jax.jit
  def start(variables):
    model_state = {k: v for k, v in variables.items() if k != "params"}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return zeros.replace(params=variables["params"],
                         model_state=model_state).start_average()

  state = start(variables)
  batches = [{"image": x, "label": y} for x, y in lockstep_cases.batches(run)]
  losses, rates = [], []
  for i in range(run.n_steps):
    state, metrics = train_step(state, batches[i % run.n_batches])
    losses.append(float(metrics["loss"]))
    rates.append(float(metrics["learning_rate"]))
  np.testing.assert_allclose(rates, golden.rates, atol=1e-9, rtol=0)
  np.testing.assert_allclose(losses, golden.losses, rtol=run.loss_tolerance)
  assert max(losses) - min(losses) > 1  # They move.
  worst = np.abs(np.array(losses) / golden.losses - 1).max()
  print(f"\n{run.name}: losses differ by {worst:.1e}")
  last = {"params": state.params, **state.model_state}
  compare_end(run, first, family, last, golden.state)
  compare_end(run, first, family, state.eval_variables(), golden.ema)


def compare_end(run, first, family, variables, want):
  """Where the tensors are, and how far they have come."""
  found = layouts.to_torch(family, jax.device_get(variables), run.case.layout)
  of_norms, of_ways = [], []
  for key, (norm, *way) in want.items():
    if not re.search(run.idle, key):
      got = lockstep_cases.movement(key, first[key], found[key])[1:]
      difference = np.abs(got - way).max()
      of_norms.append(difference / norm)
      # The rounding of the parameter exceeds that of its change.
      of_ways.append(max(difference - 5e-6 * norm, 0) / way[0])
      assert of_norms[-1] < 1e-3, key
      assert of_ways[-1] < run.tolerance, (key, difference, way[0], norm)
  print(f"  tensors by {max(of_norms):.1e} of their norms, "
        f"{max(of_ways):.1e} of their ways")


@pytest.mark.slow
@pytest.mark.parametrize("run", lockstep_cases.SMALL, ids=lambda r: r.name)
def test_trains_as_pytorch(run):
  compare(run, GOLDEN / f"{run.name}.npz")


@pytest.mark.parity
@pytest.mark.parametrize("run", lockstep_cases.FULL, ids=lambda r: r.name)
def test_trains_as_pytorch_at_full_depth(run, pytestconfig):
  folder = pathlib.Path(pytestconfig.getoption("golden"))
  compare(run, folder / f"{run.name}.npz")
