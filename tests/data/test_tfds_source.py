"""Data sets that TFDS prepared: both formats, read without TensorFlow.

The data set is TFDS' own imagenet2012, prepared once from archives with the
names and layout of the official ones.
"""

import json
import pathlib
import pickle
import shutil
import struct

import numpy as np
import preprocessing
import pytest
import tiny_imagenet
from source_files import fails, records

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader, sources
from metaformer_jax.data.sources import tfds as tfds_source
from metaformer_jax.data.transforms import classification as transforms

FORMATS = tiny_imagenet.FORMATS
INSIDE = pathlib.Path("imagenet2012", "5.1.0")
N_TRAIN = len(tiny_imagenet.SYNSETS) * tiny_imagenet.N_TRAIN


@pytest.fixture(scope="session")
def prepared(tfds_data):
  return tfds_data


@pytest.fixture(params=FORMATS)
def data_dir(request, prepared):
  return prepared[request.param]


@pytest.fixture
def copied(data_dir, tmp_path):
  """A copy that a test may damage: (data_dir, folder of the files)."""
  shutil.copytree(data_dir, tmp_path / "copy")
  return tmp_path / "copy", tmp_path / "copy" / INSIDE


def evaluation(side):
  return preprocessing.made(
      transforms.EvalTransform,
      schema.Data(), tasks.Classification(image_size=side))


def create(data_dir, split=None, *, train=True, name="imagenet2012"):
  return tfds_source.create(name, str(data_dir), split, train)


def pairs(source):
  """[(bytes, label)] in the source's order."""
  return [(r["image"], r["label"]) for r in records(source)]


# What is read.


@pytest.mark.slow
def test_train_records_are_the_archives_images(data_dir):
  source = create(data_dir)
  assert len(source) == N_TRAIN == 12 and source.n_classes == 1000
  got = records(source)
  assert sorted((r["image"], r["label"]) for r in got) == sorted(
      (data, tiny_imagenet.SYNSETS.index(synset))
      for synset, _, data in tiny_imagenet.train_images())
  assert all(type(r["image"]) is bytes and type(r["label"]) is int
             for r in got)
  # Bad images are reported by it.
  names = {data: name for _, name, data in tiny_imagenet.train_images()}
  assert [r["path"] for r in got] == [names[r["image"]] for r in got]


def test_eval_records_have_the_official_labels(data_dir):
  import tensorflow_datasets as tfds  # noqa: PLC0415  After importorskip.

  texts = pathlib.Path(tfds.__file__).parent / "datasets" / "imagenet2012"
  classes = (texts / "labels.txt").read_text().split()
  answers = (texts / "validation_labels.txt").read_text().split()
  expected = {data: classes.index(answers[i]) for i, (_, data) in
              enumerate(tiny_imagenet.val_images())}
  source = create(data_dir, train=False)  # "validation", as there is one.
  assert len(source) == tiny_imagenet.N_VAL
  assert dict(pairs(source)) == expected
  assert source.fingerprint() != create(data_dir).fingerprint()  # Other files.


def test_both_formats_hold_the_same_records(prepared):
  for train in (True, False):
    one, other = (sorted(pairs(create(prepared[f], train=train)))
                  for f in FORMATS)
    assert one == other


@pytest.mark.parametrize("split, part", [
    ("train[:50%]", slice(0, 6)), ("train[50%:]", slice(6, 12)),
    ("train[3:7]", slice(3, 7)), ("train[-2:]", slice(10, 12)),
    ("train[4:5]", slice(4, 5)),
])
def test_a_sub_split_is_that_part_in_order(data_dir, split, part):
  whole = pairs(create(data_dir))
  assert pairs(create(data_dir, split)) == whole[part]


def test_a_split_that_ends_before_it_starts_is_empty(data_dir):
  fails(lambda: create(data_dir, "train[7:3]"), "train[7:3]", "empty")


def reshard(folder, sizes):
  """Spreads the one shard of the training split over shards of `sizes`."""
  info_file = folder / "dataset_info.json"
  info = json.loads(info_file.read_text())
  kind = info["fileFormat"]
  old = folder / f"imagenet2012-train.{kind}-00000-of-00001"
  if kind == "tfrecord":
    data, found = old.read_bytes(), []
    while data:
      end = 16 + struct.unpack("<Q", data[:8])[0]
      found.append(data[:end])
      data = data[end:]
  else:
    from array_record.python import array_record_module  # noqa: PLC0415
    reader = array_record_module.ArrayRecordReader(str(old))
    found = reader.read_all()
    reader.close()
  assert len(found) == sum(sizes)
  old.unlink()
  for i, size in enumerate(sizes):
    path = folder / (
        f"imagenet2012-train.{kind}-{i:05d}-of-{len(sizes):05d}")
    if kind == "tfrecord":
      path.write_bytes(b"".join(found[:size]))
    else:
      writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
      for record in found[:size]:
        writer.write(record)
      writer.close()
    found = found[size:]
  info["splits"][0]["shardLengths"] = [str(size) for size in sizes]
  info_file.write_text(json.dumps(info))


