"""`config.compile`: runs give the same in every form, and may change it."""

import functools
import itertools

import jax
import numpy as np
import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.config import derived, schema, tasks
from metaformer_jax.kernels import mlp, pooling, sepconv
from metaformer_jax.runtime import devices
from metaformer_jax.tasks import classification
from metaformer_jax.training import loop, step


def experiment(**sections):
  return small_runs.changed(schema.Experiment(
      model=schema.Model(
          name="poolformer_s12", depths=(2,), dims=(16,),
          token_mixers=("pooling",), layer_scale_init=0.1, drop_path_rate=0.5),
      task=tasks.Classification(num_classes=10, image_size=16),
      data=schema.Data(source="digits"),
      optim=schema.Optim(name="lamb", base_lr=0.5, warmup_epochs=0.0),
      train=schema.Train(batch_size=32, steps=4),
      checkpoint=schema.Checkpoint(every_steps=2, keep_last=2),
      log=schema.Log(tensorboard=False, compilation_cache="")), **sections)


def run(cfg, n=2):
  """Losses of n steps, and the state after them, on the host."""
  cfg, task = classification.create(cfg)
  mesh = devices.make_mesh(cfg)
  program = step.build(cfg, task, mesh, 1500)
  state = jax.jit(program.create, out_shardings=program.shardings)()
  batches = task.make_data("train").train_batches(0)
  losses = []
  for _, batch in zip(range(n), batches):
    state, metrics = program.step(state, batch,
                                  np.zeros(mesh.size, np.int32))
    losses.append(float(metrics["loss"]))
  batches.close()
  return losses, jax.tree.map(np.asarray, state)


FORM = {"scan": True, "remat": ("dots",)}
SPLIT = {"data": 4, "fsdp": 2, "min_size": 64}
NORM_FROZEN = {"model": {"norm": "batch_norm"},
               "train": {"freeze": ("**/norm1",), "accumulate": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("sections", [{}, NORM_FROZEN],
                         ids=["lamb", "frozen norms"])
def test_eight_devices_train_the_same_in_either_form(sections):
  """Trust ratios and weight decay are those of each block."""
  want_losses, want = run(experiment(mesh=SPLIT, **sections))
  losses, got = run(experiment(mesh=SPLIT, compile=FORM, **sections))
  np.testing.assert_allclose(losses, want_losses, atol=1e-5)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=1e-4)


def moved(state, start):
  """How far the parameters have come, as one vector."""
  return np.concatenate([np.ravel(a - b) for a, b in zip(
      jax.tree.leaves(state.params), jax.tree.leaves(start.params))])


@pytest.mark.slow
@pytest.mark.parametrize("dtype, most", [("float32", 1e-3), ("bfloat16", 0.2)])
def test_kernels_train_as_the_modules(monkeypatch, dtype, most):
  """Interpreted, on eight devices: losses, and the way of the parameters."""
  changes = {
      "model": {"depths": (1, 1), "dims": (16, 32), "dtype": dtype,
                "token_mixers": ("pooling", "sepconv")},
      "task": {"image_size": 32}, "optim": {"name": "adamw"},
      "train": {"batch_size": 48, "steps": 16}}
  _, start = run(experiment(**changes), 0)
  losses, state = run(experiment(**changes), 16)
  for module, branch in ((mlp, "mlp_branch"), (pooling, "pooling_branch"),
                         (sepconv, "sepconv_branch")):
    monkeypatch.setattr(module, branch, functools.partial(
        getattr(module, branch), interpret=True))
  by_kernels, got = run(experiment(**changes, compile={"kernels": "pallas"}),
                        16)
  np.testing.assert_allclose(by_kernels, losses, atol=most / 50)
  got, want = moved(got, start), moved(state, start)
  off = np.linalg.norm(got - want) / np.linalg.norm(want)
  print(f"{dtype}: {off:.2g}")
  assert 0 < off < most  # 0 if no kernel was called.


@pytest.mark.slow
def test_a_run_goes_on_in_another_form(tmp_path):
  """Stopped unrolled after two of four steps, ended scanned."""
  cfg = derived.fill(experiment(mesh={"data": 1}))
  want = small_runs.run(cfg, classification.create(cfg)[1], tmp_path / "whole")

  class Interrupted(Exception):
    pass

  class Task(classification.Classification):
    """Has two batches."""

    def make_data(self, split):
      data = super().make_data(split)
      if split == "eval":
        return data

      class Two:
        n_examples = data.n_examples

        def train_batches(self, position):
          batches = data.train_batches(position)
          yield from itertools.islice(batches, 2)
          batches.close()
          raise Interrupted

      return Two()

  with pytest.raises(Interrupted):
    loop.train_and_evaluate(cfg, Task(cfg), devices.make_mesh(cfg),
                            tmp_path / "parts")
  cfg = small_runs.changed(cfg, compile=FORM)
  got = small_runs.run(cfg, classification.create(cfg)[1], tmp_path / "parts")
  assert got["step"] == want["step"] == 4
  assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
  with pytest.raises(errors.ConfigError, match=r"depths: \[2\] -> \[3\]"):
    other = small_runs.changed(cfg, model={"depths": (3,)})
    small_runs.run(other, classification.create(other)[1], tmp_path / "parts")


def test_blocks_that_are_frozen_unlike_others_are_not_scanned():
  def build(patterns, **compile):
    cfg, task = classification.create(experiment(
        train={"freeze": patterns}, compile=compile))
    return step.build(cfg, task, devices.make_mesh(cfg), 1500).frozen

  build(("stage1/block1",))
  build(("stage1/*/norm1", "stage1/*/mlp/fc1/bias"), scan=True)
  with pytest.raises(errors.ConfigError) as caught:
    build(("stage1/block1",), scan=True)
  assert str(caught.value) == (
      "config.train.freeze: freezes other parts of stage1/block2 than of "
      "stage1/block1, and config.compile.scan = True runs both as one; "
      "nearest: config.compile.scan = False")
