"""Folders of images with label maps, and bad label maps."""

import logging
import os
import pickle
import re

import ade_tree
import image_files
import numpy as np
import pytest
import source_files
from PIL import Image

from metaformer_jax.config import ade20k, schema
from metaformer_jax.config.tasks import segmentation as section
from metaformer_jax.data import loader, sources
from metaformer_jax.data.sources import label_maps
from metaformer_jax.data.transforms import framing, segmentation

LABELS = np.array([[0, 1, 2], [3, 150, 255]], np.uint8)
PNG = image_files.encode(LABELS)


def data(root, source="label_maps", **kw):
  return schema.Data(source=source, path=str(root), **kw)


def experiment(root, source="label_maps", num_classes=None, **kw):
  return schema.Experiment(task=section.Segmentation(num_classes=num_classes),
                           data=data(root, source, **kw))


def names(source):
  return [os.path.relpath(source.path(i), source.path(0) + "/..")
          for i in range(len(source))]


# ADE20K.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  return ade_tree.make(tmp_path_factory.mktemp("ade"), n_train=7, n_val=3)


def test_the_classes_are_ade20ks():
  assert len(set(ade20k.CLASSES)) == 150
  # Read in mmsegmentation's palette of names; 1 and 150 in the files.
  assert ade20k.CLASSES[0] == "wall" and ade20k.CLASSES[-1] == "flag"
  assert ade20k.CLASSES[12] == "person" and ade20k.CLASSES[7] == "bed"
  assert all(name == name.strip() for name in ade20k.CLASSES)


@pytest.mark.parametrize("inside", [False, True])
def test_ade20ks_tree_is_read(tree, inside):
  given = data(tree if inside else tree.parent, "ade20k")
  for split, folder, name, n in (("train", "training", "train", 7),
                                 ("eval", "validation", "val", 3)):
    source = sources.create(given, split)
    assert len(source) == n and source.n_classes == 150
    assert source.class_names == ade20k.CLASSES
    for i, record in enumerate(source_files.records(source)):
      file = f"{folder}/ADE_{name}_{i + 1:08}"
      assert record["path"] == str(tree / "images" / f"{file}.jpg")
      assert record["image"] == (tree / f"images/{file}.jpg").read_bytes()
      assert record["label"] == (tree / f"annotations/{file}.png").read_bytes()
  assert sources.reduces_zero_label(given)
  assert sources.classes(given) == (150, ade20k.CLASSES)


def test_sizes_are_those_of_the_headers(tree):
  source = sources.create(data(tree, "ade20k"), "train")
  expected = [ade_tree.SIZES[i % len(ade_tree.SIZES)] for i in range(7)]
  assert source.sizes().tolist() == [list(size) for size in expected]
  assert source.sizes() is source.sizes()
  few = sources.create(data(tree, "ade20k", max_pixels=48 * 64), "train")
  assert few.sizes().tolist()[:3] == [[48, 64], [64, 48], [0, 0]]
  assert pickle.loads(pickle.dumps(source)).sizes().tolist() == (
      source.sizes().tolist())


# A user's own.


def write(root, *files):
  """Files below `root`; images and label maps of 3 x 2 pixels."""
  for name in files:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() == ".png":
      path.write_bytes(PNG)
    else:
      path.write_bytes(image_files.encode(Image.new("RGB", (3, 2)), "JPEG"))


@pytest.mark.parametrize("images_name, labels_name", [
    ("images", "annotations"), ("img_dir", "ann_dir"), ("images", "labels"),
    ("images", "masks")])
@pytest.mark.parametrize("train, evaluation", [
    ("train", "val"), ("training", "validation"), ("train", "test")])
