"""COCO's files: records, filtering, classes and layouts."""

import dataclasses
import json
import os
import pathlib
import pickle
import shutil

import coco_tree
import numpy as np
import pytest
import source_files
from pycocotools import coco as pycoco

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import coco_json, objects
from metaformer_jax.tools import prepare

GOLDEN = np.load(pathlib.Path(__file__).parents[1] /
                 "golden/detection_transforms.npz")
TASK = tasks.Detection(head="mask_rcnn")
N_TRAIN, N_VAL = 12, 7


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  return coco_tree.make(tmp_path_factory.mktemp("coco"), N_TRAIN, N_VAL)


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
  output = tmp_path_factory.mktemp("prepared") / "coco"
  prepare.main(prepare.parse(["--source=coco", f"--path={tree}",
                              f"--output={output}", "--shards=3"]))
  return output


def opened(path, split="train", source="coco", names=None, **kw):
  return sources.create(schema.Data(source=source, path=str(path), **kw), split,
                        names=names, task=TASK)


def problems(path, source="coco", task=TASK, **kw):
  return list(sources.check(schema.Experiment(task=task, data=schema.Data(
      source=source, path=str(path), **kw)), files=True))


def same(one, other):
  """Two records, bit for bit; the paths may begin elsewhere."""
  assert one.keys() == other.keys()
  for key, value in one.items():
    if key == "path":
      assert pathlib.Path(value).name == pathlib.Path(other[key]).name
    elif isinstance(value, np.ndarray):
      assert value.dtype == other[key].dtype
      np.testing.assert_array_equal(value, other[key])
    else:
      assert value == other[key], key


# The records.


@pytest.mark.parametrize("source", ["coco", "array_record"])
@pytest.mark.parametrize("split, folder, n", [("train", "train2017", N_TRAIN),
                                              ("eval", "val2017", N_VAL)])
def test_boxes_labels_and_filtering_are_mmdetections(tree, prepared, source,
                                                     split, folder, n):
  made = opened(tree if source == "coco" else prepared, split, source)
  assert len(made) == n
  assert made.class_names == coco_tree.CLASS_NAMES and made.n_classes == 3
  assert made.category_ids == coco_tree.CATEGORY_IDS
  for i, record in enumerate(source_files.records(made)):
    name = os.path.basename(record["path"])
    assert name == GOLDEN[f"{folder}/names"][i]
    assert record["image"] == (tree / folder / name).read_bytes()
    assert record["size"] == coco_tree.SIZES[i % len(coco_tree.SIZES)]
    for key in ("boxes", "labels"):
      np.testing.assert_array_equal(record[key], GOLDEN[f"{folder}/{i}/{key}"])
    assert record["boxes"].dtype == np.float32
    assert len(record["segments"]) == len(record["labels"])
  large = made.sizes().min(1) >= objects.SHORTEST
  for empty, usable in ((True, made.has_objects() & large), (False, large)):
    assert np.flatnonzero(usable).tolist() == (
        GOLDEN[f"{folder}/images/{empty}"].tolist())


def test_the_annotations_are_the_files(tree, prepared):
  """In the eyes of pycocotools, but for their numbers."""
  for split, folder in (("train", "train2017"), ("val", "val2017")):
    content = json.loads(
        (tree / f"annotations/instances_{folder}.json").read_text())
    found = opened(tree, "eval", eval_split=folder).annotations()
    assert found == opened(prepared, "eval", "array_record",
                           eval_split=split).annotations()
    assert [i["id"] for i in found["images"]] == [
        i["id"] for i in content["images"]]
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd",
            "segmentation")
    expected = {i["id"]: [] for i in content["images"]}
    for a in content["annotations"]:
      expected[a["image_id"]].append([a[key] for key in keys])
    got = {i["id"]: [] for i in found["images"]}
    for a in found["annotations"]:
      got[a["image_id"]].append([a[key] for key in keys])
    assert got == expected
    assert {(c["id"], c["name"]) for c in found["categories"]} == {
        *coco_tree.CATEGORIES}
    ids = [a["id"] for a in found["annotations"]]
    assert len(set(ids)) == len(ids) and min(ids) == 1
    index = pycoco.COCO()
    index.dataset = json.loads(json.dumps(found))  # Plain values only.
    index.createIndex()
    assert len(index.anns) == len(content["annotations"])


