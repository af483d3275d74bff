"""docs/nnx.md: its code, and the values of Linen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pages
import pytest
from flax import nnx, traverse_util

import metaformer_jax

PAGE = pages.ROOT / "docs" / "nnx.md"
SMALL = "depths=(1,), dims=(8,)"
REDUCED = [
    ('"poolformer_s12", num_classes=10, norm="batch_norm"',
     f'"poolformer_s12", num_classes=10, {SMALL}, drop_rate=0.1, '
     'token_mixers=("random",), norm="batch_norm"'),
    ("drop_path_rate=0.1", "drop_path_rate=0.4"),
    ("images = jax.numpy.zeros((2, 224, 224, 3))",
     "images = jax.random.normal(jax.random.key(9), (2, 32, 32, 3))"),
    ('token_mixers=(mixer, mixer, "attention", "attention")',
     f"token_mixers=(mixer,), {SMALL}"),
]


@pytest.fixture(scope="module")
def page():
  """What the page's code has defined, at a small size."""
  return pages.run_python(PAGE, changes=REDUCED)


def changed(tree, seed):
  """Variables that no initialisation would give; counters as they are."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: x if jnp.issubdtype(x.dtype, jnp.integer)
      else x + 0.1 * np.abs(rng.standard_normal(x.shape, np.float32)), tree)


def wrapped(page, rngs):
  """The page's Linen model, loaded variables, and both as an NNX module."""
  linen, images = page["linen"], page["images"]
  variables = changed(linen.init(jax.random.key(0), images), seed=1)
  model = nnx.bridge.ToNNX(linen, rngs=rngs)
  model.lazy_init(images)
  page["load"](model, variables)
  return linen, images, variables, model


def assert_same(got, want):
  got, want = map(traverse_util.flatten_dict, (got, want))
  assert got.keys() == want.keys()
  for path, value in want.items():
    np.testing.assert_allclose(got[path], value, atol=1e-6, err_msg=path)


def test_loaded_variables_give_the_outputs_of_linen(page):
  linen, images, variables, model = wrapped(page, nnx.Rngs(0))
  fresh = linen.init(jax.random.key(0), images)
  want = linen.apply(variables, images)
  np.testing.assert_allclose(model(images), want, atol=1e-6)
  assert np.abs(want - linen.apply(fresh, images)).max() > 1e-2
  for name, value in model.features(images).items():
    np.testing.assert_allclose(value, linen.apply(
        variables, images, method="features")[name], atol=1e-6)


@pytest.mark.slow
def test_a_training_step_is_that_of_linen(page):
  """Loss, parameters and statistics, with the keys that NNX has drawn."""
  linen, images, variables, model = wrapped(
      page, nnx.Rngs(0, drop_path=1, dropout=2))
  streams = nnx.Rngs(0, drop_path=1, dropout=2).fork()
  labels, tx = jnp.array([3, 7]), optax.sgd(0.1)
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  for _, stream in streams.items():
    stream()  # The keys of lazy_init.
  opt_state, losses = tx.init(variables["params"]), []
  for _ in range(2):
    keys = {name: streams[name]() for name in ("drop_path", "dropout")}

    def loss_fn(params, variables=variables, keys=keys):
      logits, updates = linen.apply(
          variables | {"params": params}, images, train=True, rngs=keys,
          mutable=["batch_stats"])
      return optax.softmax_cross_entropy_with_integer_labels(
          logits, labels).mean(), updates

    (want, new), grads = jax.value_and_grad(loss_fn, has_aux=True)(
        variables["params"])
    step, opt_state = tx.update(grads, opt_state)
    variables = variables | new | {
        "params": optax.apply_updates(variables["params"], step)}
    got = page["train_step"](model, optimizer, images, labels)
    assert got == pytest.approx(float(want), abs=1e-6)
    losses.append(float(got))
  assert losses[0] != losses[1]
  for collection, kind in (("params", nnx.Param),
                           ("batch_stats", nnx.BatchStat)):
    assert_same(nnx.to_pure_dict(nnx.state(model, kind)),
                variables[collection])
  first = nnx.state(model, nnx.BatchStat)["stage1"]["block1"]["norm1"]
  assert first["n_batches"][...] == 2


def test_the_page_trains_and_comes_back(page):
  """`trained` are Linen's variables, of which the frozen ones are as before."""
  assert page["trained"].keys() == {"params", "batch_stats", "frozen"}
  np.testing.assert_allclose(
      page["linen"].apply(page["trained"], page["images"]),
      page["model"](page["images"]), atol=1e-6)
  assert np.isfinite(page["loss"]) and page["logits"].shape == (2, 10)


def test_an_nnx_mixer_equals_the_linen_one(page):
  kwargs = {"num_classes": 10, "depths": (1,), "dims": (8,)}
  linen = metaformer_jax.create_model(
      "poolformer_s12", token_mixers=("depthwise_conv",), **kwargs)
  variables = changed(page["variables"], seed=2)
  mask = jnp.arange(32)[None, :, None] < jnp.array([32, 16])[:, None, None]
  mask = jnp.broadcast_to(mask, (2, 32, 32))
  for also in ({}, {"mask": mask, "method": "features"}):
    got, want = (model.apply(variables, page["images"], **also)
                 for model in (page["mixed"], linen))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(x, y, atol=1e-6)