def test_common_names_of_folders_are_found(tmp_path, images_name, labels_name,
                                           train, evaluation):
  for split, name in ((train, "a"), (evaluation, "b")):
    write(tmp_path, f"{images_name}/{split}/{name}.jpg",
          f"{labels_name}/{split}/{name}.png")
  assert names(sources.create(data(tmp_path), "train")) == ["a.jpg"]
  assert names(sources.create(data(tmp_path), "eval")) == ["b.jpg"]
  assert not sources.reduces_zero_label(data(tmp_path))
  assert list(sources.check(experiment(tmp_path), files=True)) == []


def test_splits_can_be_named(tmp_path):
  for split in ("train", "val", "night"):
    write(tmp_path, f"images/{split}/{split}.jpg",
          f"annotations/{split}/{split}.png")
  given = data(tmp_path, train_split="night", eval_split="train")
  assert names(sources.create(given, "train")) == ["night.jpg"]
  assert names(sources.create(given, "eval")) == ["train.jpg"]


def test_subfolders_suffixes_and_bytes_of_names(tmp_path):
  odd = os.fsdecode(b"b/\xff.JPeG")
  write(tmp_path, "images/train/b/2.jpg", f"images/train/{odd}",
        "images/train/a.b.jpg", "images/train/10.png",
        "annotations/train/b/2.PNG", "annotations/train/10.png",
        f"annotations/train/{odd[:-5]}.png", "annotations/train/a.b.png",
        "annotations/train/b/2.txt")
  (tmp_path / "images/train/readme.txt").touch()
  source = sources.create(data(tmp_path), "train")
  assert names(source) == ["10.png", "a.b.jpg", "b/2.jpg", odd]
  for record in source_files.records(source):
    assert record["label"] == PNG


@pytest.mark.parametrize("files, parts", [
    (["images/train/b.jpg", "images/train/c.jpg", "annotations/train/a.png"],
     ["annotations/train has no label map for b.jpg, and 1 more",
      "images/train has no image for a.png"]),
    (["images/train/x/a.jpg", "annotations/train/a.png"],
     ["no label map for x/a.jpg", "no image for a.png"]),
    (["images/train/a.jpg", "images/train/a.png", "annotations/train/a.png"],
     ["images/train has a.jpg and a.png, which have the same name"]),
    (["images/train/a.jpg", "annotations/train/a.png",
      "annotations/train/a.PNG"], ["annotations/train has a.PNG and a.png"]),
    (["images/train/a.jpg", "annotations/train/a.txt"],
     ["annotations/train has no label maps (.png)"]),
    (["images/train/a.txt", "annotations/train/a.png"],
     ["images/train has no images (.jpg"])])
def test_files_that_do_not_match_are_one_line(tmp_path, files, parts):
  write(tmp_path, *files)
  source_files.fails(lambda: sources.create(data(tmp_path), "train"),
                     "config.data.path", *parts)


@pytest.mark.parametrize("content, expected", [
    (b"cat\ndog\n", ("cat", "dog")),
    (b"\xef\xbb\xbfcat\r\nhot dog\r\n", ("cat", "hot dog")),
    ("  caf\u00e9 \u2028x".encode(), ("caf\u00e9 \u2028x",))])
def test_class_names_are_read(tmp_path, content, expected):
  write(tmp_path, "images/train/a.jpg", "annotations/train/a.png")
  (tmp_path / "classes.txt").write_bytes(content)
  assert sources.classes(data(tmp_path)) == (len(expected), expected)
  assert sources.create(data(tmp_path), "train").class_names == expected


@pytest.mark.parametrize("content, part", [
    (b"", "classes.txt is empty"), (b"\n \n", "classes.txt is empty"),
    (b"cat\n\ndog", "line 2 is blank"),
    (b"cat\ndog\n \n", "line 3 is blank"),
    (b"cat\ndog\ncat\n", "line 3 repeats 'cat' of line 1"),
    (b"\xff\xfe", "cannot be read as UTF-8"),
    ("\n".join(map(str, range(256))).encode(), "names 256 classes; label maps "
     "have up to 255")])
