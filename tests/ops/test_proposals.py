"""Loss and proposals of R-CNN's first stage, against mmdetection's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_regions as plain
import pytest
import region_cases as cases

from metaformer_jax.ops import anchors as anchor_ops
from metaformer_jax.ops import matching, proposals

ANCHORS = [anchor_ops.grid(shape, stride, anchor_ops.base(
    stride, 8.0, 1, (0.5, 1.0, 2.0)))
           for shape, stride in zip(cases.SHAPES, cases.STRIDES)]
N_ANCHORS = sum(map(len, ANCHORS))
BATCHES = cases.batches()


def is_anchor(sizes):
  """Cells that begin within the padded images; bool [B, n] by level."""
  sizes = -(-np.asarray(sizes) // 32) * 32
  found = []
  for shape, stride in zip(cases.SHAPES, cases.STRIDES):
    y, x = np.indices(shape) * stride
    found.append(np.stack([((y < h) & (x < w)).reshape(-1).repeat(3)
                           for h, w in sizes]))
  return found


@functools.cache
def loss_function(n_samples=1000, loss_group=None, fraction=0.5):
  def loss(predictions, exists, boxes, labels, key):
    found = proposals.proposal_loss(
        key, *predictions, ANCHORS, exists, boxes, labels, positive_iou=0.7,
        negative_iou=0.3, n_samples=n_samples, positive_fraction=fraction,
        loss_group=loss_group)
    return found["objectness_loss"] + found["proposal_loss"], found
  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def losses(batch, exists=None, seed=0, **kwargs):
  """Both losses; their gradients by logits and deltas, [B, N, ...]."""
  (_, found), gradients = loss_function(**kwargs)(
      (batch.logits, batch.deltas),
      is_anchor(batch.sizes) if exists is None else exists, batch.boxes,
      batch.labels, jax.random.key(seed))
  return (np.array([found["objectness_loss"], found["proposal_loss"]]),
          *(np.concatenate(x, 1) for x in gradients))


@pytest.mark.parametrize("name", BATCHES)
def test_loss_equals_mmdetections(name):
  """With all anchors sampled; the padding's predictions are not numbers."""
  batch = BATCHES[name]
  exists = is_anchor(batch.sizes)
  spoilt = batch._replace(
      logits=[np.where(e, x, np.nan) for x, e in zip(batch.logits, exists)],
      deltas=[np.where(e[..., None], x, np.inf)
              for x, e in zip(batch.deltas, exists)])
  found = dict(zip(("losses", "logits", "deltas"), losses(spoilt)))
  for key, value in found.items():
    np.testing.assert_allclose(
        value, cases.golden()[f"proposals/{name}/{key}"], rtol=1e-4, atol=1e-6)


def test_a_sample_of_the_anchors_counts():
  """The mean is that of all anchors: the loss is an unbiased estimate."""
  batch = BATCHES["objects"]
  n_positive = np.array([(matching.max_iou(
      box, label >= 0, np.concatenate(ANCHORS), exists, positive=0.7,
      negative=0.3, min_positive=0.3) >= 0).sum() for box, label, exists in zip(
          batch.boxes, batch.labels,
          np.concatenate(is_anchor(batch.sizes), 1))])
  assert n_positive.min() > 2
  n_samples, counts = 16, []
  for seed in range(3):
    found, logits, deltas = losses(batch, seed=seed, n_samples=n_samples,
                                   fraction=0.125)
    assert ((logits != 0).sum(1) == n_samples).all()
    assert ((deltas != 0).any(-1).sum(1) == 2).all()  # 0.125 of 16.
    # Each row's gradient is (p - y) / 32.
    p = 1 / (1 + np.exp(-np.concatenate(batch.logits, 1)))
    y = p - logits * 2 * n_samples
    np.testing.assert_allclose(y[logits < 0], 1, atol=1e-4)
    np.testing.assert_allclose(y[logits > 0], 0, atol=1e-4)
    assert ((logits < 0).sum(1) == 2).all()
    assert np.isfinite(found).all()
    counts.append(logits != 0)
  assert (counts[0] != counts[1]).any()


def test_no_anchors_and_no_objects_are_finite():
  batch = BATCHES["objects"]
  none = [np.zeros(x.shape[:2], bool) for x in batch.logits]
  found = losses(batch, none)
  assert not any(x.any() for x in found)  # All ignored.
  found, logits, deltas = losses(BATCHES["both are empty"])
  assert found[0] > 0 and found[1] == 0 and not deltas.any()
  assert np.isfinite(logits).all()


def assert_equal(found, expected):
  for one, other in zip(found, expected):
    np.testing.assert_array_equal(one, other)