def test_records_of_many_shards_follow_each_other(data_dir, copied):
  whole = pairs(create(data_dir))
  reshard(copied[1], (5, 1, 4, 2))
  source = create(copied[0])
  assert pairs(source) == whole
  assert pairs(create(copied[0], "train[3:7]")) == whole[3:7]
  assert pairs(create(copied[0], "train[6:10]")) == whole[6:10]
  assert pairs(create(copied[0], "train[9:]+train[:6]+validation[1:3]")) == (
      whole[9:] + whole[:6] + pairs(create(data_dir, train=False))[1:3])
  for i in (11, 0, 6, 5, 9, 10):  # In any order, as in a shuffled epoch.
    assert (source[i]["image"], source[i]["label"]) == whole[i]


def test_a_source_can_be_pickled_before_and_after_reading(data_dir):
  source = create(data_dir, "train[3:9]")
  fresh = pickle.loads(pickle.dumps(source))
  expected = pairs(source)
  used = pickle.loads(pickle.dumps(source))
  for copy in (fresh, used):
    assert (len(copy), copy.n_classes) == (6, 1000)
    assert pairs(copy) == expected


def test_sources_create_takes_it_from_the_config(data_dir, monkeypatch):
  monkeypatch.setenv("HOME", str(data_dir.parent))
  cfg = schema.Data(source="tfds", name="imagenet2012",
                    path=f"~/{data_dir.name}", train_split="train[:5]")
  whole = pairs(create(data_dir))
  assert pairs(sources.create(cfg, "train")) == whole[:5]
  assert pairs(sources.create(cfg, "eval")) == pairs(
      create(data_dir, train=False))


@pytest.mark.parametrize("workers, threads", [(0, 4), (1, 2)])
def test_the_loader_reads_it_in_threads_and_workers(data_dir, workers,
                                                    threads):
  transform = evaluation(16)
  source = create(data_dir)
  expected = [transform(r) for r in records(source)]
  batches = list(loader.Loader(source, transform, 4, workers=workers,
                               threads=threads).eval_batches())
  assert len(batches) == 3
  for key in ("image", "label"):
    np.testing.assert_array_equal(
        np.concatenate([b[key] for b in batches]),
        np.stack([e[key] for e in expected]))


# Without TensorFlow; "hide" imitates that it is not installed.

READ_ALL = f"""
import importlib.machinery as machinery
import sys
import warnings


class NoTensorFlow(machinery.PathFinder):
  @classmethod
  def find_spec(cls, name, path=None, target=None):
    if name.split(".")[0] == "tensorflow":
      return None
    return machinery.PathFinder.find_spec(name, path, target)


if "hide" in sys.argv:
  sys.meta_path = [NoTensorFlow if f is machinery.PathFinder else f
                   for f in sys.meta_path]
warnings.simplefilter("error")
from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data.sources import tfds
from metaformer_jax.data.transforms import classification
transform = classification.EvalTransform(
    schema.Data(mean=(0.5,) * 3), tasks.Classification(
        image_size=8, crop_pct=0.9, interpolation="bicubic"))
total = 0
for data_dir in sys.argv[1:1 + {len(FORMATS)}]:
  source = tfds.create("imagenet2012", data_dir, None, True)
  total += sum(int(transform(source[i])["image"].sum(dtype=int))
               for i in range(len(source)))
for name in sys.argv[2 + {len(FORMATS)}:]:
  try:
    tfds.create(name, sys.argv[1], None, True)
  except errors.ConfigError as e:
    print(e)
print(total, any(m.split(".")[0] == "tensorflow" for m in sys.modules))
"""


@pytest.mark.parametrize("installed", ["installed", "hide"])
def test_reading_imports_no_tensorflow(prepared, installed):
  out = tiny_imagenet.python("-c", READ_ALL, *map(str, prepared.values()),
                             installed)
  transform = evaluation(8)
  total = 2 * sum(
      int(transform({"image": data, "label": 0})["image"].sum(dtype=int))
      for _, _, data in tiny_imagenet.train_images())
  assert out.split() == [str(total), "False"]


def test_an_unknown_name_needs_no_tensorflow(prepared):
  out = tiny_imagenet.python("-c", READ_ALL, *map(str, prepared.values()),
                             "hide", "imagenet2013")
  *message, last = out.splitlines()
  assert message == ["config.data.name: TFDS has no data set 'imagenet2013'; "
                     "did you mean imagenet2012?"]
  assert last.endswith("False")


# Mistakes are reported in one line.


@pytest.mark.parametrize("split, parts", [
    ("trian", ["did you mean train?"]),
    ("validaton[:10]", ["did you mean validation?"]),
    ("test", ["valid: train, validation"]),
    ("train[:50%", ["did you mean train?"]),
    ("train[a:b]", []), ("train[::2]", []), ("train[0:99]", []),
    ("train[:200%]", []), ("", []), ("train[3:3]", ["empty"]),
])
def test_an_unknown_or_empty_split_is_an_error(data_dir, split, parts):
  fails(lambda: create(data_dir, split), "config.data.train_split",
        repr(split), "imagenet2012", *parts)
  fails(lambda: create(data_dir, split, train=False),
        "config.data.eval_split", repr(split))


