"""Fingerprints of data sets: what changes them, and what does not."""

import json
import os
import pathlib
import shutil

import ade_tree
import coco_tree
import numpy as np
import pytest
import source_files
from source_files import write

from metaformer_jax.config import comparison, schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import base, fingerprints, real_labels
from metaformer_jax.tools import prepare

FOLDER = [f"{split}/{name}/{i}.png" for split in ("train", "val")
          for name in ("cat", "dog") for i in range(4)]


def prepared(source, tree, output):
  prepare.main(prepare.parse([f"--source={source}", f"--path={tree}",
                              f"--output={output}", "--shards=2"]))
  return output


def make(kind, folder):
  """A small data set of each kind that is on disk: its section."""
  match kind:
    case "folder":
      write(folder, *FOLDER)
    case "idx":
      folder.mkdir()
      source_files.write_mnist(folder)
    case "ade20k":
      folder = ade_tree.make(folder, n_train=4, n_val=2)
    case "coco":
      folder = coco_tree.make(folder, n_train=4, n_val=2)
    case "array_record_of_maps":
      folder = prepared("ade20k", ade_tree.make(folder, n_train=4, n_val=2),
                        folder / "out")
    case "array_record_of_objects":
      folder = prepared("coco", coco_tree.make(folder, n_train=4, n_val=2),
                        folder / "out")
  return schema.Data(source=kind.partition("_of_")[0], path=str(folder))


def print_of(data, split="train"):
  """A split's fingerprint, as a checkpoint gives it back."""
  task = tasks.Detection() if "coco" in data.source or (
      pathlib.Path(data.path or "", "train2017.safetensors").exists()
  ) else None
  found = fingerprints.of(sources.create(data, split, task=task))
  assert json.loads(json.dumps(found)) == found
  return found