def test_padding_and_order_of_objects():
  batch = BATCHES["objects"]
  expected = losses(batch)
  boxes = np.full((2, 9, 4), 7, np.float32)
  labels = np.full((2, 9), -1, np.int32)
  boxes[0, 1] = -1e9, -1e9, 1e9, 1e9
  boxes[1, 0], labels[1, 0] = (9, 9, 9, 20), 1  # Without area.
  boxes[:, 3:], labels[:, 3:] = batch.boxes, batch.labels
  assert_equal(losses(batch._replace(boxes=boxes, labels=labels)), expected)

  boxes = np.array([(-14.3, -11.1, 15.2, 19.7), (40.1, 2.3, 77.3, 33.2),
                    (12.2, 14.3, 49.1, 55.4)], np.float32)
  boxes, labels = np.stack([boxes, boxes + 1.7]), np.zeros((2, 3), np.int32)
  one, other = (losses(batch._replace(boxes=boxes[:, order], labels=labels))
                for order in ([0, 1, 2], [2, 0, 1]))
  assert one[0].min() > 0
  assert_equal(one, other)


def test_loss_is_the_mean_over_groups():
  parts = [BATCHES[name] for name in ("objects", "one image is empty")]
  merged = cases.Batch(*(
      [np.concatenate(level) for level in zip(*field)]
      if isinstance(field[0], list) else np.concatenate(field)
      for field in zip(*parts)))
  found, *gradients = losses(merged, loss_group=2)
  alone = [losses(part) for part in parts]
  np.testing.assert_allclose(found, np.mean([x[0] for x in alone], 0),
                             rtol=1e-6)
  for i, gradient in enumerate(gradients):
    np.testing.assert_allclose(
        gradient, np.concatenate([x[1 + i] for x in alone]) / 2, rtol=1e-5,
        atol=1e-9)


@functools.cache
def proposer(**kwargs):
  kwargs = {"candidates": cases.CANDIDATES, "nms_iou": cases.PROPOSAL_IOU,
            "n_max": cases.N_PROPOSALS} | kwargs
  return jax.jit(lambda logits, deltas, exists, size: proposals.propose(
      logits, deltas, ANCHORS, exists, size, **kwargs))


def proposed(batch, exists=None, image=0, **kwargs):
  found = proposer(**kwargs)(*([x[image] for x in levels] for levels in (
      batch.logits, batch.deltas)), exists, batch.sizes[image])
  found = {key: np.asarray(value) for key, value in found.items()}
  n = found["valid"].sum()
  assert found["valid"][:n].all()
  assert not found["boxes"][n:].any() and not found["scores"][n:].any()
  return found["boxes"][:n], found["scores"][:n]


@pytest.mark.parametrize("name", BATCHES)
def test_proposals_equal_mmdetections(name):
  batch = BATCHES[name]
  expected = cases.golden()[f"proposals/{name}/proposals"]
  boxes, scores = proposed(batch)
  np.testing.assert_allclose(boxes, expected[:, :4], rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(scores, expected[:, 4], rtol=1e-5)
  again = plain.propose([x[0] for x in batch.logits],
                        [x[0] for x in batch.deltas], ANCHORS, batch.sizes[0],
                        cases.CANDIDATES, cases.PROPOSAL_IOU, cases.N_PROPOSALS)
  np.testing.assert_allclose(boxes, again[0], rtol=1e-5, atol=1e-4)


def test_proposals_of_the_image_only():
  """Anchors of the padding propose nothing, and take no one's place."""
  batch = BATCHES["one image is empty"]
  exists = [rows[1] for rows in is_anchor(batch.sizes)]
  spoilt = batch._replace(logits=[np.where(e[None], x, 100).astype(np.float32)
                                  for x, e in zip(batch.logits, exists)])
  found, expected = (proposed(x, exists, 1) for x in (spoilt, batch))
  assert len(expected[0]) > 10
  assert_equal(found, expected)
  none = proposed(batch, [np.zeros(len(x), bool) for x in exists], 1)
  assert not len(none[0])


def test_fewer_and_more_than_there_are():
  batch = BATCHES["objects"]
  every = proposed(batch, candidates=10**6, n_max=N_ANCHORS + 50)
  few = proposed(batch, candidates=10**6, n_max=7)
  assert 7 < len(every[0]) < N_ANCHORS
  assert_equal(few, [x[:7] for x in every])


def test_broken_predictions_propose_nothing_and_nothing_is_differentiated():
  batch = BATCHES["objects"]
  broken = batch._replace(deltas=[np.full_like(x, np.nan)
                                  for x in batch.deltas])
  assert not len(proposed(broken)[0])

  def total(logits, deltas):
    found = proposer()(logits, deltas, None, batch.sizes[0])
    return found["boxes"].sum() + found["scores"].sum()

  gradients = jax.grad(total, (0, 1))(
      [jnp.asarray(x[0]) for x in batch.logits],
      [jnp.asarray(x[0]) for x in batch.deltas])
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(gradients))
