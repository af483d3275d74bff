"""Boxes, their coder and anchors, against plain NumPy and mmdetection."""

import detection_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import plain_detection as plain
import pytest

from metaformer_jax.ops import anchors, boxes


@pytest.mark.parametrize("level", (0, 3))
def test_an_iou_is_the_same_in_every_program(level):
  """With and without the optimisations of XLA, in whatever it is part of."""
  rng = np.random.default_rng(0)
  a, b = (np.stack([cases.around(rng, n, kind) for kind in cases.KINDS])
          .astype(np.float32) for n in (20, 3000))
  expected = np.stack([plain.iou(*pair) for pair in zip(a, b)])
  assert expected.min() == 0 and np.median(expected.max(2)) > 0.2

  def compiled(fn):
    return jax.jit(fn).lower(a, b).compile(
        {"xla_backend_optimization_level": level})(a, b)

  np.testing.assert_array_equal(compiled(boxes.iou), expected)
  np.testing.assert_array_equal(
      compiled(lambda a, b: boxes.iou(a, b).max(2)), expected.max(2))
  np.testing.assert_array_equal(
      compiled(lambda a, b: boxes.iou(b, a).max(2)), expected.max(1))


def test_iou_of_empty_boxes_is_zero():
  empty = jnp.array([[3, 3, 3, 3], [2, 2, 2, 8]], jnp.float32)
  assert not np.asarray(boxes.iou(empty, empty)).any()


def test_coder():
  rng = np.random.default_rng(0)
  base, found = (cases.around(rng, 200, "anywhere").astype(np.float32)
                 for _ in range(2))
  deltas = boxes.encode(base, found)
  np.testing.assert_allclose(
      deltas, [plain.encode(*pair) for pair in zip(base, found)], rtol=1e-5,
      atol=1e-5)
  np.testing.assert_allclose(boxes.decode(base, deltas), found, rtol=1e-5,
                             atol=1e-4)
  stds = (0.1, 0.1, 0.2, 0.2)
  scaled = boxes.encode(base, found, stds)
  np.testing.assert_allclose(scaled * jnp.array([stds]), deltas, rtol=1e-6)
  np.testing.assert_allclose(boxes.decode(base, scaled, stds=stds), found,
                             rtol=1e-5, atol=1e-4)


def test_decoding_limits_ratios_and_clips():
  rng = np.random.default_rng(1)
  base = cases.around(rng, 200, "anywhere").astype(np.float32)
  deltas = rng.normal(0, 5, (200, 4)).astype(np.float32)
  sizes = np.array([(70, 110), (90, 30)], np.int32)
  found = boxes.decode(*(np.stack([x, x]) for x in (base, deltas)), sizes)
  for row, size in zip(found, sizes):
    np.testing.assert_allclose(
        row, [plain.decode(*pair, size) for pair in zip(base, deltas)],
        rtol=1e-5, atol=1e-3)


def test_decoding_equals_the_example_of_mmdetection():
  """In the docstring of `delta2bbox`."""
  base = jnp.array([[0, 0, 1, 1]] * 3 + [[5, 5, 5, 5]], jnp.float32)
  deltas = jnp.array([[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 2, -1],
                      [0.7, -1.9, -0.5, 0.3]], jnp.float32)
  np.testing.assert_allclose(
      boxes.decode(base, deltas, jnp.array([32, 32])),
      [[0, 0, 1, 1], [0.1409, 0.1409, 2.8591, 2.8591],
       [0, 0.3161, 4.1945, 0.6839], [5, 5, 5, 5]], atol=5e-5)


@pytest.mark.parametrize("stride", cases.STRIDES)
def test_base_anchors_equal_mmdetections(stride):
  found = anchors.base(stride, 4.0, 3, (0.5, 1.0, 2.0))
  assert found.dtype == np.float32
  np.testing.assert_array_equal(found, cases.golden()[f"anchors/{stride}"])


@pytest.mark.parametrize("args", ((16, 1.0, 1, (1.0,)), (12, 8.0, 2, (0.3, 3)),
                                  (4, 8, 1, (0.5, 1.0, 2.0))))
def test_anchors(args):
  base = anchors.base(*args)
  np.testing.assert_array_equal(base, plain.base_anchors(*args))
  found = anchors.grid((3, 5), args[0], base)
  assert found.dtype == np.float32
  np.testing.assert_array_equal(
      found, plain.grid_anchors((3, 5), args[0], base))


def test_anchors_of_a_canvas():
  """Of 800 x 1344 pixels, as of any image of COCO that is not upright."""
  shapes = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
  found = [anchors.grid(shape, stride, anchors.base(
      stride, 4.0, 3, (0.5, 1.0, 2.0)))
           for shape, stride in zip(shapes, cases.STRIDES)]
  assert sum(map(len, found)) == 201_600
  s = np.float32(16 * 2 ** (1 / 3))
  np.testing.assert_array_equal(found[0][3:5], [[-16, -16, 16, 16],
                                                 [-s, -s, s, s]])
  last = found[0][-9 + 3]  # The smallest square of the last cell.
  np.testing.assert_array_equal(last, [1320, 776, 1352, 808])
