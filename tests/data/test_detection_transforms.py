"""Images and boxes as mmdetection makes them, and the arrays of a batch."""

import dataclasses
import io
import pathlib

import coco_tree
import detection_transform_cases as cases
import numpy as np
import pytest
import source_files
from PIL import Image

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.transforms import detection

GOLDEN = np.load(pathlib.Path(__file__).parents[1] /
                 "golden/detection_transforms.npz")
DATA = schema.Data(source="coco")
TASK = tasks.Detection(scale=cases.SCALE, num_classes=3, max_boxes=8)


def train(given, flip=False, task=TASK):
  return detection.TrainTransform(DATA, task)(given, cases.Fixed(flip))


def gray(height=60, width=96):
  return np.full((height, width, 3), 99, np.uint8)


# mmdetection's numbers.


@pytest.mark.parametrize("name", cases.CASES)
def test_images_and_boxes_are_mmdetections(name):
  case = cases.CASES[name]
  image, boxes = cases.picture(case)
  got = train(cases.record(image, boxes, np.arange(8) % 3), case.flip)
  expected, size = GOLDEN[f"{name}/image"], GOLDEN[f"{name}/size"]
  # Its Pad ends at the next multiple of 32, within our canvas.
  height, width, _ = expected.shape
  assert got["image"].shape[:2] == TASK.canvases[case.height > case.width]
  np.testing.assert_array_equal(got["image"][:height, :width], expected)
  assert not got["image"][height:].any() and not got["image"][:, width:].any()
  assert got["size"].tolist() == size.tolist()
  boxes = GOLDEN[f"{name}/boxes"]
  kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
  n = kept.sum()
  assert n > 5 and got["overflow"] == 0
  np.testing.assert_array_equal(got["boxes"][:n], boxes[kept])
  np.testing.assert_array_equal(got["labels"][:n], (np.arange(8) % 3)[kept])
  assert (got["labels"][n:] == -1).all() and not got["boxes"][n:].any()


def test_sizes_are_the_published_ones():
  """At 1333 x 800 (mmcv's rescale_size)."""
  task = tasks.Detection(num_classes=80)
  for (height, width), expected in {
      (480, 640): (800, 1067), (427, 640): (800, 1199), (640, 427): (1199, 800),
      (360, 640): (750, 1333), (500, 375): (1067, 800)}.items():
    got = detection.EvalTransform(DATA, task).preprocess(gray(height, width))
    assert tuple(got["size"]) == expected
    assert got["image"].shape[:2] == ((800, 1344) if width >= height else
                                      (1344, 800))


def test_evaluation_is_training_without_a_flip():
  image, boxes = cases.picture(cases.CASES["odd"])
  transform = detection.EvalTransform(DATA, TASK)
  got = transform(cases.record(image, boxes, index=7, group=0))
  expected = train(cases.record(image, boxes))
  for key in ("image", "size"):
    np.testing.assert_array_equal(got[key], expected[key])
  assert got["original_size"].tolist() == [427, 640] and got["index"] == 7
  alone = transform.preprocess(image)
  assert {*alone} == {*got} - {"index"}
  for key, value in alone.items():
    np.testing.assert_array_equal(value, got[key])


def test_a_flip_is_undone_by_a_flip():
  image, boxes = cases.picture(cases.CASES["same size"])
  one, other = (train(cases.record(image, boxes), flip)
                for flip in (False, True))
  height, width = one["size"]
  np.testing.assert_array_equal(one["image"][:height, :width],
                                other["image"][:height, :width][:, ::-1])
  np.testing.assert_array_equal(width - one["boxes"][:, 2],
                                other["boxes"][:, 0])


# Padding of the boxes.


def test_more_objects_than_fit_are_counted():
  boxes = [[i, 0, i + 5, 5] for i in range(11)]
  task = dataclasses.replace(TASK, max_boxes=4)
  got = train(cases.record(gray(), boxes, [2, 1, 0, 2, *[1] * 7]), task=task)
  assert got["overflow"] == 7 and got["labels"].tolist() == [2, 1, 0, 2]
  assert got["boxes"][:, 0].tolist() == [0, 1, 2, 3]


def test_without_objects_all_is_padding():
  got = train(cases.record(gray()))
  assert (got["labels"] == -1).all() and not got["boxes"].any()
  assert got["overflow"] == 0 and got["boxes"].shape == (8, 4)


def test_boxes_with_nothing_inside_do_not_count():
  """Also one that float32 makes empty at the border."""
  edge = np.nextafter(np.float32(96), np.float32(0))
  boxes = [[100, 0, 120, 9], [1, 2, 30, 40], [edge, 3, 400, 20], [5, 5, 5, 9]]
  for height, width in ((60, 96), (100, 96)):
    got = train(cases.record(gray(height, width), boxes, [0, 1, 2, 0]))
    n = (got["labels"] >= 0).sum()
    assert n in (1, 2) and got["labels"][0] == 1 and got["overflow"] == 0
    size = got["boxes"][:n, 2:] - got["boxes"][:n, :2]
    assert (size > 0).all()


