"""Damaged files of COCO annotations: errors at the start, and what is counted.

Each is a small file with one mistake.
"""

import json
import logging
import tracemalloc

import numpy as np
import pytest
import source_files
from pycocotools import mask as pymask

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import coco_json, outlines

# Which reads all of a file; other heads do not need outlines.
TASK = tasks.Detection(head="mask_rcnn")


def opened(path, head="mask_rcnn"):
  return sources.create(schema.Data(source="coco", path=str(path)), "train",
                        task=tasks.Detection(head=head))


TREE = {
    "images": [{"id": 3, "file_name": "a.jpg", "height": 20, "width": 30},
               {"id": 1, "file_name": "b.jpg", "height": 40, "width": 30}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 12],
         "area": 99.5, "iscrowd": 0,
         "segmentation": [[1, 2, 11, 2, 11, 14, 1, 14]]},
        {"id": 6, "image_id": 3, "category_id": 2, "bbox": [0, 0, 5, 6],
         "segmentation": [[0, 0, 5, 0, 5, 6]]}],
    "categories": [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}]}


@pytest.fixture
def root(tmp_path):
  (tmp_path / "annotations").mkdir()
  (tmp_path / "train").mkdir()
  for name in ("a.jpg", "b.jpg"):
    (tmp_path / "train" / name).touch()
  return tmp_path


def write(root, content):
  text = content if isinstance(content, (str, bytes)) else json.dumps(content)
  file = root / "annotations/train.json"
  file.write_bytes(text.encode() if isinstance(text, str) else text)


def changed(*path, to):
  """The tree with another value; without it, if `to` is `...`."""
  made = json.loads(json.dumps(TREE))
  at = made
  for step in path[:-1]:
    at = at[step]
  if to is ...:
    del at[path[-1]]
  elif path[-1] == "+":
    at.append(to)
  else:
    at[path[-1]] = to
  return made


def test_the_small_file_is_good(root, caplog):
  write(root, TREE)
  made = opened(root)
  assert made.class_names == ("cat", "dog") and made.category_ids == (2, 7)
  assert made.objects.areas.tolist() == [30, 99.5]
  assert made.objects.boxes.tolist() == [[0, 0, 5, 6], [1, 2, 10, 12]]
  assert made.objects.is_trained.all() and not caplog.messages


