"""`train.freeze`: what is frozen stays as it is, and runs as in evaluation."""

import functools

import dense_task
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_runs
from flax import linen as nn
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import devices
from metaformer_jax.tasks import classification
from metaformer_jax.training import freeze, optim, step
from metaformer_jax.training import state as state_lib


def experiment(model=None, **sections):
  return small_runs.changed(schema.Experiment(
      model=schema.Model(**{
          "name": "poolformer_s12", "depths": (1, 1), "dims": (8, 16),
          "token_mixers": ("pooling",) * 2, "layer_scale_init": 0.1,
          "drop_path_rate": 0.5, "drop_rate": 0.3, **(model or {})}),
      task=tasks.Classification(num_classes=10, image_size=16),
      data=schema.Data(source="digits"),
      optim=schema.Optim(base_lr=0.5, warmup_epochs=0.0),
      train=schema.Train(batch_size=16, steps=4, ema_decay=0.5)), **sections)


def flat(tree):
  return traverse_util.flatten_dict(jax.tree.map(np.asarray, tree), sep="/")


def run(cfg, n=2):
  """The states before and after n steps."""
  cfg, task = classification.create(cfg)
  mesh = devices.make_mesh(cfg, jax.devices()[:1])
  program = step.build(cfg, task, mesh, 1500)
  first = jax.jit(program.create)()
  before = jax.tree.map(np.asarray, first)
  batches = task.make_data("train").train_batches(0)
  state = first
  for _, batch in zip(range(n), batches):
    state, metrics = program.step(state, batch, np.zeros(1, np.int32))
  assert np.isfinite(metrics["loss"])
  return before, jax.tree.map(np.asarray, state), program.frozen


@pytest.mark.parametrize("patterns,trained,name", [
    (("backbone",), {"head"}, "adamw"),
    pytest.param(("stage1/*", "head"), {"stage2", "norm"}, "lamb",
                 marks=pytest.mark.slow),
    pytest.param(("stage1",), {"stage2", "norm", "head"}, "sgd",
                 marks=pytest.mark.slow),
    pytest.param(("stage*", "norm/*"), {"head"}, "lamb",
                 marks=pytest.mark.slow),
    pytest.param(("backbone",), {"head"}, "sgd", marks=pytest.mark.slow)])
def test_what_is_frozen_does_not_move(patterns, trained, name):
  before, after, _ = run(experiment(
      model={"norm": "batch_norm"}, optim={"name": name},
      train={"freeze": patterns, "accumulate": 2 if name == "sgd" else 1}))
  for tree in ("params", "ema_params", "model_state", "ema_state"):
    old, new = flat(getattr(before, tree)), flat(getattr(after, tree))
    assert old.keys() == new.keys()
    for path in old:
      top = path.split("/")[1 if "state" in tree else 0]
      if top in trained and path.endswith("downsample/conv/bias"):
        continue  # BatchNorm subtracts it again: its gradient may be zero.
      assert np.array_equal(old[path], new[path]) == (top not in trained), path
  moments = [v for v in jax.tree.leaves(after.opt_state) if v.ndim]
  sizes = sum(v.size for path, v in flat(after.params).items()
              if path.split("/")[0] in trained)
  assert sum(v.size for v in moments) == sizes * (1 if name == "sgd" else 2)


def test_frozen_parts_run_as_in_evaluation():
  """Dropout, drop path and batch statistics are off there, and only there."""
  _, task = classification.create(experiment(
      model={"norm": "batch_norm", "name": "caformer_s18", "head": "mlp",
             "head_drop_rate": 0.5, "head_norm_first": False,
             "res_scale_init": (),
             "token_mixers": ("sepconv",) * 2}))
  variables = jax.jit(task.model.init)(
      jax.random.key(0), *task.init_inputs())
  frozen = freeze.find(["backbone"], variables["params"], task.pretrained)
  images = jax.random.normal(jax.random.key(1), (8, 16, 16, 3))

  def logits(train, rate, key):
    model = task.model.clone(head_drop_rate=rate)
    with frozen.in_evaluation_mode():
      return model.apply(
          variables, images, train=train, mutable=["batch_stats"],
          rngs={"dropout": key, "drop_path": jax.random.fold_in(key, 1)})

  one, two = jax.random.split(jax.random.key(2))
  want, _ = logits(False, 0.5, one)
  got, state = logits(True, 0.0, one)
  np.testing.assert_array_equal(got, want)
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"],
               variables["batch_stats"])
  # The head is trained: its dropout is on.
  (first, _), (second, _) = logits(True, 0.5, one), logits(True, 0.5, two)
  assert not np.array_equal(first, second)


