"""Mixup, cutmix and random erasing against timm's, and their distributions.

tests/golden/make_augment.py ran timm.
"""

import functools
import math
import pathlib

import distributions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax.config import derived, schema, tasks
from metaformer_jax.ops import images as image_ops
from metaformer_jax.preflight import hlo
from metaformer_jax.tasks import classification, mixing

TIMM = np.load(
    pathlib.Path(__file__).parents[1] / "golden" / "augment-timm.npz")
N = 10_000


# With given random draws.


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.77, 1.0])
def test_targets_and_mixup_are_timms(lam):
  targets = mixing.smooth_one_hot(jnp.asarray(TIMM["mix labels"]), 7, 0.1)
  np.testing.assert_allclose(mixing.blend(targets, targets[::-1], lam),
                             TIMM[f"mix targets {lam}"], atol=1e-7)
  images = TIMM["mix images"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(
      mixing.blend(images, images[::-1], lam).transpose(0, 3, 1, 2),
      TIMM[f"mix mixup {lam}"], atol=1e-6)


@pytest.mark.slow
def test_cutmix_boxes_and_lambdas_are_timms():
  find = jax.jit(jax.vmap(mixing.cutmix_box))
  rows = TIMM["cutmix boxes"]
  height, width, y, x = rows[:, [0, 1, 3, 4]].T.astype(int)
  boxes = find(height, width, rows[:, 2], y, x)
  np.testing.assert_array_equal(np.stack(boxes, -1), rows[:, 5:9])
  for row in rows[:5]:  # A shape each.
    height, width = row[:2].astype(int)
    box = tuple(row[5:9].astype(np.int32))
    shares, lam = mixing.cutmix_weights(height, width, box)
    assert abs(float(lam) - row[9]) < 1e-6
    top, bottom, left, right = row[5:9].astype(int)
    want = np.ones((height, width))
    want[top:bottom, left:right] = 0
    np.testing.assert_array_equal(shares, want)


# Distributions.


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def mix(key, n, height, width, mixup, cutmix, prob=1.0):
  """The lambdas of the targets, and the mixed images, of n batches of two.

  With images of 0 and of 1, mixup gives one value between everywhere, and
  cutmix 0 and 1 only.
  """
  images = jnp.stack([jnp.zeros((height, width, 1)),
                      jnp.ones((height, width, 1))])

  def one(key):
    images_, targets = mixing.mixup_cutmix(
        key, (images, jnp.eye(2)), (images[::-1], jnp.eye(2)[::-1]),
        mixup_alpha=mixup, cutmix_alpha=cutmix, prob=prob)
    return targets[0, 0], images_[0, ..., 0]

  return jax.vmap(one)(jax.random.split(key, n))


def is_cut(images):
  return ((images == 0) | (images == 1)).all((1, 2))


@pytest.mark.slow
def test_lambdas_are_distributed_as_timms():
  lam, _ = mix(jax.random.key(0), N, 1, 1, 0.8, 0.0)
  theirs = TIMM["draw lambda"][~TIMM["draw cutmix"]]
  assert distributions.ks(np.asarray(lam), theirs) < 1
  lam, images = mix(jax.random.key(1), 3000, 96, 128, 0.0, 1.0)
  assert is_cut(images).all()
  assert distributions.ks(np.asarray(lam), TIMM["draw cutmix area"]) < 1
  np.testing.assert_allclose(1 - lam, images.mean((1, 2)), atol=1e-5)


@pytest.mark.slow
def test_either_and_none_are_as_likely_as_told():
  lam, images = mix(jax.random.key(2), N, 4, 4, 0.8, 1.0)
  cut = is_cut(images) & (lam > 0) & (lam < 1)
  whole = (lam == 0) | (lam == 1)  # Of 4 x 4 pixels cutmix takes all or none.
  smooth = ~cut & ~whole
  assert abs(smooth.mean() - 0.5) < 4 * 0.5 / math.sqrt(N)
  np.testing.assert_allclose(1 - lam, images.mean((1, 2)), atol=1e-5)
  theirs = TIMM["draw cutmix"].mean()
  assert abs(theirs - 0.5) < 4 * 0.5 / math.sqrt(N)
  lam, _ = mix(jax.random.key(3), N, 1, 1, 0.8, 0.0, 0.7)
  assert abs((lam == 1).mean() - 0.3) < 4 * math.sqrt(0.21 / N)


@pytest.mark.slow
def test_erasing_is_distributed_as_timms():
  boxes = np.stack(mixing.erasing_boxes(
      jax.random.key(0), 4 * N, 64, 48, prob=0.25), -1)
  theirs = TIMM["draw erasing"]
  done = boxes[:, 1] > boxes[:, 0]
  assert (done == (boxes[:, 3] > boxes[:, 2])).all()
  assert abs(done.mean() - 0.25) < 4 * math.sqrt(0.1875 / len(done))
  boxes, theirs = boxes[done], theirs[theirs[:, 1] > 0]
  assert (boxes >= 0).all() and boxes[:, 1].max() <= 64
  assert boxes[:, 3].max() <= 48
  for i in range(4):
    assert distributions.ks(boxes[:, i], theirs[:, i]) < 1
  sizes = [(b[:, 1] - b[:, 0]).astype(int) * (b[:, 3] - b[:, 2])
           for b in (boxes, theirs)]
  assert distributions.ks(*sizes) < 1


def test_erasing_puts_noise_into_the_box_and_leaves_the_rest():
  key, n = jax.random.key(5), 200
  images = jnp.full((n, 32, 40, 3), 9.0)
  got = np.asarray(mixing.random_erasing(key, images, 0.5))
  changed = (got != 9).all(-1)
  assert (changed == (got != 9).any(-1)).all()
  assert 60 < changed.any((1, 2)).sum() < 140
  for one in changed[changed.any((1, 2))]:
    y, x = np.nonzero(one)
    assert one.sum() == (np.ptp(y) + 1) * (np.ptp(x) + 1)
  noise = got[changed]
  assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
  assert abs(noise.std() - 1) < 0.02
  assert (mixing.random_erasing(key, images, 0.0) == images).all()


def test_each_device_erases_its_own_images_as_all_are_erased_at_once():
  images = np.full((16, 12, 10, 3), 9, np.float32)
  run = jax.jit(lambda key, images: mixing.random_erasing(key, images, 0.5))
  mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
  split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (
      [("data", "fsdp")], []))
  key = jax.random.key(3)
  program = run.lower(*map(jax.device_put, (key, images), (whole, split))
                      ).compile()
  got = program(*map(jax.device_put, (key, images), (whole, split)))
  np.testing.assert_array_equal(got, run(key, images))
  assert 4 < (np.asarray(got) != images).any(axis=(1, 2, 3)).sum() < 12
  key_box, key_noise = jax.random.split(key)
  boxes = mixing.erasing_boxes(key_box, 16, 12, 10, prob=0.5)
  np.testing.assert_allclose(got, jax.jit(jax.vmap(mixing._erase))(
      images, jax.random.split(key_noise, 16), boxes), rtol=1e-5)
  # No device is sent another's images.
  text = program.as_text()
  assert "f32[16,12,10,3]" not in text and "f32[2,12,10,3]" in text


