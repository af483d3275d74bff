"""Damage to files of records is found by their checksums, never read.

TFRecord files are written by tensorboardX, whose CRC-32C is its own.
"""

import io
import os
import pathlib
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image
from source_files import fails, records
from tensorboardX import record_writer

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data import loader
from metaformer_jax.data.sources import prepared, tfrecords

pytest.importorskip("google_crc32c")

DATA = [np.random.default_rng(i).bytes(n)
        for i, n in enumerate((40, 0, 1, 300, 7, 64))]


def write(path, data):
  writer = record_writer.RecordWriter(str(path))
  for each in data:
    writer.write(each)
  writer.close()
  return path


def part(path, n=6, skip=0, take=-1):
  return types.SimpleNamespace(filename=path, skip=skip, take=take,
                               examples_in_shard=n)


def test_records_are_those_that_were_written(tmp_path):
  one, other = (write(tmp_path / name, data) for name, data in
                (("one", DATA), ("other", DATA[::-1])))
  assert records(tfrecords.Records([part(one), part(other)])) == (
      DATA + DATA[::-1])
  assert records(tfrecords.Records([
      part(other, skip=1, take=2), part(one, take=1)])) == [
          DATA[4], DATA[3], DATA[0]]


def starts(path):
  """The first byte of each record."""
  content, found, at = path.read_bytes(), [], 0
  while at < len(content):
    found.append(at)
    at += 16 + struct.unpack_from("<Q", content, at)[0]
  return found


@pytest.mark.parametrize("place, is_header", [
    (0, True), (7, True), (8, True), (11, True), (12, False), (50, False),
    (311, False), (312, False), (315, False)])
def test_every_part_of_a_record_is_covered(tmp_path, place, is_header):
  """Of the record of 300 bytes: length, checksum, data, checksum."""
  path = tmp_path / "a.tfrecord"
  write(path, DATA)
  at = starts(path)[3]
  content = bytearray(path.read_bytes())
  content[at + place] ^= 4
  path.write_bytes(content)
  if is_header:
    fails(lambda: tfrecords.Records([part(path)]),
          f"{path}: the length of the record at byte {at} differs from its "
          "checksum, so the rest of the file cannot be read; copy the file")
    return
  found = tfrecords.Records([part(path)])
  for i, data in enumerate(DATA):
    if i != 3:
      assert found[i] == data
  with pytest.raises(OSError, match=f"^{path}: the record at byte {at} differs "
                     "from its checksum$"):
    found[3]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
  """With a bit flipped, a run of bytes overwritten, or the end cut off."""
  kind, found = rng.integers(4), bytearray(content)
  at = int(rng.integers(len(content)))
  if kind < 2:
    found[at] ^= 1 << rng.integers(8)
  elif kind == 2:
    found[at:at + 40] = rng.bytes(len(found[at:at + 40]))
  else:
    del found[at:]
  return bytes(found)


