"""Data sets of TFDS on gs://, against a fake server."""

import itertools
import pathlib
import pickle

import fake_gcs
import pytest
from source_files import fails, records

from metaformer_jax import storage
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import tfds as tfds_source

pytestmark = pytest.mark.slow

INSIDE = pathlib.Path("imagenet2012", "5.1.0")


def create(data_dir, split=None, *, train=True):
  return tfds_source.create("imagenet2012", str(data_dir), split, train)


@pytest.fixture(scope="module")
def remote(tfds_data):
  """The same data sets on a fake server."""
  pytest.importorskip("metaformer_jax.gcs")
  pytest.importorskip("gcp_storage_emulator")
  with fake_gcs.serving() as (_, proxy):
    urls = {name: f"gs://{fake_gcs.BUCKET}/{name}" for name in tfds_data}
    for name, folder in tfds_data.items():
      for file in (folder / INSIDE).iterdir():
        storage.write(storage.path(urls[name]) / str(INSIDE) / file.name,
                      file.read_bytes())
    yield urls, proxy


@pytest.mark.parametrize("split", [None, "train[3:7]"])
def test_an_array_record_data_set_is_the_same_on_gs(tfds_data, remote, split):
  one, other = (create(where["array_record"], split)
                for where in (tfds_data, remote[0]))
  assert records(other) == records(one)
  assert other.fingerprint() == one.fingerprint()
  assert list(other.class_names) == list(one.class_names)
  assert records(pickle.loads(pickle.dumps(other))) == records(one)


def test_what_is_wrong_on_gs_is_one_line(remote):
  urls, proxy = remote
  cfg = schema.Experiment(task=tasks.Classification(), data=schema.Data(
      source="tfds", name="imagenet2012", path=urls["array_record"]))
  assert list(sources.check(cfg, files=True)) == []
  fails(lambda: create(urls["tfrecord"]), "config.data.path", "tfrecord",
        "tools.prepare --stage")
  fails(lambda: create(f"{urls['tfrecord']}/none"), "config.data.path",
        "is not prepared in")
  shard = storage.path(urls["array_record"]) / str(INSIDE) / (
      "imagenet2012-validation.array_record-00000-of-00001")
  shard.unlink()
  fails(lambda: create(urls["array_record"], train=False), shard,
        "cannot be read: there is no such object or bucket")
  proxy.faults = itertools.repeat("403")
  fails(lambda: create(urls["array_record"]), "Forbidden")