def test_outlines_follow_their_boxes(tree):
  made = opened(tree)
  for record in source_files.records(made):
    for (left, top, right, bottom), polygons in zip(record["boxes"],
                                                    record["segments"]):
      x, y = np.array(polygons[0]).reshape(-1, 2).T
      np.testing.assert_allclose(
          (x.min(), y.min(), x.max(), y.max()), (left, top, right, bottom),
          atol=0.02)
  crowds = coco_json.read(tree / "annotations/instances_train2017.json",
                          with_outlines=True).outlines.segments.rles
  assert len(crowds) == 3


def test_a_source_can_be_pickled(tree, prepared):
  for made in (opened(tree), opened(prepared, source="array_record")):
    same(pickle.loads(pickle.dumps(made))[3], made[3])


def test_images_are_on_disk_until_they_are_read(tree, tmp_path):
  shutil.copytree(tree, tmp_path / "c")
  made = opened(tmp_path / "c")
  os.unlink(made.path(0))
  with pytest.raises(FileNotFoundError):
    made[0]
  assert made[1]["labels"].tolist() == []


def test_a_file_is_parsed_again_only_when_it_has_changed(tree, tmp_path):
  shutil.copytree(tree, tmp_path / "c")
  file = tmp_path / "c/annotations/instances_train2017.json"
  one = coco_json.read(file)
  assert coco_json.read(file) is one
  content = json.loads(file.read_text())
  content["images"].append({"id": 1, "file_name": "x.jpg", "height": 5,
                            "width": 4})
  file.write_text(json.dumps(content))
  assert len(coco_json.read(file).files) == N_TRAIN + 1


# Classes of other numbers.


def test_classes_are_renumbered_by_their_names(tree, prepared):
  wanted = ("bird", "box", "wedge", "cat", "disc")
  numbers = [2, 4, 1]
  for path, source in ((tree, "coco"), (prepared, "array_record")):
    plain = opened(path, source=source)
    made = opened(path, source=source, names=wanted)
    assert made.n_classes == 5
    assert made.category_ids == (None, 90, 1, None, 17)
    for a, b in zip(source_files.records(plain), source_files.records(made)):
      assert b["labels"].tolist() == [numbers[i] for i in a["labels"]]
      same({**a, "labels": 0}, {**b, "labels": 0})
    np.testing.assert_array_equal(made.has_objects(), plain.has_objects())
    np.testing.assert_array_equal(made.sizes(), plain.sizes())
    assert made.annotations() == plain.annotations()
    source_files.fails(lambda p=path, s=source: opened(
        p, source=s, names=("box", "disc")), "has the class 'wedge'")


# Layouts.


def move(tree, tmp_path, files, folders):
  """A copy of the tree with other names for both splits."""
  for split in coco_tree.SPLITS:
    short = split.removesuffix("2017")
    file, folder = (tmp_path / name.format(short) for name in (files, folders))
    shutil.copytree(tree / split, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tree / f"annotations/instances_{split}.json", file)
  return tmp_path


@pytest.mark.parametrize("files, folders", [
    ("annotations/instances_{}.json", "images/{}"),
    ("annotations/{}.json", "{}"),
    ("{}/_annotations.coco.json", "{}")])
def test_layouts_of_common_tools(tree, tmp_path, files, folders):
  root = move(tree, tmp_path, files, folders)
  for split in ("train", "eval"):
    for one, other in zip(source_files.records(opened(tree, split)),
                          source_files.records(opened(root, split))):
      same(one, other)
  assert problems(root) == []
  assert sources.classes(schema.Data(source="coco", path=str(root)), TASK) == (
      3, coco_tree.CLASS_NAMES)


