"""Sampling, losses and detections of R-CNN's second stage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_detection as plain
import plain_regions
import pytest
import region_cases as cases

from metaformer_jax.ops import region_detection

REGIONS = cases.regions()
KINDS = {"mask_rcnn": True, "faster_rcnn": False}


@functools.cache
def sampler(n=cases.N_DRAWN, low_quality=True, fraction=0.25):
  return jax.jit(jax.vmap(functools.partial(
      region_detection.sample_rois, iou=0.5, n=n, positive_fraction=fraction,
      low_quality=low_quality)))


def sampled(regions, valid=None, seed=0, **kwargs):
  if valid is None:
    valid = np.ones(regions.proposals.shape[:2], bool)
  keys = jax.random.split(jax.random.key(seed), len(valid))
  found = sampler(**kwargs)(keys, regions.proposals, valid, regions.boxes,
                            regions.labels)
  return {key: np.asarray(value) for key, value in found.items()}


@functools.cache
def loss_function(loss_group=None):
  def loss(predictions, rois, boxes, labels):
    found = region_detection.box_loss(*predictions, rois, boxes, labels,
                                      loss_group)
    return found["class_loss"] + found["box_loss"], found
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def box_losses(rois, regions, spoil=None, **kwargs):
  """Both losses; their gradients by logits and deltas."""
  predictions = cases.predictions(rois["boxes"])
  if spoil is not None:
    for x in predictions:
      x[spoil] = np.nan
  (_, found), gradients = loss_function(**kwargs)(
      predictions, rois, regions.boxes, regions.labels)
  return (np.array([found["class_loss"], found["box_loss"]]),
          *map(np.asarray, gradients))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REGIONS)
def test_samples_and_losses_equal_mmdetections(name, kind):
  """With all regions drawn, so that their order alone is chance."""
  golden = {key.rsplit(f"{name}/")[1]: value
            for key, value in cases.golden().items()
            if key.startswith(f"regions/{kind}/{name}/")}
  regions = REGIONS[name]
  rois = sampled(regions, low_quality=KINDS[kind])
  found = box_losses(rois, regions, spoil=~rois["is_valid"])
  np.testing.assert_allclose(found[0], golden["losses"], rtol=1e-4, atol=1e-6)
  for i in range(2):
    valid = rois["is_valid"][i]
    n_positive = golden[f"n_positive/{i}"]
    assert rois["is_positive"][i].sum() == n_positive
    theirs = golden["rois"][:, 0] == i
    for rows in (slice(n_positive), slice(n_positive, valid.sum())):
      own = rois["boxes"][i, valid][rows]
      order = np.lexsort(own.T)
      other = golden["rois"][theirs][rows, 1:]
      their_order = np.lexsort(other.T)
      np.testing.assert_array_equal(own[order], other[their_order])
      for key, gradient in zip(("logits", "deltas"), found[1:]):
        np.testing.assert_allclose(
            gradient[i, valid][rows][order],
            golden[key][theirs][rows][their_order], rtol=1e-4, atol=1e-7)
  assert not any(x[~rois["is_valid"]].any() for x in found[1:])


def test_loss_equals_plain_numpy():
  regions = REGIONS["objects"]
  rois = sampled(regions, n=16)
  logits, deltas = cases.predictions(rois["boxes"])
  total = np.sum([plain_regions.box_loss(
      logits[i], deltas[i], rois["boxes"][i], rois["is_valid"][i],
      rois["is_positive"][i], rois["index"][i], regions.boxes[i],
      regions.labels[i]) for i in range(2)], 0)
  assert total[2] == 32
  np.testing.assert_allclose(box_losses(rois, regions)[0], total[:2] / 32,
                             rtol=1e-5)


def test_loss_is_the_mean_over_groups():
  regions = REGIONS["objects"]
  valid = np.ones((2, cases.N_REGIONS), bool)
  valid[1, 5:] = False
  rois = sampled(regions, valid)
  first, *_ = box_losses({key: x[[0, 0]] for key, x in rois.items()},
                         cases.Regions(*(x[[0, 0]] for x in regions[:3]), None))
  second, *_ = box_losses({key: x[[1, 1]] for key, x in rois.items()},
                          cases.Regions(*(x[[1, 1]] for x in regions[:3]),
                                        None))
  found, *gradients = box_losses(rois, regions, loss_group=1)
  np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-6)
  together, *others = box_losses(rois, regions)
  assert (abs(found - together) > 1e-3).all()
  numbers = rois["is_valid"].sum(1)
  for gradient, other in zip(gradients, others):
    for i in range(2):
      np.testing.assert_allclose(
          gradient[i], other[i] * numbers.sum() / numbers[i] / 2, rtol=1e-5,
          atol=1e-9)


def test_counts_and_positives_first():
  regions = REGIONS["objects"]
  rois = sampled(regions, n=16)
  assert rois["is_valid"].all()
  # Of 16, a quarter, if there are so many.
  np.testing.assert_array_equal(
      rois["is_positive"], np.tile(np.arange(16) < 4, (2, 1)))
  chosen = regions.boxes[np.arange(2)[:, None], rois["index"]]
  for i in range(2):
    overlap = plain.iou(rois["boxes"][i], chosen[i]).diagonal()
    assert (overlap[:4] >= 0.5).all()
    every = plain.iou(rois["boxes"][i],
                            regions.boxes[i][regions.labels[i] >= 0])
    assert (every[4:].max(1) < 0.5).all()


def test_no_proposals_leave_the_objects():
  regions = REGIONS["objects"]
  nothing = np.zeros((2, cases.N_REGIONS), bool)
  spoilt = regions._replace(proposals=np.full_like(regions.proposals, np.nan))
  rois = sampled(spoilt, nothing, n=16)
  np.testing.assert_array_equal(rois["is_valid"].sum(1), (4, 3))
  np.testing.assert_array_equal(rois["is_positive"], rois["is_valid"])
  for i in range(2):
    index = rois["index"][i, rois["is_valid"][i]]
    np.testing.assert_array_equal(
        rois["boxes"][i, rois["is_valid"][i]], regions.boxes[i, index])
  found = box_losses(rois, regions)
  assert found[0].min() > 0 and all(np.isfinite(x).all() for x in found)


def test_nothing_at_all_is_finite():
  regions = REGIONS["no objects"]
  rois = sampled(regions, np.zeros((2, cases.N_REGIONS), bool))
  assert not rois["is_valid"].any() and not rois["boxes"].any()
  found = box_losses(rois, regions, spoil=~rois["is_valid"])
  assert not any(x.any() for x in found)


def test_more_objects_than_positives_are_allowed():
  """Overflow: some of the objects, each with its own box."""
  rng = np.random.default_rng(0)
  boxes = rng.uniform(0, 50, (1, 60, 4)).astype(np.float32)
  boxes[..., 2:] += boxes[..., :2] + 1
  regions = cases.Regions(boxes[:, :40], boxes, np.zeros((1, 60), np.int32),
                          (100, 100))
  rois = sampled(regions, n=32)
  assert rois["is_positive"].sum() == 8
  index = rois["index"][0, :8]
  overlap = plain.iou(rois["boxes"][0, :8], boxes[0, index]).diagonal()
  assert (overlap >= 0.5).all()


def test_objects_without_area_and_padding_change_nothing():
  regions = REGIONS["objects"]
  boxes = np.full((2, 8, 4), 3, np.float32)
  labels = np.full((2, 8), -1, np.int32)
  boxes[0, 1] = -1e9, -1e9, 1e9, 1e9
  labels[:, 0] = 1
  boxes[:, 2:], labels[:, 2:] = regions.boxes, regions.labels
  padded = regions._replace(boxes=boxes, labels=labels)
  found, expected = (box_losses(sampled(x), x) for x in (padded, regions))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)


@functools.cache
def detector(score_threshold=cases.SCORE_THRESHOLD,
             max_detections=cases.MAX_DETECTIONS):
  return jax.jit(functools.partial(
      region_detection.detect, score_threshold=score_threshold,
      nms_iou=cases.NMS_IOU, max_detections=max_detections))


@pytest.mark.parametrize("name", REGIONS)
def test_detections_equal_mmdetections(name):
  rois = REGIONS[name].proposals[0]
  predictions = cases.predictions(rois)
  size = jnp.array(REGIONS[name].size)
  plainly = detector()(*predictions, rois, np.ones(len(rois), bool), size)
  # Regions that do not count may be anything.
  spoilt = [np.concatenate([x, np.full_like(x[:5], np.nan)])
            for x in (*predictions, rois)]
  again = detector()(*spoilt, np.arange(len(rois) + 5) < len(rois), size)
  expected = cases.golden()[f"regions/mask_rcnn/{name}/detections"]
  labels = cases.golden()[f"regions/mask_rcnn/{name}/labels"]
  assert len(expected) > 3
  for found in (plainly, again):
    valid = np.asarray(found["valid"])
    assert valid.sum() == len(expected)
    np.testing.assert_allclose(found["boxes"][valid], expected[:, :4],
                               rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found["scores"][valid], expected[:, 4],
                               rtol=1e-5)
    np.testing.assert_array_equal(found["labels"][valid], labels)
    assert (np.asarray(found["labels"])[~valid] == -1).all()


def test_every_pair_may_be_a_detection():
  """No pair is left out before the suppression."""
  rois = REGIONS["objects"].proposals[0]
  n = len(rois) * cases.N_CLASSES
  found = detector(0.0, n)(*cases.predictions(rois), rois,
                           np.ones(len(rois), bool), jnp.array([60, 90]))
  valid = np.asarray(found["valid"])
  assert cases.MAX_DETECTIONS < valid.sum() < n
  kept = plain.nms(*(np.asarray(found[key])[valid] for key in (
      "boxes", "scores", "labels")), cases.NMS_IOU)
  assert kept == list(range(valid.sum()))
  nothing = detector(1.0, 3)(*cases.predictions(rois), rois,
                             np.ones(len(rois), bool), jnp.array([60, 90]))
  assert not np.asarray(nothing["valid"]).any()


@functools.cache
def mask_loss(loss_group=None):
  return jax.jit(jax.value_and_grad(functools.partial(
      region_detection.mask_loss, loss_group=loss_group)))


def test_mask_loss_equals_mmdetections():
  logits, targets, labels, positive = cases.masks()
  logits[~positive], targets[~positive] = np.nan, np.inf
  loss, gradient = mask_loss()(logits, targets, labels, positive)
  np.testing.assert_allclose(loss, cases.golden()["masks/loss"][0], rtol=1e-5)
  np.testing.assert_allclose(gradient[positive], cases.golden()["masks/logits"],
                             rtol=1e-4, atol=1e-7)
  assert not np.asarray(gradient)[~positive].any()


def test_mask_loss_of_groups_and_of_nothing():
  case = cases.masks()
  alone = [mask_loss()(*(x[[i, i]] for x in case))[0] for i in range(2)]
  found = mask_loss(1)(*case)[0]
  np.testing.assert_allclose(found, np.mean(alone), rtol=1e-6)
  loss, gradient = mask_loss()(*case[:3], case[3] & False)
  assert loss == 0 and not np.asarray(gradient).any()
