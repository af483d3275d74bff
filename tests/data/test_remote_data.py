"""Data sets on gs://, against a fake server: the same examples, and what goes
wrong.
"""

import itertools
import pathlib
import pickle
import re
import sys

import ade_tree
import coco_tree
import fake_gcs
import numpy as np
import pytest
import source_files

from metaformer_jax import errors, storage
from metaformer_jax.config import schema, tasks
from metaformer_jax.config.tasks import segmentation as section
from metaformer_jax.data import loader, sources
from metaformer_jax.data.transforms import framing, segmentation
from metaformer_jax.tools import prepare

pytest.importorskip("metaformer_jax.gcs")
pytest.importorskip("gcp_storage_emulator")

N_TRAIN = 16
SHARD = "train-00001-of-00003.array_record"
MASKS = tasks.Detection(head="mask_rcnn", num_classes=3)
TASK = section.Segmentation(num_classes=150, reduce_zero_label=True,
                            scale=(128, 64), crop_size=(32, 32))


def upload(folder, name):
  """Copies a folder to the bucket; returns its URL."""
  target = storage.path(f"gs://{fake_gcs.BUCKET}/{name}")
  for path in pathlib.Path(folder).rglob("*"):
    if path.is_file():
      storage.write(target / str(path.relative_to(folder)), path.read_bytes())
  return str(target)


