"""Weights that cost too much, or that are of kinds that are not read.

test_security.py measures what `costly_pickles` take.
"""

import json
import struct
import time

import numpy as np
import pytest
import torch_format as tf

from metaformer_jax import errors
from metaformer_jax.config import saved
from metaformer_jax.convert import files, pickles

VALUES = np.arange(24, dtype=np.float32)


@pytest.fixture
def file(tmp_path):
  return tmp_path / "weights.safetensors"


def refused(path, data: bytes, read=files.read_tensors) -> str:
  path.write_bytes(data)
  start = time.process_time()
  with pytest.raises(errors.WeightsError) as error:
    read(path)
  assert time.process_time() - start < 2
  message = str(error.value)
  assert message.startswith(f"{path}: ") and message.isprintable()
  return message


def test_real_checkpoints_are_far_below_the_limits(file):
  """A moving average, weights and AdamW's state of 1,000 parameters."""
  names = [f"stage4.blocks.{i}.mixer.weight" for i in range(1000)]
  state = {name: tf.tensor(VALUES) for name in names}
  slots = {i: {"step": tf.tensor(np.float32(1)), "exp_avg": tf.tensor(VALUES),
               "exp_avg_sq": tf.tensor(VALUES)} for i in range(1000)}
  file.write_bytes(tf.zipped({
      "state_dict": state, "ema": {**state}, "optimizer": {
          "state": slots, "param_groups": [{"params": list(range(1000))}]}}))
  found = pickles.read(file)
  assert found["state_dict"].keys() == set(names)
  assert found["optimizer"]["state"].keys() == set(range(1000))



def test_names_of_storages_are_compared_soon(file):
  names = ["a" * 10**6, "a" * 10**6] * 20_000
  refused(file, tf.legacy([tf.tensor(VALUES)], keys=names))


NAME = tf.Global("torch._utils", "_rebuild_tensor_v3")


@pytest.mark.parametrize("content, reason", [
    (tf.Object(NAME, (tf.Storage(np.zeros(3, np.uint8), pid=(
        "storage", tf.Global("torch.storage", "UntypedStorage"), "0", "cpu",
        3)), 0, (3,), (1,), False, {}, tf.Global("torch", "float8_e4m3fn"))),
     "holds tensors of torch.float8_e4m3fn, which are not read; save them as "),
    (tf.Object(NAME, (1, 2, 3)), "without a dtype"),
    (tf.Object(tf.Global("torch._utils", "_rebuild_sparse_tensor"), (1,)),
     "holds sparse tensors; save what to_dense()"),
    (tf.Object(tf.Global("torch._utils", "_rebuild_qtensor"), (1,)),
     "holds quantised tensors; save what dequantize()"),
    (tf.Object(tf.Global("torch._utils", "_rebuild_meta_tensor_no_storage"),
               (tf.Global("torch", "float32"),)), "without values"),
    (tf.tensor(tf.Storage(VALUES, pid=(
        "storage", tf.Global("torch", "ComplexFloatStorage"), "0", "cpu", 12)),
        0, (12,), (1,)), "holds complex numbers"),
])
def test_kinds_of_tensors_that_are_not_read_have_their_names(
    file, content, reason):
  for save in (tf.zipped, tf.legacy):
    assert reason in refused(file, save({"a": content}))


def test_dtypes_may_be_settings(file):
  file.write_bytes(tf.zipped({
      "dtype": tf.Global("torch", "bfloat16"), "model": {
          "a": tf.tensor(VALUES)}}))
  assert pickles.read(file)["dtype"] == pickles.Inert("torch.bfloat16")
  assert files.read_tensors(file).keys() == {"a"}


def safetensor(header, data=b""):
  if not isinstance(header, bytes):
    header = json.dumps(header).encode()
  return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize("dtype, bits", [
    ("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("F6_E2M3", 6), ("C64", 64)])
def test_dtypes_that_are_not_read_have_their_names(file, dtype, bits):
  n = bits
  header = {name: {"dtype": dtype, "shape": [8], "data_offsets": [i, i + n]}
            for name, i in (("a", 0), ("b", n))}
  shown = {"C64": "complex64"}.get(dtype, dtype)
  assert refused(file, safetensor(header, bytes(2 * n))) == (
      f"{file}: cannot be used: a (dtype {shown} is not supported), "
      f"b (dtype {shown} is not supported)")


@pytest.mark.parametrize("header, reason", [
    (b"{" + b",".join(
        b'"%d":{"dtype":"U8","shape":[],"data_offsets":[%d,%d]}' % (
            i, i, i + 1) for i in range(10**5)) + b"}", "100000 tensors"),
    (b'{"__metadata__":{%s}}' % b",".join(
        b'"%d":""' % i for i in range(2 * 10**6)), "header"),
    (b"{" + b" " * 2**25 + b"}", "header says that it has"),
])
@pytest.mark.parametrize("read", [files.read_tensors, saved.read_weights])
def test_headers_are_bounded(file, header, reason, read):
  assert reason in refused(file, safetensor(header, bytes(10**5)), read)