def test_bad_class_names_are_one_line(tmp_path, content, part):
  write(tmp_path, "images/train/a.jpg", "annotations/train/a.png",
        "images/val/a.jpg", "annotations/val/a.png")
  (tmp_path / "classes.txt").write_bytes(content)
  source_files.fails(lambda: sources.classes(data(tmp_path)), part)
  found, = sources.check(experiment(tmp_path), files=True)
  assert part in found


def test_without_class_names_their_number_is_unknown(tmp_path):
  write(tmp_path, "images/train/a.jpg", "annotations/train/a.png")
  assert sources.classes(data(tmp_path)) == (None, None)
  (tmp_path / "classes.txt").mkdir()
  source_files.fails(lambda: sources.classes(data(tmp_path)), "cannot be read")


def test_part_of_the_training_images_is_held_out(tmp_path):
  write(tmp_path, *(f"{kind}/train/{i}.{suffix}" for i in range(10)
                    for kind, suffix in (("images", "jpg"),
                                         ("annotations", "png"))))
  problem, = sources.check(experiment(tmp_path), files=True)
  assert "has no folder 'images/val'" in problem
  assert "eval_fraction" in problem
  given = data(tmp_path, eval_fraction=0.3)
  assert list(sources.check(experiment(tmp_path, eval_fraction=0.3),
                            files=True)) == []
  train, held_out = (set(names(sources.create(given, split)))
                     for split in ("train", "eval"))
  assert len(held_out) == 3 and len(train) == 7 and not train & held_out


# Checks.


def test_a_missing_path_is_one_line():
  for source in ("ade20k", "label_maps", "array_record"):
    problem, = sources.check(experiment("", source), files=False)
    assert problem.startswith("config.data.path: ''") and source in problem


@pytest.mark.parametrize("gone, key", [
    ("images/training", "train_split"), ("annotations/training", "train_split"),
    ("annotations/validation", "eval_split")])
def test_a_missing_folder_is_named(tmp_path, gone, key):
  root = ade_tree.make(tmp_path, n_train=1, n_val=1)
  (root / gone).rename(root / "away")
  problem, = sources.check(experiment(root, "ade20k", train_split="training",
                                      eval_split="validation"), files=True)
  assert problem.startswith(f"config.data.{key}: {root} has no folder '{gone}'")
  if key == "train_split":
    assert not list(sources.check(
        experiment(root, "ade20k", train_split="training",
                   eval_split="validation"), files=True, train=False))


def test_another_number_of_classes_is_an_error(tree):
  problem, = sources.check(experiment(tree, "ade20k", 151), files=True)
  assert problem == (
      "config.task.num_classes: 151, but the training data has 150 classes; "
      "set it to 150, or to None")


@pytest.mark.parametrize("source", ["ade20k", "label_maps", "array_record"])
def test_classification_needs_classes_of_images(tree, source):
  cfg = schema.Experiment(data=data(tree, source))
  problem, = sources.check(cfg, files=True)
  labels = "pixel or object" if source == "array_record" else "pixel"
  assert problem == (
      f"config.data.source: {source} has a label for each {labels}, but "
      "classification needs one for each image; valid: digits, folder, idx, "
      "tfds")


@pytest.mark.parametrize("source", ["digits", "folder", "idx", "tfds"])
def test_segmentation_needs_classes_of_pixels(tree, source):
  problem, = sources.check(experiment(tree, source), files=True)
  assert problem.startswith(
      f"config.data.source: {source} has a label for each image, but "
      "segmentation needs one for each pixel; valid: ade20k, ")


# Numbered as another data set's classes.