# In the task's loss.


class Linear(nn.Module):
  """A model that compiles quickly."""

  @nn.compact
  def __call__(self, x, *, train):
    return nn.Dense(10, name="head")(x.reshape(len(x), -1))


class Task(classification.Classification):
  model = Linear()


@functools.cache  # The loss is compiled once for each task.
def task(**settings):
  return Task(derived.fill(schema.Experiment(task=tasks.Classification(
      num_classes=10, image_size=32, **settings))))


RECIPE = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}


@pytest.fixture(scope="module")
def case():
  made = task()
  variables = made.model.init(jax.random.key(0), *made.init_inputs(),
                              train=False)
  rng = np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
           "label": rng.integers(0, 10, 16, np.int32)}
  return variables, batch


@functools.partial(jax.jit, static_argnums=(0, 4))
def loss(made, variables, batch, seed=0, train=True):
  rngs = {"augment": jax.random.key(seed)}
  return made.loss(variables, batch, rngs, train)[:2]


def test_the_loss_is_of_the_mixed_batch_in_training_only(case):
  plain, mixed = task(), task(**RECIPE)
  values = [float(loss(mixed, *case, s)[0]) for s in range(3)]
  assert len({float(loss(plain, *case)[0]), *values}) == 4
  np.testing.assert_allclose(loss(mixed, *case, 0, False)[0],
                             loss(plain, *case)[0], rtol=1e-6)
  assert 0 <= loss(mixed, *case)[1]["top1"] <= 1


@pytest.mark.slow
def test_the_loss_is_that_of_the_steps_in_order(case):
  """Normalise, mix, erase: done one by one."""
  variables, batch = case
  made = task(**RECIPE)
  key_mix, key_erase = jax.random.split(jax.random.key(0))
  images = image_ops.normalize(batch["image"], made.cfg.data.mean,
                               made.cfg.data.std)
  targets = mixing.smooth_one_hot(batch["label"], 10, 0.1)
  images, targets = mixing.mixup_cutmix(
      key_mix, (images, targets), [
          jnp.concatenate([x[8:], x[:8]]) for x in (images, targets)],
      mixup_alpha=0.8, cutmix_alpha=1.0)
  images = mixing.random_erasing(key_erase, images, 0.25)
  logits = made.model.apply(variables, images, train=True)
  np.testing.assert_allclose(
      loss(made, *case)[0],
      -(targets * jax.nn.log_softmax(logits)).sum(-1).mean(), rtol=1e-5)
  for threshold in (0.0, 0.2):
    labels = targets > threshold if threshold else targets
    bce = -(labels * jax.nn.log_sigmoid(logits)
            + (1 - labels) * jax.nn.log_sigmoid(-logits)).mean()
    made = task(**RECIPE, loss="bce", bce_threshold=threshold)
    np.testing.assert_allclose(loss(made, *case)[0], bce, rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 16, 24, 48])
def test_each_example_has_one_partner(n):
  found = np.asarray(mixing.partners(jnp.arange(n)))
  assert sorted(found) == list(range(n))
  if n > 2:
    assert (np.abs(found - np.arange(n)) >= min(8, n // 2)).all()
  if n % 2 == 0:
    np.testing.assert_array_equal(found[found], np.arange(n))


@pytest.mark.parametrize("n,local", [(16, True), (8, False)])
def test_partners_are_on_the_same_device(n, local):
  """Of 8 devices, if each has a multiple of 16 examples."""
  mesh = Mesh(np.array(jax.devices()), ("data",))
  split = NamedSharding(mesh, PartitionSpec("data"))
  x = jax.device_put(np.arange(8 * n * 3).reshape(-1, 3), split)
  compiled = jax.jit(mixing.partners, out_shardings=split).lower(x).compile()
  assert local == (not hlo.Module(compiled.as_text()).collectives(8))
  np.testing.assert_array_equal(compiled(x), mixing.partners(np.asarray(x)))


@pytest.mark.slow
def test_one_device_equals_eight(case):
  """The partner is of the global batch, wherever it lies."""
  variables, batch = case
  made = task(**RECIPE)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  split = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
  for seed in range(4):
    one, _ = loss(made, variables, batch, seed)
    eight, _ = loss(made, variables, split, seed)
    np.testing.assert_allclose(one, eight, rtol=1e-5)
