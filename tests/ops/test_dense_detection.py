"""Loss and detections of RetinaNet, against mmdetection's, and properties."""

import functools

import detection_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import plain_detection as plain
import pytest

from metaformer_jax.ops import anchors as anchor_ops
from metaformer_jax.ops import dense_detection

ANCHORS = [anchor_ops.grid(shape, stride, anchor_ops.base(
    stride, 4.0, 3, (0.5, 1.0, 2.0)))
           for shape, stride in zip(cases.SHAPES, cases.STRIDES)]
BATCHES = cases.batches()


def is_anchor(sizes):
  """Cells that begin within the padded images; bool [B, n] by level."""
  found = []
  for (h, w), stride in zip(cases.SHAPES, cases.STRIDES):
    y, x = np.indices((h, w)) * stride
    found.append(np.stack([
        ((y < height) & (x < width)).reshape(-1).repeat(9)
        for height, width in map(cases.padded, sizes)]))
  return found


@functools.cache
def loss_function(loss_group=None, gamma=2.0):
  def loss(predictions, exists, boxes, labels):
    found = dense_detection.loss(
        *predictions, ANCHORS, exists, boxes, labels, positive_iou=0.5,
        negative_iou=0.4, alpha=0.25, gamma=gamma, loss_group=loss_group)
    return found["class_loss"] + found["box_loss"], found
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def losses(batch, exists=None, **kwargs):
  """Both losses; their gradients by logits and deltas, [B, N, ...]."""
  (_, found), gradients = loss_function(**kwargs)(
      (batch.logits, batch.deltas),
      is_anchor(batch.sizes) if exists is None else exists, batch.boxes,
      batch.labels)
  return (np.array([found["class_loss"], found["box_loss"]]),
          *(np.concatenate(x, 1) for x in gradients))


@pytest.mark.parametrize("name", BATCHES)
def test_loss_equals_mmdetections(name):
  """On two images of one GPU; the padding's predictions are not numbers."""
  golden, batch = cases.golden(), BATCHES[name]
  exists = is_anchor(batch.sizes)
  assert all(x.all() for x in exists) == (name == "equal scores")
  spoilt = batch._replace(**{
      key: [np.where(e[..., None], x, np.nan) for x, e in
            zip(getattr(batch, key), exists)] for key in ("logits", "deltas")})
  found = dict(zip(("losses", "logits", "deltas"), losses(spoilt)))
  for key, value in found.items():
    expected = golden[f"retinanet/{name}/{key}"]
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
  assert not found["logits"][~np.concatenate(exists, 1)].any()


def first(levels):
  return [x[0] for x in levels]


@functools.cache
def detector(candidates=cases.CANDIDATES, score_threshold=cases.SCORE_THRESHOLD,
             nms_iou=cases.NMS_IOU, max_detections=cases.MAX_DETECTIONS):
  return jax.jit(lambda logits, deltas, exists, size: dense_detection.detect(
      logits, deltas, ANCHORS, exists, size, candidates=candidates,
      score_threshold=score_threshold, nms_iou=nms_iou,
      max_detections=max_detections))


def detections(batch, exists=None, **kwargs):
  """Of the first image."""
  found = detector(**kwargs)(first(batch.logits), first(batch.deltas), exists,
                             batch.sizes[0])
  return {key: np.asarray(value) for key, value in found.items()}