def test_classes_are_renumbered_by_their_names(tmp_path):
  write(tmp_path, "images/train/a.jpg", "annotations/train/a.png")
  (tmp_path / "classes.txt").write_text("cat\ndog\nmouse\n")
  (tmp_path / "annotations/train/a.png").write_bytes(image_files.encode(
      np.array([[0, 1, 2], [3, 255, 1]], np.uint8)))
  wanted = ("bird", "mouse", "dog", "cat")
  source = sources.create(data(tmp_path), "train", names=wanted)
  assert source.n_classes == 4 and source.sizes().tolist() == [[2, 3]]
  transform = segmentation.EvalTransform(schema.Data(), section.Segmentation(
      num_classes=4, reduce_zero_label=True, scale=(32, 32)))
  got = transform(source[0])["label"][:2, :3]
  # Label 1 is the cat, which now is 3.
  assert got.tolist() == [[255, 3, 2], [1, 255, 3]]
  source_files.fails(
      lambda: sources.create(data(tmp_path), "train", names=("cat", "dog")),
      "has the class 'mouse'")


# Bad examples, through the loader.


DAMAGE = {
    "cut label map": ("annotations", PNG[:50], "SyntaxError|OSError"),
    "empty label map": ("annotations", b"", "cannot identify a PNG"),
    "label map in colour": (
        "annotations", image_files.encode(Image.new("RGB", (64, 48))),
        "mode RGB has 3 values"),
    "another size": ("annotations", PNG, "the label map is 3 x 2, but the "
                     "image is 64 x 48"),
    "out of range": ("annotations", image_files.encode(
        np.full((48, 64), 151, np.uint8)), "has 151 at row 0, column 0"),
    "cut image": ("images", image_files.BAD["cut jpeg"], "OSError"),
    "no image": ("images", b"<html>", "cannot identify an image"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_bad_example_is_replaced_named_and_counted(tmp_path, caplog, name):
  """Of the first image, which is alone in its size; others do not change."""
  kind, content, reason = DAMAGE[name]
  root = ade_tree.make(tmp_path, n_train=6, n_val=6)
  given = data(root, "ade20k")
  task = section.Segmentation(num_classes=150, reduce_zero_label=True,
                              scale=(128, 64), crop_size=(32, 32),
                              eval_canvases=64)

  def batches():
    source = sources.create(given, "eval")
    sizes = source.sizes()
    chosen = framing.choose(sizes[sizes.all(1)], task)
    transform = segmentation.EvalTransform(given, task, chosen)
    evaluated = loader.Loader(source, transform, 2,
                              groups=transform.groups(sizes))
    trained = loader.Loader(
        sources.create(given, "train"),
        segmentation.TrainTransform(given, task), 6, seed=3)
    train = trained.train_batches(0)
    first = next(train)
    train.close()
    return first, list(evaluated.eval_batches())

  before, evaluation_before = batches()
  for split, stem in (("training", "train"), ("validation", "val")):
    folder = root / kind / split
    file = next(folder.glob(f"ADE_{stem}_00000001.*"))
    file.write_bytes(content)
  with caplog.at_level(logging.WARNING):
    after, evaluation = batches()
  messages = [r.getMessage() for r in caplog.records]
  assert len(messages) == 2 and all("00000001.jpg" in m for m in messages)
  assert any("another example replaces it" in m for m in messages)
  assert any("evaluation leaves it out" in m for m in messages)
  assert all(re.search(reason, m) for m in messages), messages
  assert after["replaced"].sum() == 1
  kept = ~after["replaced"]
  for key in ("image", "label", "size"):
    np.testing.assert_array_equal(after[key][kept], before[key][kept])
  assert sum(b["replaced"].sum() for b in evaluation) == 1
  assert sum(b["mask"].sum() for b in evaluation) == 5
  assert sum(b["mask"].sum() for b in evaluation_before) == 6
  for batch in evaluation:
    assert not (batch["mask"] & batch["replaced"]).any()
    assert (batch["label"][~batch["mask"]] == section.IGNORE).all()


def test_the_folder_of_label_maps_may_be_a_file(tmp_path):
  write(tmp_path, "images/train/a.jpg", "images/val/a.jpg")
  (tmp_path / "annotations").touch()
  problem, *_ = sources.check(experiment(tmp_path), files=True)
  assert "has no folder" in problem
  assert label_maps.splits(data(tmp_path)).train[0].name == "train"
