"""Non-maximum suppression against plain NumPy and torchvision."""

import functools

import detection_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import plain_detection as plain
import pytest

from metaformer_jax.ops import nms


@functools.cache
def function(threshold, n_max):
  return jax.jit(jax.vmap(functools.partial(
      nms.nms, threshold=threshold, n_max=n_max)))


@pytest.mark.parametrize("iou", range(len(cases.NMS_IOUS)))
def test_every_case(iou):
  everything = cases.nms()
  chosen = np.flatnonzero(everything.iou == iou)
  case = cases.Nms(*(x[chosen] for x in everything))
  found, valid = map(np.asarray, function(cases.NMS_IOUS[iou], cases.N_BOXES)(
      *case[:4]))
  np.testing.assert_array_equal(np.where(valid, found, 255),
                                cases.golden()["nms"][chosen])
  assert not found[~valid].any()
  for row, exists, boxes, scores, labels, is_valid in zip(
      found, valid, *case[:4]):
    where = np.flatnonzero(is_valid)
    expected = where[plain.nms(boxes[where], scores[where], labels[where],
                               cases.NMS_IOUS[iou])]
    np.testing.assert_array_equal(row[exists], expected)


@pytest.mark.parametrize("iou", range(len(cases.NMS_IOUS)))
def test_all_at_once_keeps_the_same(iou):
  """`kept`, class by class, against torchvision: all thousand cases."""
  everything = cases.nms()
  chosen = np.flatnonzero(everything.iou == iou)
  case = cases.Nms(*(x[chosen] for x in everything))
  # Scores of valid boxes that tie stay in their order.
  order = np.argsort(-case.scores, axis=1, kind="stable")
  boxes, labels, is_valid = (np.take_along_axis(x, i, 1) for x, i in (
      (case.boxes, order[..., None]), (case.labels, order),
      (case.is_valid, order)))
  kept = jax.jit(jax.vmap(functools.partial(
      nms.kept, threshold=cases.NMS_IOUS[iou])))
  found = np.any([kept(boxes, is_valid & (labels == label))
                  for label in range(labels.max() + 1)], 0)
  for row, indices, expected in zip(found, order,
                                    cases.golden()["nms"][chosen]):
    np.testing.assert_array_equal(indices[row], expected[expected < 255])


def test_a_chain_takes_as_many_turns_as_it_is_long():
  """Each box covers the next one only, so that every other one is kept."""
  n = 65
  start = jnp.arange(n) * 3.0
  boxes = jnp.stack([start, jnp.zeros(n), start + 10, jnp.ones(n)], -1)
  found = jax.jit(functools.partial(nms.kept, threshold=0.5))(
      boxes, jnp.ones(n, bool).at[40].set(False))
  expected = np.arange(n) % 2 == np.where(np.arange(n) > 40, 1, 0)
  np.testing.assert_array_equal(found, expected & (np.arange(n) != 40))


def test_fewer_and_more_than_there_are():
  case = cases.nms()
  arguments = [x[:100] for x in case[:4]]
  everything, valid = function(0.5, cases.N_BOXES)(*arguments)
  few, few_valid = function(0.5, 7)(*arguments)
  np.testing.assert_array_equal(few, everything[:, :7])
  np.testing.assert_array_equal(few_valid, valid[:, :7])
  more, more_valid = function(0.5, 70)(*arguments)
  np.testing.assert_array_equal(more[:, :64], everything)
  np.testing.assert_array_equal(more_valid[:, :64], valid)
  assert not np.asarray(more_valid[:, 64:]).any()


def test_invalid_boxes_may_be_anything():
  boxes = jnp.array([[0, 0, 10, 10], [jnp.nan] * 4, [0, 0, 10, 9], [30, 0, 40,
                                                                    10]])
  found, valid = nms.nms(boxes, jnp.array([0.1, jnp.nan, 0.2, 0.3]),
                         jnp.zeros(4, int), jnp.arange(4) != 1, 0.5, 4)
  assert found[valid].tolist() == [3, 2]


@pytest.mark.parametrize("threshold", (0.3, 0.6))
def test_an_iou_of_the_threshold_does_not_cover(threshold):
  """The threshold is 3 / 10 or 6 / 10 as float64, on either side of float32.

  torchvision compares with that, so that the IoU 6 / 10, rounded, is above.
  """
  boxes = jnp.array([[0, 0, 10, 10], [0, 0, 10, 10 * threshold]])
  _, valid = nms.nms(boxes, jnp.array([0.9, 0.8]), jnp.zeros(2, int),
                     jnp.ones(2, bool), threshold, 2)
  above = float(np.float32(threshold)) > threshold
  assert valid.tolist() == [True, not above]
