"""Assignment of objects to anchors against plain NumPy and mmdetection."""

import functools

import detection_cases as cases
import jax
import numpy as np
import plain_detection as plain
import pytest
import region_cases

from metaformer_jax.ops import matching


@functools.cache
def function(positive, negative, **kwargs):
  return jax.jit(jax.vmap(functools.partial(
      matching.max_iou, positive=positive, negative=negative, **kwargs)))


@pytest.mark.parametrize("thresholds", range(len(cases.POSITIVE_NEGATIVE)))
def test_every_case(thresholds):
  everything = cases.assignment()
  chosen = np.flatnonzero(everything.thresholds == thresholds)
  case = cases.Assignment(*(x[chosen] for x in everything))
  limits = cases.POSITIVE_NEGATIVE[thresholds]
  found = np.asarray(function(*limits)(*case[:4]))
  np.testing.assert_array_equal(found, cases.golden()["assignment"][chosen])
  for row, boxes, is_box, anchors, is_anchor in zip(found, *case[:4]):
    expected = np.full(cases.N_ANCHORS, matching.IGNORED)
    # Indices of the boxes are those among all, padding included.
    which = np.append(np.flatnonzero(is_box), [-2, -1])
    expected[is_anchor] = which[plain.assign(
        boxes[is_box], anchors[is_anchor], *limits)]
    np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("name", region_cases.MATCHING)
def test_settings_of_both_stages(name):
  """min_pos_iou and match_low_quality, against mmdetection and NumPy."""
  settings = region_cases.MATCHING[name]
  case = [x[:region_cases.N_MATCHING] for x in cases.assignment()[:4]]
  found = np.asarray(function(**settings)(*case))
  expected = region_cases.golden()[f"matching/{name}"]
  np.testing.assert_array_equal(found, expected)
  for row, boxes, is_box, anchors, is_anchor in zip(found, *case):
    which = np.append(np.flatnonzero(is_box), [-2, -1])
    np.testing.assert_array_equal(row[is_anchor], which[plain.assign(
        boxes[is_box], anchors[is_anchor], **settings)])
  # It makes a difference.
  plainly = function(settings["positive"], settings["negative"])(*case)
  assert (found != np.asarray(plainly)).any()


def one(boxes, anchors, is_box=None, is_anchor=None):
  boxes, anchors = (np.array(x, np.float32) for x in (boxes, anchors))
  if is_box is None:
    is_box = np.ones(len(boxes), bool)
  if is_anchor is None:
    is_anchor = np.ones(len(anchors), bool)
  found = function(0.5, 0.4)(*(np.array(x)[None] for x in (
      boxes, is_box, anchors, is_anchor)))
  return found[0].tolist()


def test_each_rule():
  row = [[x, 0, x + 10, 10] for x in (0, 4, 5, 20, 100)]
  # IoU with [0, 0, 10, 10]: 1, 6/14 = 0.43, 1/3, 0, 0.
  assert one([[0, 0, 10, 10]], row) == [0, -2, -1, -1, -1]
  # The best anchor is negative by its IoU, but the box has no better one.
  assert one([[0, 0, 10, 2]], row[:2]) == [0, -1]
  # All of the best ones.
  assert one([[2, 0, 12, 10]], row[:2] + row[3:]) == [0, 0, -1, -1]
  # Of two equal boxes the first by IoU, but the last by step 3.
  assert one([[0, 0, 10, 10]] * 2, [*row[:1], [0, 0, 10, 9]]) == [1, 0]
  # A later box takes the only anchor.
  assert one([[0, 0, 10, 10], [0, 0, 10, 1]], row[:1]) == [1]


def test_only_objects_without_any_overlap_get_all_anchors():
  """As in mmdetection, but neither padding nor anchors of the padding do."""
  anchors = [[0, 0, 10, 10], [50, 50, 60, 60]]
  away = [[200, 200, 210, 210]]
  assert one(away, anchors) == [0, 0]
  assert one(away, anchors, is_anchor=[True, False]) == [0, -2]
  assert one(away, anchors, is_box=[False]) == [-1, -1]
  assert one([[0, 0, 0, 0]], anchors, is_box=[False]) == [-1, -1]
  assert one(anchors[:1], anchors, is_anchor=[False, False]) == [-2, -2]