@pytest.mark.parametrize("name", ["imagenet2012", "imagenet2012:5.0.0",
                                  "mnist"])
def test_a_data_set_that_is_not_prepared_is_an_error(prepared, tmp_path, name):
  fails(lambda: create(tmp_path, name=name), "config.data.path",
        tmp_path / name.split(":")[0], f"tfds build {name}",
        f"--data_dir={tmp_path}")


@pytest.mark.parametrize("name", [
    "imagenet2012:9.9.9", "imagenet2012/no_config", "my data", "a/b/c/d"])
def test_a_name_that_tfds_refuses_is_an_error(prepared, name):
  fails(lambda: create(prepared["tfrecord"], name=name), "config.data.name",
        name)


def damage_file(file, kind):
  change = DAMAGE[kind][0]
  if change:
    file.write_bytes(change(file.read_bytes()))
  else:
    file.unlink()


DAMAGE = {
    "half": (lambda d: d[:len(d) // 2], "is truncated"),
    "last byte": (lambda d: d[:-1], "is truncated"),
    "in the next header": (lambda d: d + d[:5], "is truncated"),
    "length": (lambda d: b"\xff" * 8 + d[8:], "at byte 0 differs"),
    "no records": (lambda d: b"", "holds 0 examples, not 12"),
    "twice": (lambda d: d + d, "holds 24 examples, not 12"),
    "missing": (None, "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("data_dir", ["tfrecord"], indirect=True)
def test_a_damaged_tfrecord_is_an_error(copied, kind):
  file = copied[1] / "imagenet2012-train.tfrecord-00000-of-00001"
  damage_file(file, kind)
  fails(lambda: create(copied[0]), file, DAMAGE[kind][1])
  assert len(create(copied[0], train=False)) == tiny_imagenet.N_VAL


@pytest.mark.parametrize("kind", ["half", "missing", "no records"])
@pytest.mark.parametrize("data_dir", ["array_record"], indirect=True)
def test_a_damaged_array_record_is_an_error(copied, kind):
  file = copied[1] / "imagenet2012-train.array_record-00000-of-00001"
  damage_file(file, kind)
  fails(lambda: create(copied[0]), file)


def test_a_damaged_dataset_info_is_an_error(copied):
  (copied[1] / "dataset_info.json").write_text("{")
  fails(lambda: create(copied[0]), copied[0])


@pytest.mark.parametrize("claimed", [11, 13])
def test_a_shard_of_another_length_is_an_error(copied, claimed):
  file = copied[1] / "dataset_info.json"
  info = json.loads(file.read_text())
  info["splits"][0]["shardLengths"] = [str(claimed)]
  file.write_text(json.dumps(info))
  fails(lambda: create(copied[0]), "imagenet2012-train.",
        f"holds 12 examples, not {claimed}")


def toy(prepared, data_dir, **changes):
  """A data set that TFDS has no code for: "train", "test"; changed features."""
  folder = data_dir / "toy" / "1.0.0"
  shutil.copytree(prepared["tfrecord"] / INSIDE, folder)
  for file in folder.glob("imagenet2012-*"):
    file.rename(folder / file.name.replace("imagenet2012", "toy").replace(
        "validation", "test"))
  info = json.loads((folder / "dataset_info.json").read_text())
  info |= {"name": "toy", "version": "1.0.0"}
  info["splits"][1]["name"] = "test"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  tree = json.loads((folder / "features.json").read_text())
  features = tree["featuresDict"]["features"] | changes
  tree["featuresDict"]["features"] = {k: v for k, v in features.items() if v}
  (folder / "features.json").write_text(json.dumps(tree))


SCALAR = {"pythonClassName": "tensorflow_datasets.core.features.scalar.Scalar",
          "tensor": {"shape": {}, "dtype": "int64", "encoding": "none"}}


def test_a_data_set_without_code_is_read_from_its_files(prepared, tmp_path):
  toy(prepared, tmp_path)
  for train in (True, False):  # Evaluation takes "test" without "validation".
    assert pairs(create(tmp_path, name="toy", train=train)) == pairs(
        create(prepared["tfrecord"], train=train))


@pytest.mark.parametrize("feature", ["image", "label"])
def test_a_missing_feature_is_an_error(prepared, tmp_path, feature):
  toy(prepared, tmp_path, **{feature: None})
  fails(lambda: create(tmp_path, name="toy"), "config.data.name",
        f"toy has no feature '{feature}'", "file_name")


def test_a_label_that_is_not_a_class_is_an_error(prepared, tmp_path):
  toy(prepared, tmp_path, label=SCALAR)
  fails(lambda: create(tmp_path, name="toy"), "label")
