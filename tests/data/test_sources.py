"""All sources: checks of the config, opening, pickling."""

import os
import pickle

import numpy as np
import pytest
from source_files import folder_source, named, records, write, write_mnist

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import arrays


def test_create_opens_the_split_that_the_config_names(tmp_path):
  write_mnist(tmp_path)
  data = schema.Data
  assert len(sources.create(data(source="digits"), "train")) == 1500
  assert len(sources.create(data(source="digits"), "eval")) == 297
  cfg = data(source="idx", path=str(tmp_path))
  assert len(sources.create(cfg, "train")) == 7
  assert len(sources.create(cfg, "eval")) == 2
  write(tmp_path / "fit", "a/1.jpg", "a/2.jpg", "b/3.jpg")
  write(tmp_path / "held out", "b/4.jpg")
  kw = {"train_split": "fit", "eval_split": "held out"}
  assert len(folder_source(tmp_path, "train", **kw)) == 3
  assert named(folder_source(tmp_path, "eval", **kw)) == [("b/4.jpg", 1)]
  with pytest.raises(errors.ConfigError, match="there is no module 'no_such"):
    sources.create(data(source="no_such_module:Zip"), "train")


def test_a_pickled_source_is_the_same_source(tmp_path):
  write_mnist(tmp_path)
  write(tmp_path / "train", "b/y.jpg", "b/a/x.jpg", "a/1/2/3.jpg")
  for source in (arrays.digits(False), arrays.idx(str(tmp_path), True),
                 folder_source(tmp_path)):
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.n_classes) == (len(source), source.n_classes)
    for one, other in zip(records(source), records(copy), strict=True):
      np.testing.assert_equal(other, one)


# Checks.


class NoClasses(tasks.Task):
  """A section of a task that has no classes."""

  MEASURES = (tasks.Measure("error", False),)


def check(task=None, files=True, **kw):
  task = task or tasks.Classification(num_classes=10)
  cfg = schema.Experiment(task=task, data=schema.Data(**kw))
  return list(sources.check(cfg, files))


@pytest.fixture
def folder(tmp_path):
  """Two classes in train/ and val/, more in big/, and a folder with none."""
  write(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg",
        "val/.cache/1.jpg", "empty/.cache/1.jpg", "a file",
        *(f"big/{i}/1.jpg" for i in range(11)))
  return tmp_path


def test_a_valid_experiment_has_no_mistakes(folder):
  (folder / "idx").mkdir()
  write_mnist(folder / "idx")
  assert check(source="digits") == []
  two = tasks.Classification(num_classes=2)
  assert check(two, source="folder", path=str(folder)) == []
  assert check(source="idx", path=str(folder / "idx")) == []
  for path in (None, str(folder)):
    assert check(source="tfds", name="imagenet2012", path=path) == []


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("source, line", [
    ("folder", "config.data.path: {!r} with source folder; give the folder "
     "that holds train/ and val/"),
    ("idx", "config.data.path: {!r} with source idx; give the folder with the "
     "four files of MNIST or Fashion-MNIST")])
def test_a_missing_path_is_a_line_with_files_or_without(source, line, files):
  for path in (None, ""):
    assert check(source=source, path=path, files=files) == [line.format(path)]


@pytest.mark.parametrize("files", [True, False])
def test_tfds_needs_a_name(files):
  for name in (None, ""):
    line, = check(source="tfds", name=name, files=files)
    assert line.startswith(f"config.data.name: {name!r} with source tfds; ")


@pytest.mark.parametrize("source", ["folder", "idx", "tfds", "digits"])
def test_a_path_that_is_not_a_folder_is_a_line(folder, source):
  kw = {"source": source, "name": "mnist"}
  for path, hint in (("trian", f" (in {folder}; did you mean train?)"),
                     ("trian/a", f" (in {folder}; did you mean train?)"),
                     ("train/a/b", f"; {folder}/train/a has no folders"),
                     ("a file", f" (in {folder}; valid: big, empty, train, ")):
    line, = check(path=f"{folder}/{path}", **kw)
    assert line.startswith(f"config.data.path: {folder}/{path} is not a folder"
                           f"{hint}"), line
    assert check(path=f"{folder}/{path}", files=False, **kw) == []
  line, = check(path="~no-such-user/x", **kw)
  assert line.startswith("config.data.path: ~no-such-user/x: ")
  line, = check(path=f"/{'x' * 300}/y", **kw)
  assert line.startswith("config.data.path: /xxx")


@pytest.mark.parametrize("source", ["folder", "idx", "digits"])
def test_a_url_is_not_a_local_folder(source):
  assert check(source=source, path="gs://bucket/data") == [
      "config.data.path: gs://bucket/data is not a local folder, which source "
      f"{source} needs; mount the bucket, as launch/tpu_vm.py does, or copy "
      "the data to this machine by tools.prepare --stage"]
  assert check(source=source, path="gs://bucket/data", files=False) == []


def test_missing_splits_are_named_with_the_nearest_folder(folder):
  kw = {"source": "folder", "path": str(folder)}
  assert check(train_split="trian", eval_split="vall", **kw) == [
      f"config.data.train_split: {folder} has no folder 'trian' (in {folder}; "
      "did you mean train?)",
      f"config.data.eval_split: {folder} has no folder 'vall' (in {folder}; "
      "did you mean val?)"]
  two = tasks.Classification(num_classes=2)
  assert check(two, eval_split="empty", **kw) == [
      f"config.data.path: {folder / 'empty'} has no class folders"]


def test_missing_idx_files_are_named(tmp_path):
  write_mnist(tmp_path)
  (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
  (tmp_path / "t10k-images-idx3-ubyte").unlink()
  assert check(source="idx", path=str(tmp_path)) == [
      f"config.data.path: {tmp_path} has no {name}[.gz]"
      for name in ("train-labels-idx1-ubyte", "t10k-images-idx3-ubyte")]


def test_fashion_mnist_names_its_package(tmp_path):
  line, = check(source="idx", path=str(tmp_path / "fashion-mnist"))
  assert line.endswith(
      "is not a folder; install Debian's package dataset-fashion-mnist")


@pytest.mark.parametrize("n", [10, 12, 1000])
def test_another_number_of_classes_is_a_line(folder, n):
  kw = {"source": "folder", "path": str(folder), "train_split": "big"}
  assert check(tasks.Classification(num_classes=n), **kw) == [
      f"config.task.num_classes: {n}, but the training data has 11 classes; "
      "set it to 11, or to None"]
  for fits in (11, None):
    assert check(tasks.Classification(num_classes=fits), **kw) == []
  assert check(tasks.Classification(num_classes=9), source="digits",
               files=False) == [
      "config.task.num_classes: 9, but the training data has 10 classes; set "
      "it to 10, or to None"]


def test_a_task_without_classes_takes_any_number_of_them(folder):
  task = NoClasses(name="none")
  assert task.num_classes is None
  assert check(task, source="digits") == []
  assert check(task, source="folder", path=str(folder),
               train_split="big") == []


def test_a_source_that_cannot_be_read_is_a_line(folder, monkeypatch):
  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", refuse)
  line, = check(source="folder", path=str(folder))
  assert line.startswith(f"config.data.path: {folder}: [Errno 13]"), line
