"""Prepared data sets of objects: the tool, and damage of their tables."""

import itertools
import json
import logging
import os
import pathlib
import shutil

import coco_tree
import numpy as np
import pytest
import safetensors.numpy
import source_files

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.sources import outline_files
from metaformer_jax.data.transforms import detection
from metaformer_jax.tools import prepare

TASK = tasks.Detection(head="mask_rcnn", scale=(96, 60), num_classes=3,
                       max_boxes=8, object_mask_size=20)


def run(path, output, *args):
  prepare.main(prepare.parse(
      ["--source=coco", f"--path={path}", f"--output={output}", *args]))
  return schema.Data(source="array_record", path=str(output))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  return coco_tree.make(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
  return run(tree, tmp_path_factory.mktemp("x") / "coco", "--shards=3")


@pytest.fixture
def copy(prepared, tmp_path):
  folder = tmp_path / "copy"
  shutil.copytree(prepared.path, folder)
  return schema.Data(source="array_record", path=str(folder))


def opened(data, split="train"):
  return sources.create(data, split, task=TASK)


def batches(data, **kw):
  """Six training batches of global size 4, and all of the evaluation."""
  found = []
  for split, make in (("train", detection.TrainTransform),
                      ("eval", detection.EvalTransform)):
    source = opened(data, split)
    transform = make(data, TASK)
    made = loader.Loader(source, transform, 4, groups=transform.groups(source),
                         **kw)
    stream = (made.train_batches(8) if split == "train" else
              made.eval_batches())
    found += itertools.islice(stream, 6)
    stream.close()
  return found


def test_batches_are_those_of_the_tree_bit_for_bit(tree, prepared):
  expected = batches(schema.Data(source="coco", path=str(tree)))
  found = batches(prepared)
  assert len(found) == len(expected) > 8
  for one, other in zip(expected, found):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_the_folder_depends_on_the_data_only(tree, prepared, tmp_path):
  moved = tmp_path / "elsewhere"
  shutil.copytree(tree, moved)
  again = run(moved, tmp_path / "o", "--shards=3")
  names = sorted(os.listdir(prepared.path))
  assert names == sorted(os.listdir(again.path)) == sorted(
      f"{split}{end}" for split in ("train", "val") for end in (
          ".json", ".safetensors", ".outlines.safetensors",
          *(f"-0000{i}-of-00003.array_record" for i in range(3))))
  for name in names:
    one, other = (pathlib.Path(d.path, name).read_bytes()
                  for d in (prepared, again))
    assert one == other, name


def test_bad_images_can_be_left_out(tree, tmp_path, caplog):
  root = tmp_path / "c"
  shutil.copytree(tree, root)
  names = [os.path.basename(r["path"]) for r in source_files.records(opened(
      schema.Data(source="coco", path=str(tree))))]
  (root / "train2017" / names[2]).write_bytes(b"")
  (root / "train2017" / names[4]).unlink()
  (root / "annotations/instances_val2017.json").unlink()
  with pytest.raises(errors.DataError, match="2 of 12 examples of train"):
    run(root, tmp_path / "o")
  with caplog.at_level(logging.WARNING):
    given = run(root, tmp_path / "o", "--skip_bad", "--shards=2")
  assert "there is no evaluation split" in caplog.text
  made, whole = opened(given), opened(
      schema.Data(source="coco", path=str(tree)))
  kept = [i for i in range(12) if i not in (2, 4)]
  assert len(made) == 10
  for i, record in zip(kept, source_files.records(made)):
    assert record["path"] == f"train2017/{names[i]}"
    for key in ("boxes", "labels"):
      np.testing.assert_array_equal(record[key], whole[i][key])
    assert record["segments"] == whole[i]["segments"]
  np.testing.assert_array_equal(made.has_objects(), whole.has_objects()[kept])
  ids = [image["id"] for image in made.annotations()["images"]]
  assert [f"{i:012}.jpg" for i in ids] == [names[i] for i in kept]


@pytest.mark.parametrize("args, part", [
    (["--path=nowhere"], "--path: nowhere is not a folder"),
    (["--path=."], "--train_split: . has no annotations/instances_SPLIT.json"),
    (["--path=.", "--train_split=x"], "for the split x")])
def test_a_wrong_command_line_is_one_line(tmp_path, monkeypatch, args, part):
  monkeypatch.chdir(tmp_path)
  source_files.fails(lambda: prepare.main(prepare.parse(
      ["--source=coco", "--output=o", *args])), part)
  assert os.listdir(tmp_path) == []


# Damage.


def changed(name, change):
  def damage(path):
    arrays = safetensors.numpy.load_file(path)
    arrays[name] = change(arrays.get(name))
    path.write_bytes(safetensors.numpy.save(arrays))
  return damage


@pytest.mark.parametrize("damage, part", [
    (lambda path: path.unlink(), "No such file"),
    (lambda path: path.write_bytes(b""), "train.safetensors: cannot be used"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be used"),
    (changed("boxes", lambda x: x[:-1]), "do not fit together"),
    (changed("boxes", lambda x: x.astype(np.float32)), "has other arrays"),
    (changed("boxes", lambda x: x.ravel()), "has other arrays"),
    (changed("boxes", lambda x: x * np.nan), "do not fit together"),
    (changed("labels", lambda x: x + 1), "do not fit together"),
    (changed("labels", lambda x: x - 1), "do not fit together"),
    (changed("starts", lambda x: x[::-1].copy()), "do not fit together"),
    (changed("starts", lambda x: x[:-1]), "do not fit together"),
    (changed("crowd", lambda x: x[:-1]), "do not fit together"),
    (changed("sizes", lambda x: x + 1), "images of other sizes than the index"),
    (changed("sizes", lambda x: x[:, :1].copy()), "do not fit together"),
    (changed("more", lambda x: np.zeros(2)), "has other arrays"),
    (changed("category_ids", lambda x: np.arange(4)), "it has 4 classes")])
def test_a_damaged_table_is_one_line(copy, damage, part):
  damage(pathlib.Path(copy.path) / "train.safetensors")
  source_files.fails(lambda: opened(copy), "config.data.path: ", part,
                     "prepare the data set again")
  line, = sources.check(schema.Experiment(task=TASK, data=copy), files=True)
  assert part in line


def test_a_folder_without_outlines_is_enough_for_boxes(copy):
  """One that was prepared when there were no masks."""
  boxes = tasks.Detection(head="faster_rcnn")
  for split in ("train", "val"):
    (pathlib.Path(copy.path) / f"{split}.outlines.safetensors").unlink()
  for split in ("train", "eval"):
    source_files.fails(
        lambda s=split: opened(copy, s), "config.data.path: ",
        ".outlines.safetensors: cannot be used: it does not exist, and masks "
        "need it; prepare the data set again")
    source = sources.create(copy, split, task=boxes)
    assert "segments" not in source[0]
    assert "segmentation" not in source.annotations()["annotations"][0]
  cfg = schema.Experiment(task=boxes, data=copy)
  assert list(sources.check(cfg, files=True)) == []


@pytest.mark.parametrize("damage, part", [
    (lambda path: path.write_bytes(b""), "cannot be used"),
    (lambda path: path.write_bytes(path.read_bytes()[:-9]), "cannot be used"),
    (lambda path: path.write_bytes(outline_files.save([None], [[9, 9]])),
     "it has 1 outlines of "),
    (changed("starts", lambda x: x[:-1]), "do not fit together"),
    (changed("more", lambda x: np.zeros(2)), "has other arrays")])
def test_damaged_outlines_are_one_line(copy, damage, part):
  for split, name in (("eval", "val"), ("train", "train")):
    damage(pathlib.Path(copy.path) / f"{name}.outlines.safetensors")
    source_files.fails(lambda s=split: opened(copy, s), "config.data.path: ",
                       part, "prepare the data set again")


def test_the_names_must_be_those_of_the_table(copy):
  path = pathlib.Path(copy.path) / "train.json"
  for names in (None, ["a", "b"]):
    path.write_text(json.dumps(
        json.loads(path.read_text()) | {"class_names": names}))
    source_files.fails(lambda: opened(copy), "it has 3 classes")
