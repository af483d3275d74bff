"""Masks of training: mmdetection's bitmaps, as crops."""

import dataclasses
import pathlib

import detection_transform_cases as cases
import numpy as np
import pytest

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.transforms import detection

GOLDEN = np.load(pathlib.Path(__file__).parents[1] /
                 "golden/detection_transforms.npz")
DATA = schema.Data(source="coco")
TASK = tasks.Detection(head="mask_rcnn", scale=cases.SCALE, num_classes=3,
                       max_boxes=6)


def train(given, flip=False, **kw):
  task = dataclasses.replace(TASK, **kw)
  return detection.TrainTransform(DATA, task)(given, cases.Fixed(flip))


def of(case):
  """The record of a case: each of its outlines in a box of the whole image."""
  image, _ = cases.picture(case)
  height, width, _ = image.shape
  return cases.record(image, [[0, 0, width, height]] * 4, [2, 0, 1, 1],
                      segments=cases.outlines(case))


def bitmaps(name):
  """mmdetection's: bool [4, h, w], of the resized and mirrored image."""
  height, width = GOLDEN[f"{name}/size"]
  bits = np.unpackbits(GOLDEN[f"{name}/masks"])
  return bits[:4 * height * width].reshape(4, height, width).astype(bool)


def extent(bitmap):
  """Left, top, right and bottom of what is not 0."""
  xs, ys = (np.flatnonzero(bitmap.any(axis)) for axis in (0, 1))
  return xs[0], ys[0], xs[-1] + 1, ys[-1] + 1


@pytest.mark.parametrize("name", cases.CASES)
def test_bitmaps_are_mmdetections(name):
  """A side of a mask that is at least the object's has it exactly."""
  got = train(of(cases.CASES[name]), cases.CASES[name].flip,
              object_mask_size=96)
  assert got["labels"].tolist() == [2, 0, 1, 1, -1, -1]
  assert got["masks"].dtype == np.uint8
  n_large = 0
  for i, expected in enumerate(bitmaps(name)):
    left, top, right, bottom = got["frames"][i].astype(int)
    assert right - left == bottom - top == 96
    whole = np.zeros(np.add(expected.shape, 96), np.uint8)
    whole[top:bottom, left:right] = got["masks"][i]
    height, width = expected.shape
    np.testing.assert_array_equal(whole[:height, :width], expected)
    assert not whole[height:].any() and not whole[:, width:].any()
    if expected.any():
      assert (left, top) == extent(expected)[:2]
      n_large += expected.sum() > 50
  assert n_large or min(expected.shape) < 20
  assert not got["masks"][4:].any() and not got["frames"][4:].any()


@pytest.mark.parametrize("side", [5, 7, 16, 33])
@pytest.mark.parametrize("name", ["landscape", "portrait, flipped", "wide"])
def test_larger_objects_have_cells_of_equal_size(name, side):
  """A cell is 1 if at least half of it is, along one axis or both."""
  got = train(of(cases.CASES[name]), cases.CASES[name].flip,
              object_mask_size=side)
  for mask, frame, bitmap in zip(got["masks"], got["frames"], bitmaps(name)):
    if not bitmap.any():
      continue
    left, top, right, bottom = extent(bitmap)
    sides = np.maximum([right - left, bottom - top], side)
    np.testing.assert_array_equal(frame, [left, top, *([left, top] + sides)])
    part = np.zeros(sides[::-1])
    part[:bottom - top, :right - left] = bitmap[top:bottom, left:right]
    # Each pixel as side x side equal parts, of which all are in one cell.
    fine = part.repeat(side, 0).repeat(side, 1).reshape(
        side, sides[1], side, sides[0])
    np.testing.assert_array_equal(mask, fine.mean((1, 3)) >= 0.5)


def test_masks_follow_their_boxes():
  """What has no outline, or nothing inside of the image, is left out."""
  image = np.zeros((60, 96, 3), np.uint8)
  boxes = [[5 * i, 0, 5 * i + 4, 9] for i in range(12)]
  boxes[2] = [200, 0, 220, 9]
  segments = [[[x, 0, x + 4, 0, x + 4, 9, x, 9]] for x, *_ in boxes]
  segments[4], segments[5], segments[6] = None, [], {}
  given = cases.record(image, boxes, np.arange(12) % 3, segments=segments)
  got = train(given, object_mask_size=12)
  kept = [0, 1, 3, 7, 8, 9]
  np.testing.assert_array_equal(got["boxes"], np.array(boxes)[kept])
  assert got["labels"].tolist() == [i % 3 for i in kept]
  assert got["overflow"] == 2
  np.testing.assert_array_equal(got["frames"][:, 0], [5 * i for i in kept])
  assert (got["masks"].sum((1, 2)) == 36).all()
  # Boxes alone have all of them.
  got = train(given, head="faster_rcnn")
  assert got["overflow"] == 5 and "masks" not in got and "frames" not in got


def test_an_image_without_objects():
  given = of(next(iter(cases.CASES.values())))
  got = train(given | {"boxes": np.zeros((0, 4), np.float32),
                       "labels": np.zeros(0, np.int32), "segments": []})
  assert (got["labels"] == -1).all() and got["overflow"] == 0
  assert not got["masks"].any() and not got["frames"].any()


def test_an_object_of_which_nothing_is_left_has_an_empty_mask():
  """A pixel in a row that resizing skips: as mmdetection, which trains it."""
  counts = [10 * 80 + 3, 1, 90 * 80 - 4]
  given = cases.record(np.zeros((80, 100, 3), np.uint8), [[10, 3, 30, 4]],
                       segments=[{"size": [80, 100], "counts": counts}])
  got = train(given, object_mask_size=5)
  assert got["labels"][0] == 0 and not got["masks"].any()
  np.testing.assert_array_equal(got["frames"][0], [7, 2, 12, 7])


@pytest.mark.parametrize("segments, part", [
    (..., "0 segments for 2 boxes; masks need"), ([None], "1 segments for 2"),
    ([[[1, 2, 3]], None], "has a polygon of the shape"),
    ([{"size": [60, 96], "counts": [9]}, None], "is of 9 pixels, but its")])
def test_a_record_that_cannot_be_meant_is_bad(segments, part):
  given = cases.record(np.zeros((60, 96, 3), np.uint8), [[1, 1, 5, 5]] * 2)
  if segments is not ...:
    given["segments"] = segments
  with pytest.raises(ValueError, match=part):
    train(given)


def test_batches_of_scenes():
  """Each digit's pixels, in the box that is around them."""
  data = schema.Data(source="scenes", train_split="train[:8]")
  task = tasks.Detection(head="mask_rcnn", scale=(128, 96), num_classes=10,
                         max_boxes=4, object_mask_size=64, flip=0)
  source = sources.create(data, "train", task=task)
  transform = detection.TrainTransform(data, task)
  made = loader.Loader(source, transform, 4, groups=transform.groups(source))
  stream = made.train_batches(0)
  batch = next(stream)
  stream.close()
  for size, boxes, labels, masks, frames in zip(*(batch[key] for key in (
      "size", "boxes", "labels", "masks", "frames"))):
    n = (labels >= 0).sum()
    assert n and not masks[n:].any()
    height, width = size
    for box, mask, frame in zip(boxes[:n], masks, frames):
      np.testing.assert_array_equal(frame, [*box[:2], *(box[:2] + 64)])
      w, h = (box[2:] - box[:2]).astype(int)
      assert extent(mask) == (0, 0, w, h)
      assert 0.2 < mask[:h, :w].mean() < 0.95
    assert masks.sum() < height * width
