"""Objects of a data set with masks, and found ones, as COCO has them."""

import json
import logging

import numpy as np
import pytest
from pycocotools import mask as pymask

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.tasks import objects

TASK = tasks.Detection(head="mask_rcnn")


class Source:
  """Two images of (height, width), and four objects."""

  category_ids = (3, 8)

  def __init__(self, segments):
    self._segments = segments

  def annotations(self):
    return {
        "images": [{"id": 5, "height": 20, "width": 30},
                   {"id": 2, "height": 40, "width": 10}],
        "categories": [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}],
        "annotations": [
            {"id": i, "image_id": 2 if i == 1 else 5, "category_id": 3,
             "bbox": [1, 2, 6, 7], "area": 42, "iscrowd": 0, **more}
            for i, more in enumerate(self._segments)]}


def shapes(segments):
  return [{"segmentation": x} for x in segments]


def test_outlines_of_any_form_become_rles():
  polygon, mask = [1, 2, 7, 2, 7, 9, 1, 9], np.zeros((20, 30), bool)
  mask[2:9, 1:7] = True
  text = pymask.encode(np.asfortranarray(mask, np.uint8))["counts"]
  counts = [22, *[7, 13] * 5, 7, 600 - 22 - 7 * 6 - 13 * 5]
  rle = {"size": [20, 30], "counts": text.decode()}
  source = Source(shapes([[polygon], [polygon], rle,
                          {"size": [20, 30], "counts": counts},
                          {"size": (20, 30), "counts": text}]))
  before = json.dumps(source.annotations()["annotations"][:4])
  truth = objects.ground_truth(source, with_masks=True)
  found = [row["segmentation"] for row in truth.data_set["annotations"]]
  assert found[0] == found[2] == found[3] == found[4] == rle
  assert found[1]["size"] == [40, 10] and pymask.area(found[1]) == 42
  assert truth.category_ids == (3, 8)
  assert json.dumps(source.annotations()["annotations"][:4]) == before


BAD = [
    [[np.nan, 2, 7, 2, 7, 9]], [[np.inf, 2, 7, 2, 7, 9]], [[1e30] * 6],
    [[10**400] * 6], [[-1e7, 0, 1e7, 0] * 20], [[1, 2, 3, 4]], [[0] * 7],
    [["a"] * 6], [[None] * 6], [], None, {}, 5, "x", [5], [[]], [[[1, 2]] * 6],
    {"size": [20, 30]}, {"counts": [600]}, {"size": [20, 30], "counts": None},
    {"size": [20, 30], "counts": [599]}, {"size": [20, 30], "counts": [2**70]},
    {"size": [20, 30], "counts": [700, -100]}, {"size": 5, "counts": [600]},
    {"size": [30, 20], "counts": [600]}, {"size": ["20", 30], "counts": [600]},
    {"size": [20, 30], "counts": "~~~"}, {"size": [20, 30], "counts": "é" * 9},
    {"size": [20, 30], "counts": b"\xff\x00"},
    {"size": [20, 30], "counts": "o" * 99}]


@pytest.mark.parametrize("i", range(len(BAD)))
def test_outlines_that_cannot_be_used_are_counted(i, caplog):
  """pycocotools would crash on some of them."""
  source = Source(shapes([[[1, 2, 7, 2, 7, 9]], [[1, 2, 7, 2, 7, 9]], BAD[i]]))
  with caplog.at_level(logging.WARNING):
    truth = objects.ground_truth(source, with_masks=True)
  line, = caplog.messages
  assert line.startswith("1 objects of the evaluation split have no outline")
  assert "the first: that with the id 2 " in line and len(line) < 400
  rows = truth.data_set["annotations"]
  assert [row["segmentation"] is None for row in rows] == [False, False, True]


def test_boxes_alone_need_no_outlines(caplog):
  source = Source([{}, {"segmentation": [[np.nan] * 6]}])
  truth = objects.ground_truth(source, with_masks=False)
  assert repr(truth.data_set) == repr(source.annotations())
  assert not caplog.messages


def test_scenes_have_the_masks_of_their_digits():
  source = sources.create(schema.Data(source="scenes", eval_split="test[:5]"),
                          "eval", task=TASK)
  rows = objects.ground_truth(source, True).data_set["annotations"]
  assert len(rows) > 5
  for row in rows:
    assert pymask.area(row["segmentation"]) == row["area"]
    np.testing.assert_array_equal(pymask.toBbox(row["segmentation"]),
                                  row["bbox"])


# Found objects.


def outputs():
  return {"boxes": np.array([[1, 2, 7, 9], [0, 0, 5, 5.5], [3, 3, 9, 9]],
                            np.float32),
          "scores": np.array([0.9, 0.8, 0.7], np.float32),
          "labels": np.array([1, 0, 1]), "valid": np.array([True, False, True]),
          "masks": np.array([[[0.9]], [[0.9]], [[0.1]]], np.float32)}


def test_found_masks_are_of_the_image():
  found = objects.find(outputs(), (20, 30), "ab", 0.4)
  masks = np.array(found["masks"])
  assert masks.shape == (2, 20, 30) and masks.dtype == bool
  # A single cell: most of the first object's box, nothing of the other's.
  assert masks[0, 3:8, 2:6].all() and not masks[1].any()
  assert masks[0].sum() <= 42 and len(found["masks"]) == 2
  assert "masks" not in objects.find(outputs(), (20, 30), "ab")


def test_found_masks_are_written_as_rles():
  found = objects.find(outputs(), (20, 30), "ab", 0.4)
  data_set = objects.annotations(found, "ab", (3, 8))
  data_set = json.loads(json.dumps(data_set, allow_nan=False))
  first, second = data_set["annotations"]
  assert first["segmentation"]["size"] == [20, 30]
  assert pymask.area(first["segmentation"]) == first["area"] == (
      found["masks"][0].sum())
  assert second["area"] == 0 and second["bbox"] == [3, 3, 6, 6]
  boxes = objects.annotations(objects.find(outputs(), (20, 30), "ab"), "ab",
                              (3, 8))
  assert [{k: row[k] for k in row if k not in ("segmentation", "area")}
          for row in data_set["annotations"]] == [
      {k: row[k] for k in row if k != "area"} for row in boxes["annotations"]]
  assert [row["area"] for row in boxes["annotations"]] == [42, 36]