@pytest.mark.parametrize("n", [
    200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_is_silent(tmp_path, n):
  path, rng = tmp_path / "a.tfrecord", np.random.default_rng(n)
  write(path, DATA)
  content = path.read_bytes()
  refused = n_bad = 0
  for _ in range(n):
    changed = damaged(content, rng)
    path.write_bytes(changed)
    try:
      found = tfrecords.Records([part(path)])
    except errors.ConfigError as e:
      assert str(e).startswith(f"{path}: ") and str(e).isprintable()
      refused += 1
      continue
    bad = 0
    for i, data in enumerate(DATA):
      try:
        assert found[i] == data, (i, changed)
      except OSError:
        bad += 1
    assert bad or changed == content
    n_bad += bad
  assert refused > n / 4 and n_bad > n / 8


def test_a_file_that_shrinks_is_an_error(tmp_path):
  path = tmp_path / "a.tfrecord"
  write(path, DATA)
  found = tfrecords.Records([part(path)])
  os.truncate(path, path.stat().st_size - 1)
  with pytest.raises(OSError, match="was truncated while it was read"):
    found[5]


def test_a_pipe_or_a_folder_is_an_error(tmp_path):
  os.mkfifo(tmp_path / "pipe")
  for path, reason in ((tmp_path, "Is a directory"),
                       (tmp_path / "pipe", "is not a regular file")):
    fails(lambda: tfrecords.Records([part(path)]),  # noqa: B023
          f"{path}: cannot be read: ", reason)


class Source:
  """Images of TFRecords, all of class 0."""

  n_classes = 1

  def __init__(self, found):
    self._records = found

  def __len__(self):
    return len(self._records)

  def __getitem__(self, index):
    return {"image": self._records[index], "label": 0}


def pixels(record, rng):
  del rng
  return {"image": np.array(Image.open(io.BytesIO(record["image"])))}


def bmp(value):
  """An image of one value, in a format without checksums."""
  buffer = io.BytesIO()
  Image.new("L", (8, 8), value).save(buffer, "BMP")
  return buffer.getvalue()


def test_a_damaged_record_is_a_bad_example(tmp_path, caplog):
  path = tmp_path / "a.tfrecord"
  write(path, [bmp(value) for value in range(4)])
  at = starts(path)[2]
  content = bytearray(path.read_bytes())
  content[starts(path)[3] - 20] ^= 64  # A pixel of the third image.
  path.write_bytes(content)
  source = Source(tfrecords.Records([part(path, 4)]))
  batch, = loader.Loader(source, pixels, 4).eval_batches()
  assert batch["mask"].tolist() == [True, True, False, True]
  assert caplog.messages == [
      f"example 2 cannot be used: OSError: {path}: the record at byte {at} "
      "differs from its checksum; evaluation leaves it out"]
  stream = loader.Loader(source, pixels, 4).train_batches(0)
  batch = next(stream)
  stream.close()
  assert batch["replaced"].sum() == 1
  assert {len(np.unique(image)) for image in batch["image"]} == {1}
  assert 2 not in batch["image"][:, 0, 0]


@pytest.mark.parametrize("n", [
    60, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_damage_to_an_array_record_is_silent(tmp_path, n):
  """array_record has checksums of its own; most of the file is padding."""
  made = [{"image": data, "label": data[::-1], "path": b"%d" % i}
          for i, data in enumerate(DATA)]
  prepared.write(tmp_path, "train", [[(r, (8, 8)) for r in made]], 1, {
      "records": "label_maps", "class_names": None,
      "reduce_zero_label": False})
  file, = tmp_path.glob("*.array_record")
  content, rng = file.read_bytes(), np.random.default_rng(n)
  used = len(content.rstrip(b"\0"))
  data = schema.Data(source="array_record", path=str(tmp_path))
  n_refused = n_bad = 0
  for _ in range(n):
    changed = bytearray(content)
    changed[rng.integers(used)] ^= 1 << rng.integers(8)
    file.write_bytes(changed)
    try:
      found = prepared.create(data, train=True)
    except errors.ConfigError:
      n_refused += 1
      continue
    for i, record in enumerate(made):
      try:
        assert found[i] == record | {"path": str(i)}
      except (ValueError, RuntimeError, OSError):
        n_bad += 1
  assert n_refused + n_bad > n / 100


ENDS = """
import sys
import types
from metaformer_jax.data import readers
from metaformer_jax.data.sources import array_records
part = types.SimpleNamespace(filename=sys.argv[1], skip=0, take=-1,
                             examples_in_shard=4)
records = array_records.Records([part])
threads = readers.Threads(lambda i: records[i % 4], 4)
answers = [threads.ask(i) for i in range(100)]
answers[0]()
print("ends")
"""


def test_python_can_end_while_threads_read(tmp_path):
  """They would return from C++ to an interpreter that has ended: SIGABRT."""
  from array_record.python import array_record_module  # noqa: PLC0415

  path = str(tmp_path / "large.array_record")
  writer = array_record_module.ArrayRecordWriter(
      path, "group_size:1,uncompressed")
  for _ in range(4):
    writer.write(bytes(2**24))
  writer.close()
  done = subprocess.run(
      [sys.executable, "-c", ENDS, path], capture_output=True, text=True,
      env=os.environ | {"PYTHONPATH": str(
          pathlib.Path(errors.__file__).parents[1])})
  assert (done.returncode, done.stdout, done.stderr) == (0, "ends\n", "")