@pytest.mark.slow
def test_nothing_frozen_is_the_usual_step():
  """Of what is trained, the gradients are those of the whole model."""
  _, task = classification.create(experiment(
      model={"drop_path_rate": 0.0, "drop_rate": 0.0}))
  tx = optax.sgd(0.1)
  whole = state_lib.create(task, tx, 0, 0.0)
  batch = next(task.make_data("train").train_batches(0))
  frozen = freeze.find(["stage1"], whole.params, task.pretrained)
  rngs = {name: jax.random.key(i) for i, name in enumerate(task.rng_names)}
  gradients = functools.partial(jax.jit(
      step.gradients, static_argnums=(0, 4, 5)), task, whole, batch, rngs, 1)
  all_of_them, _, _ = gradients(freeze.NOTHING)
  some, _, _ = gradients(frozen)
  want, _ = frozen.split(all_of_them)
  assert flat(some).keys() == flat(want).keys()
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6),
               some, want)


def test_layers_are_counted_as_if_nothing_were_frozen():
  params = {f"stage{s}": {"block1": {"norm1": {"scale": np.ones(3)}}}
            for s in (1, 2)} | {"head": {"bias": np.ones(3)}}
  frozen = freeze.find(["stage2"], params, None)
  scale = optim.scale_by_layer(0.5, "", params, frozen)
  updates, _ = frozen.split(params)
  got, _ = scale.update(updates, scale.init(updates))
  assert got["stage1"]["block1"]["norm1"]["scale"][0] == 0.25
  assert got["head"]["bias"][0] == 1 and "stage2" not in got


class Positional(nn.Module):
  """Gets `train` by position, and its parts by other names."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(name="norm")(x, not train)
    x = nn.Dropout(0.5, name="drop")(x, not train)
    return nn.Dense(3, name="fc")(x)


class Outer(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(2, name="head")(Positional(name="body")(x, train))


def test_modules_that_take_train_by_position():
  model, x = Outer(), jnp.ones((4, 5))
  variables = model.init(jax.random.key(0), x, False)
  frozen = freeze.find(["body"], variables["params"], None)
  with frozen.in_evaluation_mode():
    got, state = model.apply(variables, x, True, mutable=["batch_stats"],
                             rngs={"dropout": jax.random.key(1)})
  np.testing.assert_array_equal(got, model.apply(variables, x, False))
  jax.tree.map(np.testing.assert_array_equal, state["batch_stats"],
               variables["batch_stats"])


@pytest.mark.slow
def test_a_backbone_inside_a_larger_model():
  """The dense task trains its head alone on a frozen backbone."""
  task = dense_task.DenseTask()
  cfg = schema.Experiment(
      task=dense_task.Section(), train=schema.Train(
          batch_size=8, steps=4, freeze=("backbone",)),
      optim=schema.Optim(base_lr=1.0, warmup_epochs=0.0, layer_decay=0.9))
  mesh = devices.make_mesh(cfg, jax.devices()[:1])
  program = step.build(cfg, task, mesh, 12)
  state = jax.jit(program.create)()
  before = flat(state.params)
  batches = task.make_data("train").train_batches(0)
  losses = []
  for _, batch in zip(range(6), batches):
    state, metrics = program.step(state, batch, np.zeros(1, np.int32))
    losses.append(float(metrics["loss"]))
  after = flat(state.params)
  for path in before:
    same = np.array_equal(before[path], after[path])
    assert same == path.startswith("backbone/"), path
  assert losses[4] < losses[0] and losses[5] < losses[1]
  assert not any("backbone" in jax.tree_util.keystr(path) for path, _ in
                 jax.tree_util.tree_leaves_with_path(state.opt_state))


@pytest.mark.parametrize("patterns,words", [
    (("stag1",), "did you mean stage1"),
    (("stage*", "norm", "head"), "nothing is left to train"),
    (("*",), "nothing is left to train")])
def test_patterns_that_do_not_fit(patterns, words):
  cfg, task = classification.create(experiment(train={"freeze": patterns}))
  with pytest.raises(errors.ConfigError, match=r"config\.train\.freeze: ") as e:
    step.build(cfg, task, devices.make_mesh(cfg, jax.devices()[:1]), 1500)
  assert words in str(e.value)


def test_no_backbone_to_freeze():
  with pytest.raises(errors.ConfigError, match="'backbone' matches no param"):
    freeze.find(["backbone"], {"w": np.ones(2)}, None)
