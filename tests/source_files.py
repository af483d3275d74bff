"""Files of data sets, and what the tests of sources share."""

import gzip
import struct

import numpy as np
import pytest

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data import sources


def fails(call, *parts):
  """`call` raises ConfigError: one line that holds each of `parts`."""
  with pytest.raises(errors.ConfigError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert str(part) in message, (part, message)


def records(source):
  return [source[i] for i in range(len(source))]


def write_idx(folder, name, array, gz=False):
  """An idx file of uint8."""
  data = bytes((0, 0, 8, array.ndim)) + b"".join(
      struct.pack(">I", n) for n in array.shape) + array.tobytes()
  file = folder / (f"{name}.gz" if gz else name)
  file.write_bytes(gzip.compress(data) if gz else data)


def write_mnist(folder):
  """The four files, those of the training split gzipped; returns the arrays."""
  rng = np.random.default_rng(0)
  arrays = {
      "train-images-idx3-ubyte": rng.integers(0, 256, (7, 5, 3), np.uint8),
      "train-labels-idx1-ubyte": np.array([3, 0, 9, 255, 1, 1, 2], np.uint8),
      "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 5, 3), np.uint8),
      "t10k-labels-idx1-ubyte": np.array([4, 3], np.uint8),
  }
  for name, array in arrays.items():
    write_idx(folder, name, array, gz=name.startswith("train"))
  return arrays


def write(root, *names, data=None):
  """Writes files below `root`; without `data`, they contain their names."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode() if data is None else data)


def write_empty(root):
  """Empty files that pass the checks of the sources folder and idx."""
  write(root, "train/cat/1.png", "val/cat/1.png", *(
      f"{name}-ubyte" for name in (
          "train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
          "t10k-labels-idx1")), data=b"")


def folder_source(root, split="train", **kw):
  return sources.create(
      schema.Data(source="folder", path=str(root), **kw), split)


def named(source):
  """[(path below the split's folder, label)] in the source's order."""
  return [(r["image"].decode(), r["label"]) for r in records(source)]