@pytest.mark.parametrize("name", BATCHES)
def test_detections_equal_mmdetections(name):
  golden = cases.golden()
  found = detections(BATCHES[name])
  expected = golden[f"retinanet/{name}/detections"]
  assert found["valid"].sum() == len(expected)
  np.testing.assert_allclose(found["boxes"][found["valid"]], expected[:, :4],
                             rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(found["scores"][found["valid"]], expected[:, 4],
                             rtol=1e-5)
  np.testing.assert_array_equal(found["labels"][found["valid"]],
                                golden[f"retinanet/{name}/labels"])


def test_focal_loss_equals_torchvisions():
  golden, logits = cases.golden(), jnp.linspace(-30, 30, 121)
  for key in (key for key in golden if key.startswith("focal")):
    _, gamma, target = key.split("/")
    fn = functools.partial(
        dense_detection.sigmoid_focal, is_class=jnp.array(target == "1"),
        alpha=0.25, gamma=float(gamma))
    found = jax.vmap(jax.value_and_grad(fn))(logits)
    # float64 has no more digits of 1 - p far from 0.
    np.testing.assert_allclose(np.stack(found), golden[key], rtol=1e-5,
                               atol=1e-12)


@pytest.mark.parametrize("gamma", (0.0, 0.5, 2.0))
def test_gradients_are_finite_for_every_logit(gamma):
  logits = jnp.array([-1e30, -1e4, -200, -100, 0, 100, 200, 1e4, 1e30])
  for target in (False, True):
    fn = functools.partial(dense_detection.sigmoid_focal,
                           is_class=jnp.array(target), alpha=0.25, gamma=gamma)
    found = jax.vmap(jax.grad(fn))(logits if target else -logits)
    # 1 or 0 in the limits, by the weight.
    limit = -0.25 if target else 0.75
    np.testing.assert_allclose(found[:4], limit, rtol=1e-6)
    np.testing.assert_allclose(found[-4:], 0, atol=1e-20)


def test_gradients_are_those_of_the_loss():
  batch = BATCHES["objects"]
  rng = np.random.default_rng(0)
  _, *gradients = losses(batch)
  for key, gradient in zip(("logits", "deltas"), gradients):
    step = [rng.normal(size=x.shape).astype(np.float32) * 1e-2
            for x in getattr(batch, key)]
    up, down = (losses(batch._replace(**{key: [
        x + sign * s for x, s in zip(getattr(batch, key), step)]}))[0].sum()
                for sign in (1, -1))
    slope = (np.concatenate(step, 1) * gradient).sum()
    np.testing.assert_allclose((up - down) / 2, slope, rtol=0.02, atol=2e-4)


def assert_equal(found, expected):
  for one, other in zip(found, expected):
    np.testing.assert_array_equal(one, other)


def test_padded_objects_change_nothing():
  """Whatever their coordinates are, and wherever they are."""
  batch = BATCHES["objects"]
  boxes = np.zeros((2, 13, 4), np.float32)
  labels = np.full((2, 13), -1, np.int32)
  boxes[:, ::2] = 7
  boxes[1, 5], boxes[0, 3] = (0, 0, 30, 30), (-1e9, -1e9, 1e9, 1e9)
  boxes[:, 7:], labels[:, 7:] = batch.boxes, batch.labels
  assert_equal(losses(batch._replace(boxes=boxes, labels=labels)),
               losses(batch))


def test_objects_without_area_change_nothing():
  batch = BATCHES["objects"]
  boxes, labels = batch.boxes.copy(), batch.labels.copy()
  boxes[1, 3:], labels[1, 3:] = [(5, 5, 5, 9), (9, 9, 9, 9), (8, 8, 2, 9)], 1
  assert_equal(losses(batch._replace(boxes=boxes, labels=labels)),
               losses(batch))


def test_order_of_objects_changes_nothing_without_ties():
  batch = BATCHES["objects"]
  # Far apart, and of the size of anchors: each has a best one of its own.
  boxes = np.array([(-14.3, -11.1, 15.2, 19.7), (40.1, 2.3, 77.3, 33.2),
                    (12.2, 14.3, 49.1, 55.4)])
  boxes = np.stack([boxes, boxes + 1.7]).astype(np.float32)
  labels = np.array([[0, 1, 2], [2, 2, 0]], np.int32)
  ordered = losses(batch._replace(boxes=boxes, labels=labels))
  assert ordered[0].min() > 0
  for order in ([2, 1, 0], [1, 2, 0]):
    other = losses(batch._replace(boxes=boxes[:, order],
                                  labels=labels[:, order]))
    assert_equal(other, ordered)


def test_images_without_objects_or_anchors():
  batch = BATCHES["both are empty"]
  found, logits, deltas = losses(batch)
  # Each image counts one positive anchor; all anchors are negative.
  focal = dense_detection.sigmoid_focal(
      np.concatenate(batch.logits, 1), np.array(False), alpha=0.25, gamma=2.0)
  exists = np.concatenate(is_anchor(batch.sizes), 1)
  np.testing.assert_allclose(found, [np.asarray(focal)[exists].sum() / 2, 0],
                             rtol=1e-5)
  assert np.isfinite(logits).all() and not deltas.any()

  nothing = losses(BATCHES["objects"], [
      np.zeros(x.shape[:2], bool) for x in batch.logits])
  assert not any(x.any() for x in nothing)


def test_loss_is_the_mean_over_groups():
  names = ("objects", "one image is empty", "equal scores")
  parts = [BATCHES[name] for name in names]
  merged = cases.Batch(*(
      [np.concatenate(level) for level in zip(*field)]
      if isinstance(field[0], list) else np.concatenate(field)
      for field in zip(*parts)))
  alone = [losses(part) for part in parts]
  found, *gradients = losses(merged, loss_group=2)
  np.testing.assert_allclose(found, np.mean([x[0] for x in alone], 0),
                             rtol=1e-6)
  for i, gradient in enumerate(gradients):
    np.testing.assert_allclose(
        gradient, np.concatenate([x[1 + i] for x in alone]) / 3, rtol=1e-6,
        atol=1e-9)
  assert (abs(losses(merged)[0] - found) > 0.05).all()  # As one group.


def test_no_mask_is_a_mask_of_all():
  batch = BATCHES["equal scores"]
  everything = [np.ones(x.shape[:2], bool) for x in batch.logits]
  loss = loss_function()((batch.logits, batch.deltas), None, batch.boxes,
                         batch.labels)[0][0]
  np.testing.assert_allclose(loss, losses(batch, everything)[0].sum(),
                             rtol=1e-6)
  found, expected = detections(batch), detections(batch, first(everything))
  for key, value in found.items():
    np.testing.assert_array_equal(value, expected[key])


def test_detections_of_the_image_only():
  """Anchors of the padding detect nothing, and take no candidate's place."""
  batch = BATCHES["one image is empty"]
  exists = [rows[1] for rows in is_anchor(batch.sizes)]
  spoilt = batch._replace(logits=[
      np.where(e[None, :, None], x, 100).astype(np.float32)
      for x, e in zip(batch.logits, exists)])
  found, expected = (detections(x, exists) for x in (spoilt, batch))
  assert expected["valid"].all() and expected["scores"].max() < 1
  for key, value in found.items():
    np.testing.assert_array_equal(value, expected[key])

  none = detections(batch, [np.zeros(len(x), bool) for x in exists])
  assert not none["valid"].any() and not none["scores"].any()
  assert (none["labels"] == -1).all() and not none["boxes"].any()
  assert not detections(batch, score_threshold=1.0)["valid"].any()


def test_more_is_asked_for_than_there_is():
  batch = BATCHES["objects"]
  n_pairs = sum(map(len, ANCHORS)) * cases.N_CLASSES
  every, more = (detections(batch, candidates=10**6, score_threshold=0.0,
                            nms_iou=0.0, max_detections=n)
                 for n in (n_pairs, n_pairs + 5))
  n = every["valid"].sum()
  assert cases.MAX_DETECTIONS < n < n_pairs
  assert more["valid"].sum() == n
  np.testing.assert_array_equal(more["boxes"][:n_pairs], every["boxes"])
  again = plain.nms(*(every[key][:n] for key in ("boxes", "scores", "labels")),
                    0.0)
  assert again == list(range(n))


@pytest.mark.parametrize("n_max", (1, 7, 60, 500))
def test_best_pairs(n_max):
  """Those of a stable sort of all pairs, many of which tie."""
  rng = np.random.default_rng(0)
  logits = rng.integers(-4, 5, (50, 40, 5)).astype(np.float32)
  exists = rng.uniform(0, 1, (50, 40)) < 0.9
  found = jax.jit(jax.vmap(functools.partial(
      dense_detection.best_pairs, n_max=n_max)))(logits, exists)
  scores = np.where(exists[..., None], jax.nn.sigmoid(logits), -1)
  for i, one in enumerate(scores):
    for part, expected in zip(found, plain.best_pairs(one, n_max)):
      np.testing.assert_array_equal(part[i], expected)
