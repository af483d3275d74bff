"""Prepared data sets: written by the tool, read by index."""

import hashlib
import itertools
import json
import logging
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import ade_tree
import numpy as np
import pytest
import source_files

from metaformer_jax import errors
from metaformer_jax.config import ade20k, schema
from metaformer_jax.config.tasks import segmentation as section
from metaformer_jax.data import loader, sources
from metaformer_jax.data.sources import label_maps
from metaformer_jax.data.transforms import framing, segmentation
from metaformer_jax.tools import prepare

N_TRAIN, N_VAL = 16, 5


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
  return ade_tree.make(tmp_path_factory.mktemp("ade"), N_TRAIN, N_VAL)


def run(source, path, output, *args):
  prepare.main(prepare.parse(
      [f"--source={source}", f"--path={path}", f"--output={output}", *args]))
  return schema.Data(source="array_record", path=str(output))


@pytest.fixture(scope="module")
def prepared(tree, tmp_path_factory):
  return run("ade20k", tree, tmp_path_factory.mktemp("x") / "ade20k",
             "--shards=3")


@pytest.fixture
def copy(prepared, tmp_path):
  """A copy that may be damaged."""
  folder = tmp_path / "copy"
  shutil.copytree(prepared.path, folder)
  return schema.Data(source="array_record", path=str(folder))


def digests(folder):
  return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()
          for path in pathlib.Path(folder).iterdir()}


# The same examples.


def test_the_records_are_those_of_the_tree(tree, prepared):
  given = schema.Data(source="ade20k", path=str(tree))
  for split, n in (("train", N_TRAIN), ("eval", N_VAL)):
    one, other = sources.create(given, split), sources.create(prepared, split)
    assert len(other) == n and other.n_classes == 150
    assert other.class_names == ade20k.CLASSES
    assert other.sizes().tolist() == one.sizes().tolist()
    for a, b in zip(source_files.records(one), source_files.records(other)):
      assert a["path"] == str(tree / b["path"])
      assert {**a, "path": ""} == {**b, "path": ""}
  assert sources.classes(prepared) == (150, ade20k.CLASSES)
  assert sources.reduces_zero_label(prepared)


def batches(data, **kw):
  """Two training batches of global size 8, and all of the evaluation."""
  task = section.Segmentation(num_classes=150, reduce_zero_label=True,
                              scale=(128, 64), crop_size=(32, 32))
  train = loader.Loader(sources.create(data, "train"),
                        segmentation.TrainTransform(data, task), 8, **kw)
  source = sources.create(data, "eval")
  transform = segmentation.EvalTransform(
      data, task, framing.choose(source.sizes(), task))
  evaluation = loader.Loader(source, transform, 2, **kw,
                             groups=transform.groups(source.sizes()))
  stream = train.train_batches(8)
  found = [*itertools.islice(stream, 2), *evaluation.eval_batches()]
  stream.close()
  return found


def test_batches_are_those_of_the_tree_bit_for_bit(tree, prepared):
  given = schema.Data(source="ade20k", path=str(tree))
  expected = batches(given)
  assert len(expected) > 3
  found = batches(prepared)
  assert len(found) == len(expected)
  for one, other in zip(expected, found):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def test_the_folder_depends_on_the_data_only(tree, prepared, tmp_path):
  """Not on where the data is, nor on when it is written."""
  moved = tmp_path / "elsewhere"
  shutil.copytree(tree, moved / "ADEChallengeData2016")
  run("ade20k", moved / "ADEChallengeData2016", tmp_path / "o", "--shards=3")
  assert digests(tmp_path / "o") == digests(prepared.path)
  assert sorted(digests(prepared.path)) == sorted(
      [*(f"{split}-{i:05}-of-00003.array_record" for split in ("train", "val")
         for i in range(3)), "train.json", "val.json"])


def test_a_source_can_be_pickled_before_and_after_it_was_read(prepared):
  source = sources.create(prepared, "train")
  before = pickle.dumps(source)
  record = source[9]
  for data in (before, pickle.dumps(source)):
    assert pickle.loads(data)[9] == record


def test_label_maps_keep_their_names_and_zero_label(tmp_path):
  root = ade_tree.make(tmp_path, 3, 1)
  (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(150)))
  given = run("label_maps", root, tmp_path / "o", "--reduce_zero_label")
  assert sources.reduces_zero_label(given)
  assert sources.classes(given).names[7] == "class 7"
  # More files than examples would be empty ones.
  assert sum(name.endswith(".array_record") for name in os.listdir(
      tmp_path / "o")) == 4
  (root / "classes.txt").unlink()
  given = run("label_maps", root, tmp_path / "p", "--shards=1")
  assert sources.classes(given) == (None, None)
  assert not sources.reduces_zero_label(given)


def test_names_of_any_bytes_are_kept(tmp_path):
  root = ade_tree.make(tmp_path, 1, 1)
  odd = os.fsdecode(b"\xff\xfe")
  for kind, suffix in (("images", "jpg"), ("annotations", "png")):
    folder = root / kind / "training"
    (folder / f"ADE_train_00000001.{suffix}").rename(folder / f"{odd}.{suffix}")
  given = run("ade20k", root, tmp_path / "o")
  path = sources.create(given, "train")[0]["path"]
  assert path == f"images/training/{odd}.jpg"


