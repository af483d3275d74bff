"""Files of weights: every format, errors, and writing."""

import argparse
import collections
import gzip
import io
import json
import logging
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch_format as tf

from metaformer_jax import errors
from metaformer_jax.convert import files

ROOT = pathlib.Path(__file__).parents[2]
RNG = np.random.default_rng(0)
WEIGHTS = {"stem.weight": RNG.normal(size=(4, 3, 2)).astype(np.float32),
           "stem.bias": RNG.normal(size=4).astype(np.float32),
           "norm.num_batches_tracked": np.array(7, np.int64)}


def pickled(weights: dict) -> dict:
  return collections.OrderedDict(
      {name: tf.tensor(value) for name, value in weights.items()})


def assert_equal(actual: dict, expected: dict):
  assert list(actual) == list(expected)
  for name, value in expected.items():
    assert actual[name].dtype == value.dtype, name
    assert actual[name].shape == value.shape, name
    assert actual[name].tobytes() == value.tobytes(), name
    assert actual[name].flags.c_contiguous, name


def read(path, data: bytes):
  path.write_bytes(data)
  return files.read_tensors(path)


def refused(path, data: bytes | None = None) -> str:
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(errors.WeightsError) as error:
    files.read_tensors(path)
  message = str(error.value)
  assert message.isprintable() and message.count(str(path)) >= 1
  return message


@pytest.fixture
def file(tmp_path):
  return tmp_path / "weights.bin"


def test_the_content_tells_the_kind(file):
  assert_equal(read(file, tf.zipped(pickled(WEIGHTS))), WEIGHTS)
  assert_equal(read(file, tf.legacy(pickled(WEIGHTS))), WEIGHTS)
  ordered = dict(sorted(WEIGHTS.items()))
  files.write_safetensors(file, WEIGHTS, {})
  assert_equal(dict(sorted(files.read_tensors(str(file)).items())), ordered)


@pytest.mark.parametrize("first", [*range(0x3a, 0x40), 0x42, 0x50, 0x80, 0x1f])
def test_a_safetensors_file_may_begin_with_any_byte(file, first):
  """The first byte is that of a length, which can equal '<', 'P', ..."""
  head = b'{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
  head += b" " * (first + 256 - len(head))
  data = len(head).to_bytes(8, "little") + head + b"\x05"
  assert read(file, data)["a"] == np.array([5], np.int8)


@pytest.mark.parametrize("save", [
    tf.zipped, tf.legacy, safetensors.numpy.save])
def test_floating_values_become_float32(file, save):
  values = np.array([1, -2.5, 2**-14, 0, 300], np.float32)
  content = {str(d): values.astype(d) for d in (
      np.float32, np.float64, np.float16, ml_dtypes.bfloat16)}
  whole = {d: np.array([0, 1, 100]).astype(d) for d in (
      "int8", "uint8", "int16", "int32", "int64", "bool")}
  if save is not safetensors.numpy.save:
    data = save(pickled(content | whole))
  else:
    data = save(content | whole)
  tensors = read(file, data)
  for name, value in content.items():
    assert tensors[name].dtype == np.float32
    np.testing.assert_array_equal(tensors[name], value.astype(np.float32))
  assert_equal({name: tensors[name] for name in whole}, whole)


@pytest.mark.parametrize("wrap, taken", [
    (lambda a, b: {"state_dict": a}, "state_dict"),
    (lambda a, b: {"model": a, "optimizer": {"state": {0: {"m": b}}},
                   "args": argparse.Namespace(lr=1), "epoch": 3}, "model"),
    (lambda a, b: {"model": b, "state_dict": a}, "state_dict"),
    (lambda a, b: {"state_dict": b, "state_dict_ema": a}, "state_dict_ema"),
    (lambda a, b: {"model": b, "model_ema": a}, "model_ema"),
    (lambda a, b: {"model_ema": None, "model": a}, "model"),
    (lambda a, b: {"state_dict": {}, "model": a}, "model"),
    (lambda a, b: {"model": "poolformer_s12", "state_dict": a}, "state_dict"),
    (lambda a, b: {**a, "_metadata": {"": {"version": 1}}}, None),
])
def test_the_weights_are_found_in_a_checkpoint(file, caplog, wrap, taken):
  wanted = pickled(WEIGHTS)
  other = pickled({k: v + 1 for k, v in WEIGHTS.items()})
  with caplog.at_level(logging.INFO, files.__name__):
    assert_equal(read(file, tf.zipped(wrap(wanted, other))), WEIGHTS)
  messages = [record.getMessage() for record in caplog.records]
  assert messages == ([f"{file}: the weights are those of {taken!r}"]
                      if taken else [])