@pytest.mark.parametrize("change, part", [
    ({"boxes": [[5, 5, 2, 9]]}, r"the box \[5.0, 5.0, 2.0, 9.0\] is not left"),
    ({"boxes": [[5, 5, np.nan, 9]]}, "is not left, top, right and bottom"),
    ({"boxes": [[5, 5, np.inf, 9]]}, "is not left"),
    ({"labels": np.array([3])}, "the label 3; the labels of 3 classes are 0"),
    ({"labels": np.array([-1])}, "the label -1"),
    ({"labels": np.array([1, 1])}, "2 labels for 1 boxes"),
    ({"size": (61, 96)}, "is 96 x 60 pixels, but its boxes are for 96 x 61$"),
    ({"size": (96, 60)}, "for 60 x 96; its orientation in EXIF is not applied"),
    ({"image": b"GIF89a"}, "cannot identify an image")])
def test_a_record_that_cannot_be_meant_is_bad(change, part):
  given = cases.record(gray(), [[1, 1, 5, 5]], index=0, group=0) | change
  for transform in (detection.TrainTransform, detection.EvalTransform):
    with pytest.raises(Exception, match=part):
      transform(DATA, TASK)(given, np.random.default_rng(0))


# Groups.


class Sizes:
  n_classes = 3

  def __init__(self, sizes, has_objects):
    self._sizes = np.array(sizes)
    self._has_objects = np.array(has_objects, bool)

  def sizes(self):
    return self._sizes

  def has_objects(self):
    return self._has_objects


def groups(transform, source, **kw):
  made = transform(DATA, dataclasses.replace(TASK, **kw))
  return [group.tolist() for group in made.groups(source)]


def test_images_are_grouped_by_orientation():
  source = Sizes([(60, 96), (96, 60), (50, 50), (31, 90), (90, 31), (32, 32),
                  (99, 98), (40, 40)], [1, 1, 1, 1, 1, 1, 0, 0])
  assert groups(detection.EvalTransform, source) == [[0, 2, 3, 5, 7], [1, 4, 6]]
  assert groups(detection.TrainTransform, source) == [[0, 2, 5], [1]]
  assert groups(detection.TrainTransform, source, filter_empty=False) == [
      [0, 2, 5, 7], [1, 6]]
  # A single canvas is of all.
  assert groups(detection.EvalTransform, source, scale=(96, 96)) == [
      [*range(8)]]


def test_no_image_to_train_on_is_one_line():
  source = Sizes([(20, 90), (60, 60)], [True, False])
  source_files.fails(
      lambda: groups(detection.TrainTransform, source),
      "of the 2 training images, none has sides of 32 pixels or more and "
      "objects; config.task.filter_empty=False")
  assert groups(detection.TrainTransform, source, filter_empty=False) == [
      [1], []]


# Through the loader.


def batches(root, split, **kw):
  data = schema.Data(source="coco", path=str(root))
  source = sources.create(data, split, task=TASK)
  make = detection.TrainTransform if split == "train" else (
      detection.EvalTransform)
  transform = make(data, TASK)
  return loader.Loader(source, transform, 4, groups=transform.groups(source),
                       **kw)


def test_batches_have_one_canvas(tmp_path):
  root = coco_tree.make(tmp_path)
  made = batches(root, "train", seed=5)
  assert made.n_examples == 9  # Of 12: two are empty, one is small.
  stream, seen = made.train_batches(0), set()
  for _, batch in zip(range(12), stream):
    assert batch["boxes"].shape == (4, 8, 4)
    assert batch["labels"].shape == (4, 8)
    assert batch["overflow"].max() in (0, coco_tree.MANY - 8)
    sizes = batch["size"]
    canvas = batch["image"].shape[1:3]
    seen.add(canvas)
    assert ((sizes[:, 0] > sizes[:, 1]) == (canvas == (96, 64))).all()
    for size, boxes, labels in zip(sizes, batch["boxes"], batch["labels"]):
      assert (boxes >= 0).all() and (boxes[:, ::2] <= size[1]).all()
      assert (boxes[:, 1::2] <= size[0]).all()
      assert (np.diff((labels >= 0).astype(int)) <= 0).all()
  stream.close()
  assert seen == {*TASK.canvases}


def test_evaluation_has_each_record_once_by_index(tmp_path):
  root = coco_tree.make(tmp_path)
  made = batches(root, "eval")
  found = list(made.eval_batches())
  index = np.concatenate([batch["index"] for batch in found])
  mask = np.concatenate([batch["mask"] for batch in found])
  assert sorted(index[mask]) == [*range(7)] and (index[~mask] == -1).all()
  sizes = np.concatenate([batch["original_size"] for batch in found])
  np.testing.assert_array_equal(sizes[mask], made.source.sizes()[index[mask]])


def test_an_image_of_another_size_is_a_bad_example(tmp_path, caplog):
  root = coco_tree.make(tmp_path)
  before = next(iter(batches(root, "eval").eval_batches()))
  file = io.BytesIO()
  Image.fromarray(gray(120, 90)).save(file, "JPEG")
  (root / "val2017/000000001049.jpg").write_bytes(file.getvalue())
  (root / "val2017/000000001035.jpg").unlink()
  found = list(batches(root, "eval").eval_batches())
  assert found[0]["image"].shape == before["image"].shape
  assert sum(batch["replaced"].sum() for batch in found) == 2
  assert sum(batch["mask"].sum() for batch in found) == 5
  for batch in found:
    assert (batch["index"][batch["replaced"]] == -1).all()
  assert "90 x 120 pixels, but its boxes are for 128 x 96" in caplog.text
  assert "No such file" in caplog.text
