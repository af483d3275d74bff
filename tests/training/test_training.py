"""The training step: the same on any mesh and with any accumulation."""

import functools
import math
import shutil

import jax
import jax.numpy as jnp
import line_task
import numpy as np
import optax
import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import devices, sharding
from metaformer_jax.tasks import classification
from metaformer_jax.training import optim, rng, step
from metaformer_jax.training import state as state_lib


def experiment_of(**sections) -> schema.Experiment:
  """A small PoolFormer on digits, with some sections changed."""
  return small_runs.changed(schema.Experiment(
      model=schema.Model(
          name="poolformer_s12", depths=(1, 1), dims=(32, 64),
          token_mixers=("pooling",) * 2,
          layer_scale_init=0.1),
      task=tasks.Classification(
          num_classes=10, image_size=32, crop_pct=1.0, crop_area=(0.8, 1.0),
          flip=0.0),
      data=schema.Data(source="digits"),
      # A large epsilon: where the true gradient is 0, Adam's usual one would
      # turn the rounding error into a step.
      optim=schema.Optim(base_lr=0.5, warmup_epochs=0.0, eps=1e-3),
      train=schema.Train(batch_size=32, steps=20, ema_decay=0.9)), **sections)


def run_steps(cfg, n_steps):
  """Trains on digits; returns the losses and the final state on the host."""
  task = classification.create(cfg)[1]
  mesh = devices.make_mesh(cfg)
  tx, schedule = optim.create(cfg, 20, steps_per_epoch=47)
  create = functools.partial(state_lib.create, task, tx, cfg.seed,
                             cfg.train.ema_decay)
  shardings = sharding.state_shardings(mesh, jax.eval_shape(create), cfg.mesh)
  state = jax.jit(create, out_shardings=shardings)()
  train_step = jax.jit(
      functools.partial(step.train_step, task=task, tx=tx, schedule=schedule,
                        seed=cfg.seed, ema_decay=cfg.train.ema_decay,
                        accumulate=cfg.train.accumulate),
      donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
  batches = task.make_data("train").train_batches(0)
  losses = []
  for _ in range(n_steps):
    state, metrics = train_step(state, sharding.put_batch(next(batches), mesh))
    losses.append(float(metrics["loss"]))
  batches.close()
  return np.array(losses), state


@pytest.fixture(scope="module")
def on_one_device():
  return run_steps(experiment_of(mesh={"data": 1}), 20)


@pytest.mark.parametrize("mesh", [
    pytest.param({"data": 8}, marks=pytest.mark.slow),
    pytest.param({"data": 1, "fsdp": 8, "min_size": 64},
                 marks=pytest.mark.slow),
    {"data": 4, "fsdp": 2, "min_size": 64,
     "rules": (("head/kernel", -1), ("**/fc1/kernel", 0))}],
    ids=["data parallel", "fsdp", "both"])
def test_eight_devices_train_as_one(on_one_device, mesh):
  losses, state = run_steps(experiment_of(mesh=mesh), 20)
  want, _ = on_one_device
  np.testing.assert_allclose(losses, want, atol=1e-5)
  assert want[-5:].mean() < want[:5].mean() - 0.05  # It learns.
  kernel = state.params["stage2"]["block1"]["mlp"]["fc1"]["kernel"]
  n_parts = mesh.get("fsdp", 1)
  assert kernel.addressable_shards[0].data.size == kernel.size // n_parts
  moment = state.opt_state[0].mu["stage2"]["block1"]["mlp"]["fc1"]["kernel"]
  assert moment.sharding == kernel.sharding
  assert state.params["head"]["kernel"].is_fully_replicated == (
      n_parts == 1 or "rules" in mesh)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate,data", [(2, 1), (8, 4)])
def test_micro_batches_train_as_one_batch(on_one_device, accumulate, data):
  losses, state = run_steps(experiment_of(
      train={"accumulate": accumulate}, mesh={"data": data}), 20)
  want, want_state = on_one_device
  np.testing.assert_allclose(losses, want, atol=1e-5)
  for got, expected in zip(jax.tree.leaves(state.params),
                           jax.tree.leaves(want_state.params)):
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("model", [
    pytest.param({"norm": "batch_norm"}, marks=pytest.mark.slow),
    pytest.param({"token_mixers": ("random", "pooling")},
                 marks=pytest.mark.slow)], ids=["batch norm", "random mixing"])
def test_models_with_a_state_train_on_eight_devices_as_on_one(model):
  """Statistics are of the global (micro-)batch; random matrices stay."""
  train = {"accumulate": 2}
  want, one = run_steps(
      experiment_of(model=model, mesh={"data": 1}, train=train), 3)
  losses, eight = run_steps(experiment_of(
      model=model, mesh={"data": 4, "fsdp": 2, "min_size": 64}, train=train), 3)
  np.testing.assert_allclose(losses, want, atol=1e-5)
  first = classification.create(experiment_of(model=model))[1].model.init(
      rng.named(0, "init"), jnp.zeros((1, 32, 32, 3)))
  params = first.pop("params")
  for tree in (one.params, one.ema_params, one.opt_state[0].mu):
    assert jax.tree.structure(tree) == jax.tree.structure(params)
  for (path, a), b, start in zip(
      jax.tree_util.tree_leaves_with_path(eight.model_state),
      jax.tree.leaves(one.model_state), jax.tree.leaves(first), strict=True):
    a, b, start = map(np.asarray, (a, b, start))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    if path[0].key == "frozen":
      np.testing.assert_allclose(a, start, rtol=1e-6)
    else:
      assert np.all(a != start)
      assert path[-1].key != "n_batches" or a == 6


def line_step(state, batch, tx, **kwargs):
  options = {"schedule": lambda _: 0.1, "seed": 0, "ema_decay": 0.9,
             "accumulate": 1, **kwargs}
  return step.train_step(state, batch, task=line_task.LineTask(), tx=tx,
                         **options)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_step_by_hand(accumulate):
  tx = optax.sgd(0.1)
  state = state_lib.create(line_task.LineTask(), tx, 0, ema_decay=0.9)
  x = jnp.array([1.0, 2.0, 3.0, 5.0])
  after, metrics = line_step(state, {"x": x}, tx, accumulate=accumulate)
  # d/da mean((a x - 3 x)^2) = 2 (a - 3) mean(x^2), mean(x^2) = 39 / 4.
  gradient = 2 * (2 - 3) * 39 / 4
  assert math.isclose(metrics["loss"], 39 / 4, rel_tol=1e-6)
  assert math.isclose(metrics["grad_norm"], -gradient, rel_tol=1e-6)
  a = 2 - 0.1 * gradient
  np.testing.assert_allclose(after.params["a"], [a], rtol=1e-6)
  np.testing.assert_allclose(after.ema_params["a"], [0.9 * 2 + 0.1 * a],
                             rtol=1e-6)
  assert after.step == 1
  # Micro-batches run in sequence: the statistic is that of the last one.
  want = x.mean() if accumulate == 1 else 5.0
  assert float(after.model_state["batch_stats"]["mean"]) == want


def test_jit_changes_nothing():
  tx = optax.adam(0.1)
  state = state_lib.create(line_task.LineTask(), tx, 0, ema_decay=0.9)
  plain = compiled = state
  jitted = jax.jit(functools.partial(line_step, tx=tx, accumulate=2))
  for i in range(5):
    batch = {"x": jnp.arange(4.0) - i}
    plain, metrics = line_step(plain, batch, tx, accumulate=2)
    compiled, compiled_metrics = jitted(compiled, batch)
    for got, want in zip(jax.tree.leaves((compiled, compiled_metrics)),
                         jax.tree.leaves((plain, metrics))):
      np.testing.assert_allclose(got, want, rtol=1e-5)


def test_evaluation_uses_the_average_only_where_there_is_one():
  tx = optax.sgd(0.1)
  for decay in (0.0, 0.9):
    state = state_lib.create(line_task.LineTask(), tx, 0, ema_decay=decay)
    state, _ = line_step(state, {"x": jnp.ones(4)}, tx, ema_decay=decay)
    variables = state.eval_variables()
    expected = state.params if decay == 0 else state.ema_params
    assert variables["params"] is expected
    expected = state.model_state if decay == 0 else state.ema_state
    assert variables["batch_stats"] is expected["batch_stats"]


def test_statistics_are_averaged_and_counters_are_not():
  tx = optax.sgd(0.1)
  state = state_lib.create(line_task.LineTask(), tx, 0, ema_decay=0.9)
  for x in (1.0, 3.0):
    state, _ = line_step(state, {"x": jnp.full(4, x)}, tx)
  np.testing.assert_allclose(state.ema_state["batch_stats"]["mean"],
                             0.9 * 0.1 * 1 + 0.1 * 3, rtol=1e-6)
  assert state.model_state["batch_stats"]["mean"] == 3
  new, old = ({"mean": jnp.float32(x), "n_batches": jnp.int32(n)}
              for x, n in ((2.0, 7), (1.0, 0)))
  found = state_lib.average(new, old, 0.75)
  assert found["mean"] == 1.25 and found["n_batches"] == 7
  assert found["n_batches"].dtype == jnp.int32


def augmented_on_the_device(**sections):
  return experiment_of(
      data={"augment_on": "device"}, task={
          "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.2}, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_augmentation_on_eight_devices_is_that_on_one(accumulate):
  one, eight = (
      run_steps(augmented_on_the_device(
          mesh=mesh, train={"accumulate": accumulate}), 6)[0]
      for mesh in ({"data": 1}, {"data": 4, "fsdp": 2, "min_size": 64}))
  np.testing.assert_allclose(one, eight, atol=1e-5)
  if accumulate == 1:
    plain, _ = run_steps(experiment_of(
        mesh={"data": 1}, task={"mixup": 0.2}), 6)
    assert np.abs(one - plain).min() > 1e-3  # The images are others.


@pytest.mark.slow
def test_a_run_that_augments_on_the_device_resumes_bit_by_bit(tmp_path):
  cfg = augmented_on_the_device(
      mesh={"data": 1}, train={"steps": 4}, checkpoint={"every_steps": 2},
      log={"every_steps": 1, "tensorboard": False})
  cfg, task = classification.create(cfg)
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  small_runs.run(cfg, task, whole)
  shutil.copytree(whole, parts)
  shutil.rmtree(parts / "checkpoints" / "4")
  small_runs.run(cfg, task, parts)
  assert [r["loss"] for r in small_runs.records(whole)] == [
      r["loss"] for r in small_runs.records(parts)]
  last, resumed = (jax.tree.leaves(small_runs.restore(cfg, task, run, 4)[0])
                   for run in (whole, parts))
  for a, b in zip(last, resumed, strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_no_decay_of_the_average_is_no_average():
  """As decay goes to 0 the average is the state itself."""
  new, old = {"a": jnp.arange(3.0)}, {"a": jnp.ones(3)}
  assert jnp.array_equal(state_lib.average(new, old, 0.0)["a"], new["a"])


def test_matrices_that_stay_are_not_averaged():
  cfg = experiment_of(model={"token_mixers": ("random", "pooling"),
                             "norm": "batch_norm"})
  state = jax.eval_shape(functools.partial(
      state_lib.create, classification.create(cfg)[1], optax.identity(), 0,
      0.9))
  assert state.model_state.keys() == {"batch_stats", "frozen"}
  assert state.ema_state.keys() == {"batch_stats"}


def test_keys_differ_by_seed_name_and_step():
  names = classification.Classification.rng_names
  keys = [rng.for_step(seed, i, names)[name]
          for seed in (0, 1) for i in (0, 1) for name in names]
  keys.append(rng.named(0, "init"))
  raw = {tuple(jax.random.key_data(k).tolist()) for k in keys}
  assert len(raw) == len(keys)
  again = rng.for_step(1, 1, ["drop_path"])["drop_path"]
  assert jnp.array_equal(jax.random.key_data(again), jax.random.key_data(
      rng.for_step(1, 1, names)["drop_path"]))


@pytest.mark.parametrize("batch_size, accumulate, n_devices, gib, advised", [
    (32, 1, 1, 2.2, 4), (40, 1, 1, 2.2, 5), (96, 1, 2, 1.0, 6),
    (35, 1, 1, 2.2, None),  # Only parts of 7, 5 and 1.
    (16, 1, 2, 2.2, None), (32, 2, 1, 2.2, None), (32, 1, 1, 0.9, None)])
def test_micro_batches_are_advised_if_a_cpu_needs_much_memory(
    batch_size, accumulate, n_devices, gib, advised):
  cfg = experiment_of(train={"batch_size": batch_size,
                             "accumulate": accumulate})
  found = step.micro_batches(cfg, n_devices, int(gib * 2**30))
  assert found.rpartition("--config.train.accumulate=")[2] == (
      str(advised) if advised else "")


@pytest.mark.parametrize("group, advised", [(2, "4"), (16, "2"), (32, "")])
def test_micro_batches_that_are_advised_fit_the_task(group, advised):
  """In detection, they must have whole groups of `loss_group` images."""
  cfg = schema.Experiment(task=tasks.Detection(loss_group=group),
                          train=schema.Train(batch_size=32))
  found = step.micro_batches(cfg, 1, 2**31)
  assert found.rpartition("=")[2] == advised


@pytest.mark.parametrize("norm, advised", [
    ("group_norm", True), ("batch_norm", False)])
def test_advice_is_given_while_a_step_is_compiled(monkeypatch, norm, advised):
  """Not with BatchNorm, of which micro-batches change the statistics."""
  monkeypatch.setattr(step, "_LARGE", 1)
  cfg = experiment_of(mesh={"data": 2}, model={"norm": norm})
  task = classification.create(cfg)[1]
  mesh = devices.make_mesh(cfg)
  said = []
  (_, compiled), = step.compiled(
      cfg, task, mesh, step.build(cfg, task, mesh, 100), said.append)
  assert compiled.memory_analysis().temp_size_in_bytes > 0
  assert ["accumulate=2" in line for line in said] == [True] * advised


@pytest.mark.parametrize("mesh,message", [
    ({"data": 3, "fsdp": 5}, "does not fit 8 devices"),
    ({"data": 16}, "does not fit 8 devices"),
    ({"data": -1, "fsdp": 3}, "does not fit 8 devices"),
    ({"data": 3}, "32 is not divisible by 3 devices x 1 micro-batches; "
                  "nearest: 33")])
def test_meshes_that_do_not_fit(mesh, message):
  with pytest.raises(errors.ConfigError, match=message):
    devices.make_mesh(experiment_of(mesh=mesh))


@pytest.mark.parametrize("rules,message", [
    ((("haed/kernel", -1),), "'haed/kernel' matches no parameter; did you mean "
                             "head/kernel"),
    ((("head/bias", 0),), "splits axis 0 of head/bias"),
    ((("head/kernel", 2),), "splits axis 2 of head/kernel")])
def test_sharding_rules_that_do_nothing_are_errors(rules, message):
  cfg = experiment_of(mesh={"data": 2, "fsdp": 4, "rules": rules})
  tx, _ = optim.create(cfg, 10, 10)
  shapes = jax.eval_shape(functools.partial(
      state_lib.create, classification.create(cfg)[1], tx, 0, 0.9))
  with pytest.raises(errors.ConfigError, match=message):
    sharding.state_shardings(devices.make_mesh(cfg), shapes, cfg.mesh)