A, B, C = "annotations", "images", "categories"
BAD = {
    "empty": ("", "Expecting '{'"),
    "cut": (json.dumps(TREE)[:300], "line 1 column 301"),
    "not json": (b"\xff\xd8\xff", "can't decode byte"),
    "a list": ("[]", "Expecting '{'"),
    "more after it": (json.dumps(TREE) + "x", "Expecting the end"),
    "comma": (json.dumps(TREE)[:-1] + ",}", "Expecting '\"'"),
    "comma in a list": (json.dumps(TREE).replace("}]", "},]"),
                        "Expecting value"),
    "NaN": (json.dumps(TREE).replace("99.5", "NaN"), "holds NaN"),
    "Infinity": (json.dumps(TREE).replace("99.5", "-Infinity"),
                 "holds -Infinity"),
    "a key twice": (json.dumps(TREE)[:-1] + ', "images": []}',
                    "has the key 'images' twice"),
    "a key twice inside": (json.dumps(TREE).replace(
        '"area"', '"bbox"'), "has the key 'bbox' twice"),
    "deep": ('{"images": ' + "[" * 10**6, "nested too deeply"),
    "digits": (json.dumps(TREE).replace("99.5", "9" * 5000), "4300 digits"),
    "no images": (changed(B, to=...), "has no 'images', which COCO"),
    "nothing": ("{}", "has no 'images', no 'categories', no 'annotations'"),
    "empty images": ({**TREE, B: [], A: []}, "it has no images"),
    "images of another type": (changed(B, to={}), "'images' are not a list"),
    "null annotations": (changed(A, to=None), "'annotations' are not a list"),
    "an image that is none": (changed(B, 1, to=5), "images[1] is not an obj"),
    "image without id": (changed(B, 1, "id", to=...), "images[1] has no id"),
    "id of a text": (changed(B, 1, "id", to="1"),
                     "images[1] (id '1') has the id '1', which is not an int"),
    "id of a bool": (changed(B, 1, "id", to=True), "has the id True"),
    "large id": (changed(B, 1, "id", to=2**64), "which is not an integer"),
    "image id twice": (changed(B, 1, "id", to=3),
                       "images[0] and images[1] have the same id, 3"),
    "no file": (changed(B, 0, "file_name", to=...), "images[0] (id 3) has no "
                "file_name"),
    "no name": (changed(B, 0, "file_name", to=""), "not a file's name"),
    "NUL": (changed(B, 0, "file_name", to="a\0.jpg"), "NUL"),
    "surrogate": (changed(B, 0, "file_name", to="\ud800"), "not valid Unicode"),
    "outside": (changed(B, 0, "file_name", to="../../etc/passwd"),
                "has the file_name '../../etc/passwd', which is not inside"),
    "inside and outside": (changed(B, 0, "file_name", to="a/../../b"),
                           "not inside"),
    "absolute": (changed(B, 0, "file_name", to="/etc/passwd"), "not inside"),
    "no height": (changed(B, 0, "height", to=...), "has no height"),
    "height 0": (changed(B, 0, "height", to=0), "has the height 0"),
    "width below 0": (changed(B, 0, "width", to=-4), "has the width -4"),
    "half a width": (changed(B, 0, "width", to=4.5), "has the width 4.5"),
    "category id twice": (changed(C, 1, "id", to=7),
                          "categories[0] and categories[1] have the same id"),
    "category without name": (changed(C, 1, "name", to=...),
                              "categories[1] (id 2) has no name"),
    "category of a blank": (changed(C, 1, "name", to=" "), "name ' ', which"),
    "category of a number": (changed(C, 1, "name", to=4), "has the name 4"),
    "name twice": (changed(C, 1, "name", to="dog"), "has the name 'dog', which "
                   "categories[0] has"),
    "no categories": ({**TREE, C: []}, "has the category_id 7, which is not an "
                      "id of the categories"),
    "unknown category": (changed(A, 1, "category_id", to=3),
                         "annotations[1] (id 6) has the category_id 3"),
    "unknown image": (changed(A, 0, "image_id", to=2),
                      "annotations[0] (id 5) has the image_id 2, which is not "
                      "an id of the images"),
    "annotation id twice": (changed(A, 1, "id", to=5),
                            "annotations[0] and annotations[1] have the same"),
    "annotation without id": (changed(A, 1, "id", to=...), "has no id"),
    "no box": (changed(A, 1, "bbox", to=...), "annotations[1] (id 6) has no "
               "bbox"),
    "three numbers": (changed(A, 1, "bbox", to=[1, 2, 3]), "not four numbers"),
    "a box of texts": (changed(A, 1, "bbox", to=list("1234")), "not four"),
    "a box of bools": (changed(A, 1, "bbox", to=[True] * 4), "not four"),
    "an infinite box": (json.dumps(TREE).replace("[0, 0, 5, 6]",
                                                 "[0, 0, 1e999, 6]"), "inf"),
    "a large box": (changed(A, 1, "bbox", to=[0, 0, 1e30, 6]), "1e+30"),
    "a negative size": (changed(A, 1, "bbox", to=[9, 9, -4, 6]),
                        "annotations[1] (id 6) has the bbox [9, 9, -4, 6] of "
                        "negative size; a bbox is left, top, width and height"),
    "area of a text": (changed(A, 0, "area", to="9"), "has the area '9'"),
    "iscrowd 2": (changed(A, 0, "iscrowd", to=2), "has the iscrowd 2"),
    "ignore of a text": (changed(A, 0, "ignore", to="no"), "the ignore 'no'"),
    "outline of a text": (changed(A, 0, "segmentation", to="x"), "neither a "
                          "list of polygons nor an RLE"),
    "flat outline": (changed(A, 0, "segmentation", to=[1, 2, 3, 4, 5, 6]),
                     "neither a list of polygons"),
    "polygon of texts": (changed(A, 0, "segmentation", to=[["1"] * 6]),
                         "annotations[0] (id 5) has a polygon of other things"),
    "polygon of lists": (changed(A, 0, "segmentation", to=[[[1, 2]] * 6]),
                         "other things than numbers"),
    "infinite polygon": (json.dumps(TREE).replace("[[1, 2,", "[[1, 1e999,"),
                         "annotations[0] has a polygon with the coordinate "
                         "inf"),
    "huge polygon": (changed(A, 0, "segmentation", to=[[10**400] * 6]),
                     "other things than numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_one_line(root, name):
  content, part = BAD[name]
  write(root, content)
  source_files.fails(lambda: opened(root), "config.data.path: ",
                     "annotations/train.json: cannot be used: ", part)
  line, = sources.check(schema.Experiment(task=TASK, data=schema.Data(
      source="coco", path=str(root), eval_fraction=0.5)), files=True)
  assert part in line


@pytest.mark.parametrize("key, value", [
    ("area", ...), ("area", None), ("iscrowd", ...), ("iscrowd", True),
    ("ignore", 0), ("id", 5.0), ("more", {"x": [1]})])
def test_what_other_tools_write_is_good(root, caplog, key, value):
  write(root, changed(A, 0, key, to=value))
  assert opened(root).objects.labels.tolist() == [0, 1]
  assert not caplog.messages


def test_a_file_may_be_in_any_order_and_have_spaces(root):
  write(root, TREE)
  expected = source_files.records(opened(root))
  for order in ((A, C, B), (C, A, B), (B, A, C)):
    write(root, "\ufeff" + json.dumps({"info": {"x": [[1]]}} | {
        key: TREE[key] for key in order}, indent=3) + "\n ")
    for one, other in zip(expected, source_files.records(opened(root))):
      assert repr(one) == repr(other)


# What training leaves out, or can do without.


@pytest.mark.parametrize("box, area, part", [
    ([30, 0, 9, 9], None, "1 boxes have no part of their images, the first in "
     "annotations[1]; training leaves them out"),
    ([-9, 0, 9, 9], None, "no part of their images"),
    ([3, 3, 0.9, 9], None, "1 boxes are less than a pixel wide or high"),
    ([3, 3, 9, 0], None, "less than a pixel"), ([3, 3, 9, 9], 0, "no area"),
    ([3, 3, 9, 9], -1, "or have no area")])
def test_boxes_that_are_left_out_are_counted(root, caplog, box, area, part):
  made = changed(A, 1, "bbox", to=box)
  made[A][1]["area"] = area
  write(root, made)
  with caplog.at_level(logging.WARNING):
    source = opened(root)
    opened(root)
  assert [m for m in caplog.messages if part in m] == caplog.messages
  assert len(caplog.messages) == 1  # Not at each opening.
  assert source[0]["labels"].tolist() == [] and source[0]["boxes"].size == 0
  assert source.has_objects().tolist() == [True, True]
  assert len(source.annotations()["annotations"]) == 2


RLE = {"size": [40, 30], "counts": [100, 50, 1050]}
UNUSABLE = {
    "two points": ([[1, 2, 3, 4]], "a polygon of 4 values"),
    "odd": ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 values"),
    "another size": ({**RLE, "size": [30, 40]},
                     "an RLE of 40 x 30 pixels, but its image has 30 x 40"),
    "too few": ({**RLE, "counts": [100]}, "is of 100 pixels, but its size is"),
    "too many": ({**RLE, "counts": [100, 2000]}, "is of 2100 pixels"),
    "below 0": ({**RLE, "counts": [1300, -100]}, "neither a list of lengths"),
    "no counts": ({"size": [40, 30]}, "neither a list"),
    "no size": ({"counts": [1200]}, "has the size None"),
    "size of texts": ({**RLE, "size": ["40", "30"]}, "has the size ['40'"),
    "three sizes": ({**RLE, "size": [40, 30, 1]}, "has the size [40, 30, 1]"),
    "a text that ends": ({**RLE, "counts": "o"}, "ends within a length"),
    "a text of others": ({**RLE, "counts": "a~"}, "holds '~' in a wrong place"),
    "a long text": ({**RLE, "counts": "o" * 50}, "holds 'o' in a wrong place"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_outlines_that_cannot_be_used_are_counted(root, caplog, name):
  """The box can be learned without; the mask cannot."""
  segment, part = UNUSABLE[name]
  write(root, changed(A, 0, "segmentation", to=segment))
  with caplog.at_level(logging.WARNING):
    opened(root, "retinanet")
    assert not caplog.messages
    source = opened(root)
  line, other = caplog.messages
  assert ("1 objects have no outline that can be used, the first in the image "
          "1; training with masks leaves them out") in other
  assert "1 outlines cannot be used, and are left out; the first: " in line
  assert f"annotations[0] has {'an RLE' if 'RLE' in part else ''}" in line
  assert part in line
  record = source[1]
  assert record["labels"].tolist() == [1] and record["segments"] == [None]


def test_a_good_polygon_stays_beside_one_that_is_left_out(root):
  write(root, changed(A, 0, "segmentation",
                      to=[[1, 1], [1, 2, 3, 4, 5, 6.5], [7] * 8]))
  assert opened(root)[1]["segments"] == [[[1, 2, 3, 4, 5, 6.5], [7] * 8]]


@pytest.mark.parametrize("segment", [..., None, []])
def test_objects_without_an_outline_are_counted(root, caplog, segment):
  write(root, changed(A, 1, "segmentation", to=segment))
  with caplog.at_level(logging.WARNING):
    assert "segments" not in opened(root, "faster_rcnn")[0]
    assert not caplog.messages
    assert opened(root)[0]["segments"] == [None]
  line, = caplog.messages
  assert "no outline that can be used, the first in the image 3;" in line
  write(root, {**TREE, A: [{**a, "segmentation": None} for a in TREE[A]]})
  for head, n in (("mask_rcnn", 1), ("faster_rcnn", 0)):
    lines = list(sources.check(schema.Experiment(
        task=tasks.Detection(head=head), data=schema.Data(
            source="coco", path=str(root), eval_fraction=0.5)), files=True))
    assert len(lines) == n and all("masks need outlines, and no object of" in
                                   line for line in lines)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_rles_are_pycocotools():
  rng = np.random.default_rng(0)
  for shape in ((1, 1), (7, 5), (64, 48), (3, 200)):
    for density in (0, 0.02, 0.5, 1):
      mask = rng.random(shape) < density
      encoded = pymask.encode(np.asfortranarray(mask, np.uint8))
      found = outlines.rle(mask)
      assert found["size"] == list(shape)
      text = encoded["counts"].decode()
      assert outlines.rle_counts(text) == found["counts"]
      assert outlines.rle_counts(found["counts"]) == found["counts"]
      again = pymask.frPyObjects(found, *shape)
      np.testing.assert_array_equal(pymask.decode(again), mask)


@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_an_rle_of_a_text_is_kept_as_it_is(root):
  mask = np.zeros((40, 30), bool)
  mask[3:20, 5:9] = True
  text = pymask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
  segment = {"size": [40, 30], "counts": text}
  write(root, changed(A, 0, "segmentation", to=segment))
  assert opened(root)[1]["segments"] == [segment]


def test_a_large_file_takes_little_more_than_its_text(root):
  """Items are not kept as they were parsed."""
  polygon = [round(0.37 * i, 2) for i in range(60)]
  write(root, {**TREE, A: [{**TREE[A][0], "id": i, "segmentation": [polygon]}
                           for i in range(4000)]})
  file = root / "annotations/train.json"
  tracemalloc.start()
  coco_json.read(file, with_outlines=True)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 3 * file.stat().st_size