KINDS = ["folder", "idx", "ade20k", "coco", "array_record_of_maps",
         "array_record_of_objects"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("made")
  return {kind: make(kind, root / kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_elsewhere_has_the_same_and_splits_do_not(made, kind, tmp_path):
  data = made[kind]
  copy = tmp_path / "elsewhere" / pathlib.Path(data.path).name
  shutil.copytree(data.path, copy)
  moved = schema.Data(source=data.source, path=str(copy))
  for split in ("train", "eval"):
    assert print_of(moved, split) == print_of(data, split)
  assert print_of(data, "eval") != print_of(data)
  assert set(print_of(data)) > {"number of examples", "classes"}


@pytest.mark.parametrize("kind", KINDS)
def test_any_file_that_changes_its_size_is_seen(made, kind, tmp_path):
  """Random files, one after the other, of those that the split is read from."""
  rng = np.random.default_rng(KINDS.index(kind))
  copy = tmp_path / pathlib.Path(made[kind].path).name
  shutil.copytree(made[kind].path, copy)
  data = schema.Data(source=made[kind].source, path=str(copy))
  files = sorted(p for p in copy.rglob("*") if p.is_file() and (
      "train" in str(p.relative_to(copy))) and (
          p.suffix in (".png", ".jpg")))
  for path in rng.permutation(files)[:4]:
    before = print_of(data)
    with open(path, "ab") as file:
      file.write(b" ")
    assert list(comparison.between(before, print_of(data))) == [
        "other sizes of files"]


def test_changes_of_a_folder_are_told_apart(tmp_path):
  data = make("folder", tmp_path / "data")
  train = tmp_path / "data/train"

  def change(act):
    before = print_of(data)
    act()
    return list(comparison.between(before, print_of(data)))

  one_more = change(lambda: write(train, "cat/9.png"))
  assert one_more[0] == "number of examples: 8 -> 9"
  assert change(lambda: os.rename(train / "cat/9.png", train / "cat/90.png")
                ) == ["other file names"]
  assert change(lambda: os.rename(train / "cat", train / "eel"))[:2] == [
      "classes: ['cat', 'dog'] -> ['dog', 'eel']", "other file names"]
  gone = change(lambda: [p.unlink() for p in train.glob("*/[01].png")])
  assert gone[0] == "number of examples: 9 -> 5"
  assert "other file names" in gone
  # Neither the order on disk nor what the source does not read is a change.
  assert change(lambda: write(train, "dog/notes.txt", ".hidden/x")) == []


def test_changes_of_objects_and_labels_are_seen(tmp_path):
  data = make("coco", tmp_path)
  file = pathlib.Path(data.path, "annotations/instances_train2017.json")
  before, tree = print_of(data), json.loads(file.read_text())
  tree["annotations"][0]["bbox"][0] += 1
  file.write_text(json.dumps(tree))
  assert list(comparison.between(before, print_of(data))) == ["other objects"]
  tree["categories"][0]["name"] = "renamed"
  before = print_of(data)
  file.write_text(json.dumps(tree))
  text, = comparison.between(before, print_of(data))
  assert text.startswith("classes: [") and "renamed" in text


def test_arrays_have_a_digest_of_their_values(tmp_path):
  data = make("idx", tmp_path / "idx")
  before = print_of(data)
  images = np.zeros((7, 5, 3), np.uint8)
  source_files.write_idx(tmp_path / "idx", "train-images-idx3-ubyte", images,
                         gz=True)
  assert list(comparison.between(before, print_of(data))) == [
      "other images and labels"]
  for source in ("digits", "scenes"):
    data = schema.Data(source=source)
    assert print_of(data) == print_of(data) != print_of(data, "eval")


def test_sources_in_sources_have_theirs(tmp_path):
  names = [f"ILSVRC2012_val_{i:08}.JPEG" for i in (1, 2, 3)]
  write(tmp_path, *(f"val/cat/{name}" for name in names))
  source = sources.folders.ClassFolders(tmp_path / "val", ["cat"])
  own = fingerprints.of(source)
  for labels in ([[0], [0], []], [[0], [], []]):
    (tmp_path / "real.json").write_text(json.dumps(labels))
    found = fingerprints.of(real_labels.RealLabels(
        source, str(tmp_path / "real.json"), 1))
    assert own.items() <= found.items() and len(found) == len(own) + 1

  class Named:
    n_classes, class_names = 2, ("cat", "dog")

    def __len__(self):
      return 3

    def fingerprint(self):
      return {"date": "today"}

  other = base.renumbered(Named(), ("dog", "cat", "eel"))
  assert fingerprints.of(other) == fingerprints.of(Named()) == {
      "number of examples": 3, "classes": ["cat", "dog"], "date": "today"}


def test_a_source_of_the_users_own_needs_no_method():
  class Bare:
    n_classes = np.int64(5)

    def __len__(self):
      return 12

  assert fingerprints.of(Bare()) == {"number of examples": 12, "classes": 5}
  Bare.n_classes = None
  assert fingerprints.of(Bare()) == {"number of examples": 12, "classes": None}


def test_of_many_files_the_sizes_of_some_are_read(monkeypatch, tmp_path):
  """The same ones each time, spread over all; others may change."""
  monkeypatch.setattr(fingerprints, "_SIZED", 20)
  names = [f"{i}".encode() for i in range(100)]
  for i, name in enumerate(names):
    (tmp_path / name.decode()).write_bytes(b"x" * i)
  parts = ((str(tmp_path), names[:30]), (str(tmp_path), names[30:]))
  before, seen = fingerprints.files(*parts), []
  for i, name in enumerate(names):
    (tmp_path / name.decode()).write_bytes(b"x" * (i + 1))
    after = fingerprints.files(*parts)
    assert after["file names"] == before["file names"]
    seen += [i] * (after != before)
    before = after
  assert len(seen) == 20 and seen[0] < 30 < 60 < seen[-1]
  (tmp_path / names[seen[0]].decode()).unlink()
  assert fingerprints.files(*parts) != before  # And no exception.