def test_without_an_evaluation_split_there_is_one_split(tmp_path, caplog):
  root = ade_tree.make(tmp_path, 2, 1)
  for kind in ("images", "annotations"):
    shutil.rmtree(root / kind / "validation")
  with caplog.at_level(logging.WARNING):
    given = run("ade20k", root, tmp_path / "o")
  assert "there is no evaluation split" in caplog.text
  assert len(sources.create(given, "train")) == 2
  source_files.fails(lambda: sources.create(given, "eval"),
                     "val.json: does not exist")


# Bad examples.


@pytest.fixture
def damaged(tmp_path):
  """A tree of which two training examples are bad."""
  root = ade_tree.make(tmp_path, 6, 2)
  training = root / "annotations" / "training"
  (training / "ADE_train_00000002.png").write_bytes(b"")
  (root / "images/training/ADE_train_00000005.jpg").unlink()
  (root / "images/training/ADE_train_00000005.jpg").mkdir()
  (root / "images/training/ADE_train_00000005.jpg").rmdir()
  (root / "images/training/ADE_train_00000005.jpg").symlink_to("nowhere")
  return root


def test_bad_examples_are_named_and_nothing_is_written(damaged, tmp_path,
                                                       caplog):
  with caplog.at_level(logging.WARNING), pytest.raises(
      errors.DataError, match=r"^2 of 6 examples of train cannot be used, and "
      r"nothing was written; .*--skip_bad$") as caught:
    run("ade20k", damaged, tmp_path / "o")
  assert caught.value.exit_code == 1
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == 2 and all("\n" not in line for line in lines)
  assert "ADE_train_00000002.jpg: UnidentifiedImageError" in lines[0]
  assert "ADE_train_00000005.jpg: FileNotFoundError" in lines[1]
  assert os.listdir(tmp_path) == ["ADEChallengeData2016"]


def test_bad_examples_can_be_left_out(damaged, tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    given = run("ade20k", damaged, tmp_path / "o", "--skip_bad", "--shards=2")
  assert "train: 4 examples in 2 files, 2 left out" in caplog.text
  names = [record["path"][-5] for record in source_files.records(
      sources.create(given, "train"))]
  assert names == ["1", "3", "4", "6"]
  assert sources.create(given, "train").sizes().tolist() == [
      list(ade_tree.SIZES[i]) for i in (0, 2, 3, 5)]


def test_no_more_than_ten_bad_examples_are_named(tmp_path, caplog):
  root = ade_tree.make(tmp_path, 14, 1)
  for path in (root / "annotations" / "training").iterdir():
    path.write_bytes(b"")
  with caplog.at_level(logging.WARNING), pytest.raises(
      errors.DataError, match="no example of train can be used"):
    run("ade20k", root, tmp_path / "o", "--skip_bad")
  assert len(caplog.records) == 11
  assert not (tmp_path / "o").exists()


# The output.


def test_an_output_that_is_in_use_is_refused(tree, tmp_path):
  (tmp_path / "o").mkdir()
  run("ade20k", tree, tmp_path / "o", "--shards=1")  # It was empty.
  before = digests(tmp_path / "o")
  source_files.fails(lambda: run("ade20k", tree, tmp_path / "o"),
                     "--output: ", "is not an empty folder")
  assert digests(tmp_path / "o") == before
  source_files.fails(lambda: run("ade20k", tree, tree / "images/training/"
                                 "ADE_train_00000001.jpg"), "--output: ")


@pytest.mark.parametrize("args, part", [
    (["--source=ade20k", "--path=nowhere", "--output=o"], "--path: nowhere"),
    (["--source=ade20k", "--path=.", "--output=o"],
     "--train_split: . has no folder 'images/train'"),
    (["--source=tfds", "--path=.", "--output=o"], "--source"),
    (["--source=ade20k", "--path=.", "--output=o", "--shards=0"], "--shards"),
    (["--source=ade20k", "--path=.", "--output=o", "--shards=x"], "--shards"),
    (["--source=ade20k", "--path=s3://x/y", "--output=o"], "s3://x/y"),
    (["--path=.", "--output=o"], "--source")])
def test_a_wrong_command_line_is_one_line(tmp_path, monkeypatch, args, part):
  monkeypatch.chdir(tmp_path)
  source_files.fails(lambda: prepare.main(prepare.parse(args)), part)
  assert os.listdir(tmp_path) == []


def test_a_killed_run_leaves_nothing_that_looks_whole(tmp_path):
  """Killed while it writes; a second run is as if there had been none."""
  root = ade_tree.make(tmp_path, 300, 5)
  output = tmp_path / "o"
  command = [sys.executable, "-m", "metaformer_jax.tools.prepare",
             "--source=ade20k", f"--path={root}", f"--output={output}",
             "--shards=100"]
  environment = os.environ | {
      "PYTHONPATH": str(pathlib.Path(prepare.__file__).parents[2])}
  process = subprocess.Popen(command, env=environment,
                             stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while not (written := list(tmp_path.glob(".o.*/train-0001*"))):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.005)
  process.kill()
  process.wait()
  assert written and not output.exists()
  assert not list(tmp_path.glob(".o.*/train.json"))
  given = run("ade20k", root, output, "--shards=2")
  assert len(sources.create(given, "train")) == 300


# Damage.


def edit(data, split="train", **changes):
  """Changes the index; None removes a key."""
  path = pathlib.Path(data.path) / f"{split}.json"
  tree = json.loads(path.read_text()) | changes
  path.write_text(json.dumps({k: v for k, v in tree.items() if v != "gone"}))


def problems(data):
  cfg = schema.Experiment(task=section.Segmentation(), data=data)
  return list(sources.check(cfg, files=True))


@pytest.mark.parametrize("changes, part", [
    ({"version": 2}, "has version 2 of the format, not 1"),
    ({"version": "gone"}, "has version None"),
    ({"sizes": "gone"}, "missing 1 required"),
    ({"more": 1}, "unexpected keyword argument 'more'"),
    ({"records": "boxes"}, "records has another form"),
    ({"shards": [8, 8]}, "train-00000-of-00002.array_record: cannot be read"),
    ({"shards": [5, 5, 5]}, "16 sizes of 15 images"),
    ({"shards": [5, 6, 5]}, "holds 5 examples, not 6; prepare the data set"),
    ({"shards": []}, "shards has another form"),
    ({"shards": [16.0]}, "shards has another form"),
    ({"class_names": [1]}, "class_names has another form"),
    ({"reduce_zero_label": 1}, "reduce_zero_label has another form"),
    ({"sizes": [[1]] * 16}, "sizes has another form"),
    ({"sizes": [[0, 5]] * 16}, "sizes has another form")])
def test_an_index_of_another_form_is_one_line(copy, changes, part):
  if changes.get("shards") == [5, 6, 5]:
    assert json.loads((pathlib.Path(copy.path) / "train.json").read_text())[
        "shards"] == [5, 5, 6]
  edit(copy, **changes)
  source_files.fails(lambda: sources.create(copy, "train"), part)
  found, = problems(copy)
  assert part in found and "\n" not in found


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"1" * 5000,
                                     b'{"version": 1, "version": 1}'])