def made(source, tree, output):
  prepare.main(prepare.parse(
      [f"--source={source}", f"--path={tree}", f"--output={output}",
       "--shards=3"]))
  return output


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  folder = tmp_path_factory.mktemp("maps")
  return str(made("ade20k", ade_tree.make(folder, N_TRAIN, 5), folder / "o"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
  """A local folder of objects with outlines."""
  folder = tmp_path_factory.mktemp("objects")
  return made("coco", coco_tree.make(folder), folder / "o")


@pytest.fixture
def remote(cloud, local, request):
  return upload(local, re.sub(r"\W+", "_", request.node.name))


def data(path):
  return schema.Data(source="array_record", path=path)


def batches(path, start, **kw):
  """Three training batches of 8 from a position, and all of the evaluation."""
  train = loader.Loader(sources.create(data(path), "train"),
                        segmentation.TrainTransform(data(path), TASK), 8, **kw)
  source = sources.create(data(path), "eval")
  transform = segmentation.EvalTransform(
      data(path), TASK, framing.choose(source.sizes(), TASK))
  evaluation = loader.Loader(source, transform, 2, **kw,
                             groups=transform.groups(source.sizes()))
  stream = train.train_batches(start)
  found = [*itertools.islice(stream, 3), *evaluation.eval_batches()]
  stream.close()
  return found


@pytest.mark.parametrize("workers", [
    0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_are_those_of_the_local_copy(local, remote, workers):
  """Bit for bit, also of a run that resumes in the middle of an epoch."""
  expected = batches(local, 8)
  found = batches(remote, 8, workers=workers)
  assert len(found) == len(expected) > 5
  for one, other in zip(expected, found):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])
      assert not one["replaced"].any()


def test_objects_with_outlines_are_those_of_the_local_copy(cloud, objects):
  url = upload(objects, "objects")
  for split in ("train", "eval"):
    one, other = (sources.create(data(path), split, task=MASKS)
                  for path in (str(objects), url))
    for a, b in zip(source_files.records(one), source_files.records(other),
                    strict=True):
      assert repr(a) == repr(b) and a["image"] == b["image"]
      assert "segments" in a
    assert repr(one.annotations()) == repr(other.annotations())
    assert one.fingerprint() == other.fingerprint()


# What goes wrong at the start.


def problems(path, **kw):
  cfg = schema.Experiment(task=section.Segmentation(), data=schema.Data(
      **({"source": "array_record"} | kw), path=path))
  return list(sources.check(cfg, files=True))


def damage(remote, name, change):
  path = storage.path(remote) / name
  content = path.read_bytes()
  path.unlink()
  if (changed := change(content)) is not None:
    storage.write(path, changed)


@pytest.mark.parametrize("name, change, part", [
    (SHARD, lambda _: None, "cannot be read: there is no such object"),
    (SHARD, lambda x: x[:70_000], "cannot be read: "),
    (SHARD, lambda x: b"", "cannot be read: "),
    (SHARD, lambda x: b"x" * len(x), "mismatch"),
    ("train.json", lambda _: None, "does not exist; give a folder"),
    ("train.json", lambda x: x[:99], "is not the index of a prepared")])
def test_damage_is_one_line(remote, name, change, part):
  damage(remote, name, change)
  found, = problems(remote)
  assert part in found and f"{remote}/{name}" in found and "\n" not in found


@pytest.mark.parametrize("path, part", [
    ("gs://bkt/none", "is not a folder; no object is in it"),
    ("gs://other/none", "is not a folder; no object is in it, or there is no"),
    ("gs://b/", "has no valid name of a bucket"),
    ("s3://bucket/data", "is not a local folder, which source array_record "
     "needs, or a gs:// URL")])
def test_a_missing_folder_is_one_line(cloud, path, part):
  found, = problems(path)
  assert found.startswith(f"config.data.path: {path}") and part in found


@pytest.mark.parametrize("source, task", [
    ("folder", tasks.Classification()), ("idx", tasks.Classification()),
    ("coco", tasks.Detection()), ("ade20k", tasks.Segmentation()),
    ("label_maps", tasks.Segmentation())])
def test_a_source_of_small_files_says_what_to_do(source, task):
  cfg = schema.Experiment(task=task, data=schema.Data(
      source=source, path="gs://bkt/data"))
  found, = sources.check(cfg, files=True)
  assert found == (
      "config.data.path: gs://bkt/data is not a local folder, which source "
      f"{source} needs; mount the bucket, as launch/tpu_vm.py does, or copy "
      "the data to this machine by tools.prepare --stage")


def test_a_missing_table_is_one_line(cloud, objects):
  url = upload(objects, "without_table")
  (storage.path(url) / "train.safetensors").unlink()
  source_files.fails(
      lambda: sources.create(data(url), "train", task=MASKS),
      f"config.data.path: {url}/train.safetensors: cannot be used: ")


def test_a_missing_extra_is_one_line(monkeypatch):
  monkeypatch.delattr("metaformer_jax.gcs")
  monkeypatch.setitem(sys.modules, "metaformer_jax.gcs", None)
  found, = problems("gs://bkt/data")
  assert found.startswith(
      "config.data.path: gs://bkt/data: needs the extra gcs")
  assert found.endswith("pip install 'metaformer-jax[gcs]'")


def test_no_permission_is_one_line(remote, proxy):
  proxy.faults = itertools.repeat("403")
  found, = problems(remote)
  assert found.startswith(f"config.data.path: {remote}: ")
  assert "403" in found or "Forbidden" in found


# What goes wrong later.


@pytest.mark.parametrize("faults", [
    ["reset"], pytest.param(fake_gcs.FAULTS, marks=pytest.mark.slow)])
def test_faults_change_nothing(remote, local, proxy, faults):
  source = sources.create(data(remote), "train")
  proxy.faults = iter(faults)
  found = source[0]
  assert next(proxy.faults, None) is None
  assert found == sources.create(data(local), "train")[0]


def unchanged(record, rng):
  del rng
  return {"image": np.frombuffer(record["image"][:64], np.uint8)}


def read_all(source, workers=0):
  return list(loader.Loader(source, unchanged, 4, workers=workers)
              .eval_batches())


@pytest.mark.parametrize("fault, part", [
    ("missing", "there is no such object or bucket"), ("403", "Forbidden"),
    ("other", "has changed: it holds 6 examples, not 5")])
def test_data_that_is_gone_ends_the_run(remote, proxy, fault, part):
  """It is no bad example, which another one would replace."""
  source = sources.create(data(remote), "train")
  wanted = source[5]
  fresh = pickle.loads(pickle.dumps(source))
  if fault == "missing":
    damage(remote, SHARD, lambda _: None)
  elif fault == "other":
    damage(remote, SHARD, lambda _: (
        storage.path(remote) / SHARD.replace("00001", "00002")).read_bytes())
  else:
    proxy.faults = itertools.repeat("403")
  for each in (fresh, pickle.loads(pickle.dumps(source))):
    with pytest.raises(errors.DataError, match=f"train-0000.*{part}") as caught:
      read_all(each)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
  if fault == "403":
    proxy.faults = iter(())
    assert fresh[5] == source[5] == wanted


def test_workers_read_the_same_and_end_with_the_data(remote, local):
  """Train and evaluation, in two processes, from the middle of an epoch."""
  made = loader.Loader(sources.create(data(remote), "train"), unchanged, 4,
                       workers=2)
  stream, wanted = made.train_batches(24), loader.Loader(
      sources.create(data(local), "train"), unchanged, 4).train_batches(24)
  for one, other in itertools.islice(zip(stream, wanted), 5):
    np.testing.assert_array_equal(one["image"], other["image"])
  damage(remote, SHARD, lambda _: None)
  with pytest.raises(errors.DataError, match=f"{SHARD} cannot be read any"):
    for _ in stream:
      pass
  stream.close()
  wanted.close()


def test_a_damaged_record_is_a_bad_example(remote, local):
  source = sources.create(data(remote), "train")
  wanted = source[6]["image"][-50:]
  damage(remote, SHARD, lambda x: x.replace(wanted, wanted[::-1]))
  found = read_all(pickle.loads(pickle.dumps(source)))
  expected = read_all(sources.create(data(local), "train"))
  for i, (one, other) in enumerate(zip(found, expected, strict=True)):
    good = np.array([4 * i + j != 6 for j in range(4)])
    assert one["mask"].tolist() == good.tolist()
    np.testing.assert_array_equal(one["image"][good], other["image"][good])


def test_a_fingerprint_does_not_depend_on_the_place(remote, local):
  one, other = (sources.create(data(path), "train").fingerprint()
                for path in (local, remote))
  assert one == other
  source = sources.create(data(remote), "train")
  storage.write(storage.path(remote) / SHARD, b"shorter")
  found = source.fingerprint()
  assert found["file names"] == one["file names"]
  assert found["sizes of files"] != one["sizes of files"]