def test_names_of_splits_are_the_users(tree, tmp_path):
  root = move(tree, tmp_path, "annotations/instances_my_{}.json",
              "images/my_{}")
  made = opened(root, train_split="my_val", eval_split="my_train")
  assert len(made) == N_VAL
  line, *_ = problems(root)
  assert line.startswith("config.data.train_split: ")
  assert "there are the splits my_train, my_val" in line
  line, *_ = problems(root, train_split="my_trian", eval_split="my_val")
  assert "no annotations/SPLIT.json" in line
  assert "did you mean my_train" in line


def test_names_of_files_may_begin_in_the_folder_itself(tree, tmp_path):
  shutil.copytree(tree, tmp_path / "c")
  file = tmp_path / "c/annotations/instances_val2017.json"
  content = json.loads(file.read_text())
  for image in content["images"]:
    image["file_name"] = f"val2017/{image['file_name']}"
  file.write_text(json.dumps(content))
  for one, other in zip(source_files.records(opened(tree, "eval")),
                        source_files.records(opened(tmp_path / "c", "eval"))):
    same(one, other)


def test_part_of_the_training_images_is_held_out(tree, tmp_path):
  root = tmp_path / "c"
  shutil.copytree(tree, root)
  (root / "annotations/instances_val2017.json").unlink()
  line, = problems(root)
  assert line.startswith("config.data.eval_split: ") and "eval_fraction" in line
  assert problems(root, eval_fraction=0.25) == []
  whole = {r["path"]: r for r in source_files.records(opened(root))}
  parts = [source_files.records(opened(root, split, eval_fraction=0.25))
           for split in ("train", "eval")]
  assert [len(part) for part in parts] == [9, 3]
  assert {r["path"] for part in parts for r in part} == {*whole}
  for record in (r for part in parts for r in part):
    same(record, whole[record["path"]])
  made = opened(root, "eval", eval_fraction=0.25)
  found, all_of = made.annotations(), opened(root).annotations()
  ids = [i["id"] for i in found["images"]]
  assert [f"{i:012}.jpg" for i in ids] == [
      os.path.basename(r["path"]) for r in parts[1]]
  assert [{**a, "id": 0} for a in found["annotations"]] == [
      {**a, "id": 0} for a in all_of["annotations"] if a["image_id"] in ids]


def test_missing_data_is_one_line(tree, tmp_path):
  line, = problems("")
  assert line.startswith("config.data.path: '' with source coco; give the fol")
  line, = problems(tmp_path / "x")
  assert "x is not a folder" in line
  line, = problems(tmp_path)
  assert line.startswith("config.data.train_split: ")
  assert "for SPLIT in train2017, train, training, default" in line
  shutil.copytree(tree / "annotations", tmp_path / "annotations")
  line, = problems(tmp_path)
  assert ("names images as '000000000084.jpg', but none of the first 12 is in "
          "train2017, images/train2017, images or ") in line


def test_another_number_of_classes_is_an_error(tree, prepared):
  task = dataclasses.replace(TASK, num_classes=80)
  for path, source in ((tree, "coco"), (prepared, "array_record")):
    line, = problems(path, source, task)
    assert "80, but the training data has 3 classes" in line


@pytest.mark.parametrize("source, label", [
    ("ade20k", "pixel"), ("folder", "image"), ("tfds", "image")])
def test_detection_needs_classes_of_objects(tree, source, label):
  line, = problems(tree, source)
  assert line == (f"config.data.source: {source} has a label for each {label}, "
                  "but detection needs one for each object; valid: "
                  "array_record, coco, scenes")


def test_segmentation_cannot_use_objects(tree, prepared):
  line, = problems(tree, task=tasks.Segmentation())
  assert "coco has a label for each object, but segmentation needs" in line
  line, = problems(prepared, "array_record", tasks.Segmentation())
  assert "has objects, but segmentation needs label_maps" in line
