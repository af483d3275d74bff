"""Ablations with state besides the parameters, through the training loop."""

import functools

import checkpoint_cases
import jax
import numpy as np
import pytest

from metaformer_jax.config import schema
from metaformer_jax.config import tasks as task_config
from metaformer_jax.data import loader
from metaformer_jax.runtime import devices, sharding, signals, watchdog
from metaformer_jax.tasks import classification
from metaformer_jax.training import evaluate, loop, optim
from metaformer_jax.training import state as state_lib

N_STEPS = 4


class Interrupted(Exception):
  pass


def experiment_of(**model) -> schema.Experiment:
  return schema.Experiment(
      task=task_config.Classification(num_classes=10, image_size=16),
      model=schema.Model(**{"name": "poolformer_s12", "depths": (1,),
                            "dims": (16,), "token_mixers": ("pooling",),
                            **model}),
      data=schema.Data(source="digits"),
      optim=schema.Optim(base_lr=0.5, warmup_epochs=0.0),
      train=schema.Train(batch_size=16, steps=N_STEPS, ema_decay=0.5,
                         accumulate=2),
      eval=schema.Eval(batch_size=304),
      checkpoint=schema.Checkpoint(every_steps=1),
      mesh=schema.Mesh(data=2),
      log=schema.Log(tensorboard=False, compilation_cache=""))


def create(cfg):
  """A function that makes the state before the first step."""
  tx, _ = optim.create(cfg, N_STEPS, 1)
  return functools.partial(state_lib.create, classification.create(cfg)[1], tx,
                           cfg.seed, cfg.train.ema_decay)


def restore(cfg, workdir, step):
  mesh = devices.make_mesh(cfg)
  shapes = jax.eval_shape(create(cfg))
  checkpoints = checkpoint_cases.opened(workdir, cfg.checkpoint)
  try:
    state, _ = checkpoint_cases.restore(checkpoints, step, sharding.abstract(
        shapes, sharding.state_shardings(mesh, shapes, cfg.mesh)))
  finally:
    checkpoints.close()
  return state


def interrupt_after(monkeypatch, n_batches):
  whole = loader.Loader.train_batches

  def train_batches(self, position):
    batches = whole(self, position)
    for _ in range(n_batches):
      yield next(batches)
    batches.close()
    raise Interrupted

  monkeypatch.setattr(loader.Loader, "train_batches", train_batches)


@pytest.mark.slow
@pytest.mark.parametrize("model,collection", [
    ({"norm": "batch_norm"}, "batch_stats"),
    ({"token_mixers": ("random",), "activation": "star_relu",
      "res_scale_init": (1.0,), "layer_scale_init": 0.0}, "frozen")],
    ids=["batch norm", "like randformer"])
def test_state_is_trained_saved_resumed_and_evaluated(
    tmp_path, monkeypatch, model, collection):
  cfg = experiment_of(**model)
  task, mesh = classification.create(cfg)[1], devices.make_mesh(cfg)
  whole = loop.train_and_evaluate(cfg, task, mesh, tmp_path / "whole")
  with monkeypatch.context() as patch, pytest.raises(Interrupted):
    interrupt_after(patch, 2)
    loop.train_and_evaluate(cfg, task, mesh, tmp_path / "parts")
  assert restore(cfg, tmp_path / "parts", 2).step == 2
  parts = loop.train_and_evaluate(cfg, task, mesh, tmp_path / "parts")
  assert parts["loss"] == whole["loss"]

  last, resumed = (restore(cfg, tmp_path / run, N_STEPS)
                   for run in ("whole", "parts"))
  for a, b in zip(jax.tree.leaves(last), jax.tree.leaves(resumed), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  first = jax.jit(create(cfg))()
  assert first.model_state.keys() == last.model_state.keys() == {collection}
  for a, b in zip(jax.tree.leaves(first.model_state),
                  jax.tree.leaves(last.model_state), strict=True):
    # Statistics change; random matrices stay bit by bit.
    assert np.array_equal(a, b) == (collection == "frozen")
  for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params)):
    assert not np.array_equal(a, b)

  evaluation = evaluate.Evaluation(cfg, task, mesh, task.make_data("eval"))
  variables = last.eval_variables()

  def loss(variables):
    return evaluation(variables, signals.StopSignal(),
                      watchdog.Watchdog(60))["loss"]

  assert loss(variables) == whole["loss"]
  changed = jax.tree.map(lambda v: v * 2, variables[collection])
  other = {**variables, collection: changed}
  assert loss(other) != whole["loss"]


def test_initialising_on_images_changes_no_statistics():
  cfg = experiment_of(norm="batch_norm")
  task = classification.create(cfg)[1]
  x = np.random.default_rng(0).normal(3, 2, (4, 16, 16, 3)).astype(np.float32)
  stats = jax.jit(functools.partial(task.model.init, train=True))(
      jax.random.key(0), x)["batch_stats"]
  for path, value in jax.tree_util.tree_leaves_with_path(stats):
    assert np.all(value == (path[-1].key == "var")), path
