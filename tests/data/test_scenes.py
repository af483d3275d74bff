"""Composed scenes: exact label maps, and nothing shared between the splits."""

import numpy as np
import pytest

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import scenes


def opened(train_split=None, eval_split=None, split="train"):
  return sources.create(
      schema.Data(source="scenes", train_split=train_split,
                  eval_split=eval_split), split)


def test_scenes_are_fixed_and_differ():
  source = opened("train[:40]")
  assert len(source) == 40 and len(opened(split="eval")) == 200
  records = [source[i] for i in range(40)]
  np.testing.assert_array_equal(source.sizes(),
                                [r["label"].shape for r in records])
  again = opened("train[:5]")
  for i in range(5):
    for key in ("image", "label"):
      np.testing.assert_array_equal(again[i][key], records[i][key])
  assert len({r["image"].tobytes() for r in records}) == 40
  assert len(source.class_names) == source.n_classes == 11
  assert {*np.concatenate([r["label"].ravel() for r in records])} == {
      *range(11)}
  with pytest.raises(IndexError):
    source[40]


def test_a_digit_stands_out_where_its_label_is():
  """Inside the label, the image is nearer to one colour than outside."""
  source = opened("train[:30]")
  for i in range(30):
    image, label = source[i]["image"].astype(float), source[i]["label"]
    digits = np.unique(label[label > 0])
    if len(digits) != 1:
      continue
    inside = label > 0
    colour = np.median(image[inside], 0)
    distance = np.linalg.norm(image - colour, axis=-1)
    assert np.median(distance[inside]) < 0.5 * np.median(distance[~inside])


def test_splits_share_neither_digits_nor_pixels():
  digits, photographs = zip(*(scenes._parts(s) for s in ("train", "test")))
  seen = [{d[i]["image"].tobytes() for i in range(len(d))} for d in digits]
  assert not seen[0] & seen[1]
  for left, right in zip(*photographs):
    assert left.width + right.width == 640
    # Neighbouring columns of the photograph.
    edge = np.asarray(left, int)[:, -1] - np.asarray(right, int)[:, 0]
    assert np.abs(edge).mean() < 20


@pytest.mark.parametrize("value", ("validation", "train[5:]", "train[:0]", ""))
def test_unknown_split_is_one_line(value):
  with pytest.raises(errors.ConfigError, match=r"config.data.eval_split: .* is "
                     "not a split of scenes"):
    opened(eval_split=value, split="eval")


# Scenes with boxes.


def with_boxes(split, task_split="train"):
  return sources.create(schema.Data(
      source="scenes", train_split=split, eval_split=split), task_split,
      task=tasks.Detection())


def test_boxes_are_the_smallest_around_what_is_visible():
  source = with_boxes("train[:60]")
  counts, n_overlapping = np.zeros(10, int), 0
  for i in range(60):
    record = source[i]
    height, width, _ = record["image"].shape
    assert (height, width) == record["size"]
    np.testing.assert_array_equal(record["image"], source[i]["image"])
    masks = [decoded(s) for s in record["segments"]]
    assert not (np.sum(masks, 0) > 1).any()  # No pixel is of two digits.
    for mask, (left, top, right, bottom) in zip(masks, record["boxes"]):
      y, x = np.nonzero(mask)
      assert (x.min(), y.min(), x.max() + 1, y.max() + 1) == (
          left, top, right, bottom)
      # Digits stand out of the dimmed photograph.
      gray = record["image"].mean(-1)
      assert gray[mask].mean() > 110
    counts += np.bincount(record["labels"], minlength=10)
    starts, ends = record["boxes"][:, :2], record["boxes"][:, 2:]
    n_overlapping += (np.triu((starts[:, None] < ends[None]).all(-1) & (
        starts[None] < ends[:, None]).all(-1), 1)).sum()
  assert counts.min() > 2 and 100 < counts.sum() < 200
  assert n_overlapping > 10
  np.testing.assert_array_equal(
      source.sizes(), [source[i]["size"] for i in range(60)])
  assert {*map(tuple, source.sizes().tolist())} == {*scenes._OBJECT_SIZES}
  assert source.has_objects().all()
  with pytest.raises(IndexError):
    source[60]


def decoded(segment):
  """The mask of an RLE, bool [H, W]."""
  values = np.zeros(0, bool)
  for i, n in enumerate(segment["counts"]):
    values = np.append(values, np.full(n, i % 2 == 1))
  return values.reshape(segment["size"][::-1]).T


def test_annotations_are_of_the_scenes():
  source = with_boxes("test[:20]", "eval")
  found = source.annotations()
  assert [c["name"] for c in found["categories"]] == [*"0123456789"]
  assert [c["id"] for c in found["categories"]] == [*source.category_ids]
  assert len(found["images"]) == 20
  rows = iter(found["annotations"])
  for image, i in zip(found["images"], range(20)):
    record = source[i]
    assert (image["height"], image["width"]) == record["size"]
    for label, (left, top, right, bottom), segment in zip(
        record["labels"], record["boxes"], record["segments"]):
      row = next(rows)
      assert row["image_id"] == image["id"] and not row["iscrowd"]
      assert row["category_id"] == source.category_ids[label]
      assert row["bbox"] == [left, top, right - left, bottom - top]
      assert row["area"] == decoded(segment).sum()
  assert not list(rows)


def test_scenes_with_boxes_differ_by_split():
  one, other = with_boxes("train[:30]"), with_boxes("test[:30]", "eval")
  images = {s[i]["image"].tobytes() for s in (one, other) for i in range(30)}
  assert len(images) == 60


def test_check():
  def lines(task, **data):
    cfg = schema.Experiment(task=task, data=schema.Data(source="scenes",
                                                        **data))
    return list(sources.check(cfg, files=True))

  assert lines(tasks.Segmentation()) == []
  assert lines(tasks.Segmentation(num_classes=10)) == [
      "config.task.num_classes: 10, but the training data has 11 classes; set "
      "it to 11, or to None"]
  assert len(lines(tasks.Segmentation(), train_split="a")) == 1
  assert lines(tasks.Detection()) == []
  line, = lines(tasks.Detection(num_classes=11))
  assert "11, but the training data has 10 classes" in line
