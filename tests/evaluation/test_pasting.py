"""Pasting of masks against mmdetection's, and RLE against pycocotools."""

import numpy as np
import pytest
import roi_cases as cases
from pycocotools import mask as coco_mask

from metaformer_jax.evaluation import masks


@pytest.mark.parametrize("threshold", cases.THRESHOLDS)
def test_as_mmdetection(threshold):
  case = cases.pasted()
  found = list(masks.paste(case.probabilities, case.boxes, cases.PASTED_SIZE,
                           threshold))
  expected = np.unpackbits(cases.golden()[f"pasted/{threshold}"])
  np.testing.assert_array_equal(
      found, expected.reshape(-1, *cases.PASTED_SIZE).astype(bool))


def test_cells_of_a_pixel_are_the_pixels():
  cells = np.random.default_rng(0).uniform(size=(1, 28, 28)).astype(np.float32)
  mask, = masks.paste(cells, np.array([[3.0, 5, 31, 33]]), (40, 50), 0.5)
  np.testing.assert_array_equal(mask[5:33, 3:31], cells[0] >= 0.5)
  assert mask.sum() == (cells >= 0.5).sum()


def test_boxes_outside_are_empty():
  boxes = np.array([[-90, 10, -50, 30], [10, 300, 20, 400], [60, 1, 70, 5]])
  for mask in masks.paste(np.ones((3, 28, 28), np.float32), boxes, (40, 50),
                          0.5):
    assert mask.shape == (40, 50)
    assert not mask.any()


# Of pycocotools' own code, with NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_rle_can_be_read():
  rng = np.random.default_rng(0)
  for mask in (rng.uniform(size=(7, 11)) < 0.5, np.zeros((3, 4), bool),
               np.ones((3, 4), bool)):
    found = masks.rle(mask)
    assert found["size"] == list(mask.shape)
    assert type(found["counts"]) is str
    np.testing.assert_array_equal(coco_mask.decode(found), mask)
    assert masks.rle(np.asfortranarray(mask)) == found