@pytest.mark.parametrize("prefix", [
    "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_all_names_are_left_out(file, prefix):
  content = pickled({prefix + k: v for k, v in WEIGHTS.items()})
  assert_equal(read(file, tf.zipped({"model": content})), WEIGHTS)
  content["head.bias"] = tf.tensor(np.zeros(2, np.float32))
  assert prefix + "stem.bias" in read(file, tf.zipped(content))


def test_everything_wrong_with_the_tensors_is_one_error(file):
  one = np.ones(3, np.float32)
  message = refused(file, tf.zipped({
      "fine": tf.tensor(one), "bn.num_batches_tracked": 5,
      "nan": tf.tensor(one * np.array([np.nan, 1, np.inf], np.float32)),
      "half": tf.tensor(np.array([np.inf, 1], np.float16)),
      "brain": tf.tensor(np.array([1, np.nan], ml_dtypes.bfloat16)),
      "double": tf.tensor(np.array([1e39, -1e300, 1])), "n": 5,
      "args": argparse.Namespace(), 3: tf.tensor(one), "nested": {"a": 1},
      "x.num_batches_tracked": 2**70, "odd\nname\x1b[0m": None}))
  listed = message.partition("cannot be used: ")[2].split("), ")
  assert [item.rstrip(")") for item in listed] == [
      "nan (2 of 3 values NaN or infinite",
      "half (1 of 2 values NaN or infinite",
      "brain (1 of 2 values NaN or infinite",
      "double (2 of 3 values beyond float32",
      "n (a int, not a tensor",
      "args (a argparse.Namespace, not a tensor",
      "a key of type int (names must be strings",
      "nested (a dict, not a tensor",
      "x.num_batches_tracked (dtype object is not supported",
      "odd name?[0m (a NoneType, not a tensor"]


def test_a_count_may_be_a_number(file):
  tensors = read(file, tf.zipped({
      "a": tf.tensor(np.ones(1, np.float32)), "b.num_batches_tracked": 5}))
  assert tensors["b.num_batches_tracked"] == np.array(5)


def test_what_holds_no_state_dict(file):
  assert "epoch, optimizer" in refused(
      file, tf.zipped({"epoch": 1, "optimizer": {"lr": 1}}))
  assert "a list" in refused(file, tf.zipped([1]))
  assert "a argparse.Namespace" in refused(
      file, tf.zipped(argparse.Namespace()))
  assert "keys: none" in refused(file, tf.zipped({}))
  assert "a key of type int" in refused(
      file, tf.zipped({2**59: 1, None: 2}))
  assert "keys: none" in refused(file, safetensors.numpy.save({}))
  assert "os.system" in refused(file, tf.zipped(tf.Global("os", "system")))


def tar(name):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    archive.addfile(tarfile.TarInfo(name))
  return buffer.getvalue()


def zipped_text():
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    archive.writestr("readme.txt", "hello")
  return buffer.getvalue()


@pytest.mark.parametrize("data, advice", [
    (b"", "empty"),
    (b"<!DOCTYPE html><html>404", "download failed"),
    (b"\xef\xbb\xbf\r\n  <HTML>", "download failed"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs"),
    pytest.param(gzip.compress(tf.zipped({})), "gunzip", id="gzip"),
    pytest.param(gzip.compress(tf.zipped({}))[:30], "gunzip", id="cut gzip"),
    (b"BZh91AY", "bunzip2"), (b"\xfd7zXZ\0", "unxz"),
    (b"\x28\xb5\x2f\xfd\0", "unzstd"), (b"\x89HDF\r\n", "HDF5"),
    (b"\x93NUMPY\1\0", "NumPy"), (tar("a.pth"), "tar archive"),
    (zipped_text(), "zip archive"), (b"hello", "neither"), (b"\0" * 99, "nei"),
    (b'{"error": "not found"}', "neither"), (b"PK", "damaged"),
    (b"\x80\x02", "damaged"), (b"\x80\x04N.", "is a pickle"),
    (b"\x09\0\0\0\0\0\0\0{\"a\": 1}", "damaged safetensors"),
])
def test_what_is_no_file_of_weights_is_told_with_a_way_out(file, data, advice):
  assert advice in refused(file, data)


def test_paths_that_cannot_be_read(tmp_path):
  (tmp_path / "poolformer_s12.pth").write_bytes(b"")
  assert "did you mean poolformer_s12.pth?" in refused(
      tmp_path / "poolformer_s21.pth")
  assert "does not exist" in refused(tmp_path / "no" / "folder" / "a.pth")
  assert "is a folder" in refused(tmp_path)
  assert "poolformer_s12.pth" in refused(tmp_path)
  assert "cannot be read" in refused(tmp_path / "poolformer_s12.pth" / "a")
  with pytest.raises(errors.WeightsError, match="cannot be read"):
    files.read_tensors("a\0b")


def test_a_damaged_safetensors_file_never_ends_in_a_traceback(file):
  files.write_safetensors(file, WEIGHTS, {"a": "b"})
  data = file.read_bytes()
  for end in range(len(data)):
    refused(file, data[:end])
  for i in range(len(data)):
    damaged = bytearray(data)
    damaged[i] ^= 1 << i % 8
    try:
      read(file, bytes(damaged))
    except errors.WeightsError as error:
      assert str(error).isprintable()


def test_what_is_written_is_read_bit_by_bit(file):
  square = RNG.normal(size=(4, 6)).astype(np.float32)
  tensors = {"transposed": square.T, "sliced": square[1:, ::2],
             "scalar": np.array(-0.0, np.float32),
             "tiny": np.array([1e-45, 3e38], np.float32),
             "empty": np.zeros((0, 3), np.float32),
             "count": np.array([2**62], np.int64), "é\n\"": np.array([True])}
  files.write_safetensors(file, tensors, {"source": "é\n", "x": ""})
  actual = files.read_tensors(file)
  assert_equal({name: actual[name] for name in tensors},
               {k: np.array(v, order="C") for k, v in tensors.items()})
  with safetensors.safe_open(file, "np") as opened:
    assert opened.metadata() == {"source": "é\n", "x": ""}
  brain = {"a": square.astype(ml_dtypes.bfloat16)}
  files.write_safetensors(file, brain, {})
  assert_equal(safetensors.numpy.load_file(file), brain)


def test_the_same_content_gives_the_same_bytes(tmp_path):
  metadata = {f"key{i}": str(i) for i in range(9)}
  files.write_safetensors(tmp_path / "a", WEIGHTS, metadata)
  expected = (tmp_path / "a").read_bytes()
  for i in range(5):
    files.write_safetensors(
        tmp_path / "a", dict(list(WEIGHTS.items())[::-1]),
        dict(list(metadata.items())[::(1, -1)[i % 2]]))
    assert (tmp_path / "a").read_bytes() == expected
  header = json.loads(expected[8:8 + int.from_bytes(expected[:8], "little")])
  assert list(header["__metadata__"]) == sorted(metadata)
  for i in range(8):  # The values begin at a multiple of 8, to be mapped.
    files.write_safetensors(tmp_path / "a", WEIGHTS, {"": "a" * i})
    assert (tmp_path / "a").read_bytes()[0] % 8 == 0


@pytest.mark.parametrize("error", [OSError(28, "No space left"),
                                   KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_leaves_the_old_file(
    file, monkeypatch, step, error):
  files.write_safetensors(file, WEIGHTS, {})

  def fail(*_):
    raise error

  monkeypatch.setattr(os, step, fail)
  expected = errors.WeightsError if error.args else KeyboardInterrupt
  with pytest.raises(expected, match="No space" if error.args else None):
    files.write_safetensors(file, {"a": np.zeros(9, np.float32)}, {})
  assert os.listdir(file.parent) == [file.name]
  assert len(files.read_tensors(file)) == len(WEIGHTS)


def test_what_cannot_be_written_is_one_line(tmp_path):
  (tmp_path / "file").write_bytes(b"")
  for path in (tmp_path, tmp_path / "no" / "a", tmp_path / "file" / "a"):
    with pytest.raises(errors.WeightsError, match="cannot be written: ") as e:
      files.write_safetensors(path, WEIGHTS, {})
    assert str(e.value).isprintable()
  assert os.listdir(tmp_path) == ["file"]


def test_reading_a_checkpoint_imports_neither_torch_nor_jax(file):
  file.write_bytes(tf.zipped(pickled(WEIGHTS)))
  script = ("import sys; from metaformer_jax.convert import files; "
            f"files.read_tensors({str(file)!r}); "
            "sys.exit(bool({'torch', 'jax', 'flax'} & set(sys.modules)))")
  subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
