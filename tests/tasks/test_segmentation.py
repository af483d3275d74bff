"""Segmentation as a task: padding, windows, scales and mirrored images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import plain_segmentation as plain
import pytest
from flax import traverse_util

from metaformer_jax import errors
from metaformer_jax import tasks as task_lib
from metaformer_jax.config import schema, tasks
from metaformer_jax.tasks import dense

N = 5
MODEL = {"depths": (1, 1), "dims": (8, 32),
         "token_mixers": ("pooling", "attention")}
SIZES = ((33, 64), (64, 21))


def made(**section):
  cfg = schema.Experiment(
      model=schema.Model(name="poolformer_s12", **MODEL),
      data=schema.Data(source="scenes", mean=(0.4, 0.5, 0.6), std=(0.2,) * 3),
      task=tasks.Segmentation(num_classes=N, crop_size=(64, 64), fpn_dim=8,
                              head_dim=8, head_drop_rate=0.0, **section))
  return task_lib.create(cfg, files=False)[1]


def perturbed(task, seed=0):
  """Variables far from their initial values."""
  variables = jax.jit(task.model.init)(jax.random.key(seed),
                                       *task.init_inputs())
  leaves, tree = jax.tree.flatten(variables)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(tree, [
      x if x.dtype == jnp.int32 else
      x * jnp.array(rng.uniform(0.5, 2, x.shape), jnp.float32) + 0.05
      for x in leaves])


def batch_of(sizes, canvas=(64, 64), seed=0):
  """Images and labels at the top left; what is in the padding is 0 and 255."""
  rng = np.random.default_rng(seed)
  n = len(sizes)
  batch = {"image": np.zeros((n, *canvas, 3), np.uint8),
           "label": np.full((n, *canvas), 255, np.uint8),
           "size": np.array(sizes, np.int32)}
  for i, (h, w) in enumerate(sizes):
    # Brighter to the right, so that more than one class is found.
    ramp = np.linspace(0, 200, w)[None, :, None]
    batch["image"][i, :h, :w] = ramp + rng.integers(0, 56, (h, w, 3))
    batch["label"][i, :h, :w] = rng.choice([*range(N), 255], (h, w))
  return batch


def alone(batch, i):
  """Example i on a canvas of its own size."""
  h, w = batch["size"][i]
  return {"image": batch["image"][i:i + 1, :h, :w],
          "label": batch["label"][i:i + 1, :h, :w],
          "size": batch["size"][i:i + 1]}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
def test_loss_of_a_batch_is_that_of_its_images(head):
  task = made(head=head, auxiliary_weight=0.4 if head == "upernet" else 0.0)
  variables, batch = perturbed(task), batch_of(SIZES)

  def loss(batch):  # BatchNorm's statistics would differ in training.
    outputs = task._apply(variables, dense.normalized(task.cfg, batch["image"],
                                                  batch["size"]),
                          batch["size"])
    return task._cross_entropy(outputs["logits"], outputs["mask"], batch)

  loss = jax.jit(loss)
  found, _ = loss(batch)
  total = 0
  for i, (h, w) in enumerate(SIZES):
    total += loss(alone(batch, i))[0] * h * w
  np.testing.assert_allclose(found, total / batch["label"].size, rtol=1e-5)


@pytest.mark.slow
def test_auxiliary_loss_is_added():
  task = made(head="upernet", auxiliary_weight=0.4)
  rngs = {"dropout": jax.random.key(0), "drop_path": jax.random.key(1)}
  variables = perturbed(task)
  loss, metrics, state = jax.jit(
      lambda b: task.loss(variables, b, rngs, train=True))(batch_of(SIZES))
  half = dataclasses.replace(task.cfg.task, auxiliary_weight=0.2)
  other = type(task)(dataclasses.replace(task.cfg, task=half))
  less = jax.jit(lambda b: other.loss(variables, b, rngs, train=True)[0])(
      batch_of(SIZES))
  np.testing.assert_allclose(loss - less, 0.2 * metrics["auxiliary_loss"],
                             rtol=1e-3)
  assert metrics["loss"] == loss and metrics["auxiliary_loss"] > 0.1
  counts = [int(x) for path, x in traverse_util.flatten_dict(
      state["batch_stats"]["auxiliary"]).items() if path[-1] == "n_batches"]
  assert counts == [1]


def logits_of(task, variables):
  """A function from an image to its logits in its own size, float64."""

  @jax.jit
  def of_canvas(image):
    sizes = jnp.array([image.shape[:2]])
    x = dense.normalized(task.cfg, image[None], sizes)
    return task._apply(variables, x, sizes)["logits"][0]

  def of_image(image):
    return plain.resize(np.asarray(of_canvas(image)), *image.shape[:2])

  return of_image


def evaluation_batch(batch, label_sizes, canvas, more=()):
  labels = np.zeros((len(label_sizes), *canvas), np.uint8)
  found = {"image": batch["image"], "size": batch["size"], "label": labels,
           "label_size": np.array(label_sizes, np.int32)}
  for i, other in enumerate(more, 1):
    found |= {f"image{i}": other["image"], f"size{i}": other["size"]}
  return found


def check(found, total, size):
  h, w = size
  best = np.sort(total, -1)
  clear = best[..., -1] - best[..., -2] > 1e-4
  assert clear.mean() > 0.98 and len(np.unique(total.argmax(-1))) > 1
  np.testing.assert_array_equal(np.asarray(found)[:h, :w][clear],
                                total.argmax(-1)[clear])


@pytest.mark.slow
def test_prediction_of_whole_images():
  task = made()
  variables, batch = perturbed(task), batch_of(SIZES)
  label_sizes = [(40, 77), (90, 30)]
  found = jax.jit(task.predict)(variables, evaluation_batch(
      batch, label_sizes, (96, 128)))
  logits = logits_of(task, variables)
  for i, size in enumerate(label_sizes):
    image = alone(batch, i)["image"][0]
    check(found[i], plain.softmax(plain.resize(logits(image), *size)), size)


@pytest.mark.slow
def test_prediction_over_scales_and_mirrored_images():
  task = made(eval_scales=(1.0, 0.5), eval_flip=True)
  variables = perturbed(task)
  large = batch_of(SIZES)
  small = batch_of([(17, 32), (32, 11)], (32, 32), seed=1)
  label_sizes = [(40, 77), (90, 30)]
  found = jax.jit(task.predict)(variables, evaluation_batch(
      large, label_sizes, (96, 128), [small]))
  logits = logits_of(task, variables)

  def scores(image, size):
    return plain.softmax(plain.resize(logits(image), *size))

  for i, size in enumerate(label_sizes):
    total = 0
    for batch in (large, small):
      image = alone(batch, i)["image"][0]
      total += scores(image, size) + scores(image[:, ::-1], size)[:, ::-1]
    check(found[i], total / 4, size)


def test_prediction_by_windows():
  task = made(eval_mode="slide", eval_stride=(40, 24))
  variables = perturbed(task)
  batch = batch_of(((70, 100), (30, 64)), (96, 130))
  label_sizes = [(50, 80), (41, 99)]
  found = jax.jit(task.predict)(variables, evaluation_batch(
      batch, label_sizes, (96, 128)))
  for i, size in enumerate(label_sizes):
    logits = plain.slide(logits_of(task, variables),
                         alone(batch, i)["image"][0], (64, 64), (40, 24))
    check(found[i], plain.softmax(plain.resize(logits, *size)), size)


def test_description_of_a_prediction():
  task = made()
  label_map = np.zeros((32, 64), np.uint8)
  label_map[:5, :7], label_map[8:, 8:] = 2, 4
  example = {"label_size": np.array([16, 16], np.int32)}
  found = task.postprocess(label_map, example)
  np.testing.assert_array_equal(found["label_map"], label_map[:16, :16])
  assert task.describe(found, 2) == [
      {"class": 0, "name": "0", "area": (256 - 35 - 64) / 256},
      {"class": 4, "name": "4", "area": 64 / 256}]


@pytest.mark.slow
@pytest.mark.parametrize("model", (
    {"name": "randformer_s12", "depths": (1, 1), "dims": (8, 12),
     "token_mixers": ("identity", "random"), "res_scale_init": ()},
    {"name": "mixer_b16_224", "depth": 1, "dim": 16}))
def test_models_of_one_size_are_evaluated_by_windows(model):
  """Images that fill the windows give what the windows give."""
  def cfg(**section):
    return schema.Experiment(
        model=schema.Model(**model),
        data=schema.Data(source="scenes", mean=(0.5,) * 3, std=(0.2,) * 3),
        task=tasks.Segmentation(num_classes=N, crop_size=(64, 64), fpn_dim=8,
                                head_dim=8, eval_stride=(32, 32), **section))

  with pytest.raises(errors.ConfigError, match="eval_mode: whole, but"):
    task_lib.create(cfg(), files=False)
  _, task = task_lib.create(cfg(eval_mode="slide"), files=False)
  variables, sizes = perturbed(task), ((64, 96), (96, 64))
  batch = batch_of(sizes, (96, 96))
  found = jax.jit(task.predict)(variables, evaluation_batch(
      batch, sizes, (96, 96)))
  logits = logits_of(task, variables)
  for i, size in enumerate(sizes):
    scores = plain.slide(logits, alone(batch, i)["image"][0], (64, 64),
                         (32, 32))
    check(found[i], plain.softmax(scores), size)
  rngs = {"dropout": jax.random.key(0), "drop_path": jax.random.key(1)}
  loss, _, _ = task.loss(variables, batch_of(SIZES), rngs, train=True)
  assert np.isfinite(loss)
