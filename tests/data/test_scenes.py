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