def test_a_damaged_index_is_one_line(copy, content):
  (pathlib.Path(copy.path) / "train.json").write_bytes(content)
  source_files.fails(lambda: sources.create(copy, "train"),
                     "train.json: is not the index of a prepared data set")
  assert len(problems(copy)) == 1


@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:70_000]),
    lambda path: path.write_bytes(b"x" * 131_072)])
def test_a_damaged_file_is_one_line(copy, damage):
  path = pathlib.Path(copy.path) / "val-00001-of-00003.array_record"
  damage(path)
  source_files.fails(lambda: sources.create(copy, "eval"), path.name)
  found, = problems(copy)
  assert path.name in found
  assert len(sources.create(copy, "train")) == N_TRAIN


def test_a_damaged_record_is_a_bad_example(copy, caplog):
  source = sources.create(copy, "train")
  wanted = source[2]["image"][-50:]
  path = pathlib.Path(copy.path) / "train-00000-of-00003.array_record"
  content = path.read_bytes()
  assert content.count(wanted) == 1
  path.write_bytes(content.replace(wanted, wanted[::-1]))
  task = section.Segmentation(num_classes=150, reduce_zero_label=True,
                              scale=(64, 32), crop_size=(32, 32))
  made = loader.Loader(sources.create(copy, "train"),
                       segmentation.TrainTransform(copy, task), N_TRAIN)
  stream = made.train_batches(0)
  with caplog.at_level(logging.WARNING):
    batch = next(stream)
  stream.close()
  assert batch["replaced"].sum() == 1
  assert "example 2" in caplog.text and "mismatch" in caplog.text


def test_a_folder_that_was_not_prepared_is_one_line(tree):
  given = schema.Data(source="array_record", path=str(tree))
  found, = problems(given)
  assert "tools.prepare" in found and "train.json: does not exist" in found
  missing, = problems(schema.Data(source="array_record", path="nowhere"))
  assert "nowhere is not a folder" in missing


def test_another_number_of_classes_is_an_error(prepared):
  cfg = schema.Experiment(task=section.Segmentation(num_classes=7),
                          data=prepared)
  found, = sources.check(cfg, files=True)
  assert "7, but the training data has 150 classes" in found
  assert problems(prepared) == []


def test_the_tool_needs_no_more_memory_than_a_few_examples(tree, tmp_path):
  """Records are made as the files are written, not before."""
  data = schema.Data(source="ade20k", path=str(tree))
  source = label_maps.create(data, train=True)
  read = []

  class Watched:
    n_classes, class_names = source.n_classes, source.class_names

    def __len__(self):
      return 640

    def __getitem__(self, index):
      read.append(index)
      return source[index % N_TRAIN]

  split = prepare._LabelMaps(Watched(), data, reduce_zero_label=True)
  shards = split.shards(2)
  next(next(shards))
  assert len(read) <= 2 * prepare._AT_ONCE
