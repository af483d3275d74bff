"""Data sets held in memory: scikit-learn's digits, and MNIST's idx files."""

import gzip
import math
import pathlib
import struct
import zlib
from collections.abc import Iterator

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import base, fingerprints

_MAX_IDX_BYTES = 2**31  # Unpacked; MNIST's largest file has 47 million.


class InMemory:
  """Images and labels held as arrays."""

  def __init__(self, images: np.ndarray, labels: np.ndarray):
    """Takes uint8 images [N, H, W] or [N, H, W, 3] and integer labels [N]."""
    if len(images) != len(labels) or not len(images):
      raise ValueError(f"{len(images)} images but {len(labels)} labels")
    self._images, self._labels = images, labels
    self.n_classes = int(labels.max()) + 1

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> base.Record:
    return {"image": self._images[index], "label": int(self._labels[index])}

  def fingerprint(self) -> dict[str, str]:
    """A digest of all values."""
    return {"images and labels": fingerprints.arrays(self._images,
                                                     self._labels)}


DIGITS = base.Classes(10, tuple("0123456789"))


def digits(train: bool) -> InMemory:
  """scikit-learn's 1,797 handwritten digits, 8x8: 1,500 to train, 297 to test.

  The split is in file order, so the test digits are by other writers.
  """
  from sklearn import datasets  # noqa: PLC0415  Takes a second to import.

  data = datasets.load_digits()
  images = (data.images * (255 / 16)).round().astype(np.uint8)
  part = slice(None, 1500) if train else slice(1500, None)
  return InMemory(images[part], data.target[part])


def check_digits(cfg: schema.Experiment, files: bool,
                 train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on digits."""
  del train
  yield from base.check_classes(cfg, DIGITS.n)
  if files and cfg.data.path:
    yield from base.check_folder(cfg.data)


def idx(path: str, train: bool) -> InMemory:
  """MNIST's four idx files, gzipped or not; n x H x W and n values of uint8.

  Raises:
    ConfigError: a file is missing or damaged, or the split is empty.
  """
  prefix = "train" if train else "t10k"
  images = _read_idx(path, f"{prefix}-images-idx3-ubyte", 3)
  labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", 1)
  if len(images) != len(labels) or not len(images):
    raise errors.ConfigError(
        f"config.data.path: {path} has {len(images)} {prefix} images but "
        f"{len(labels)} labels")
  return InMemory(images, labels)


def check_idx(cfg: schema.Experiment, files: bool,
              train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on idx files."""
  del train
  path = cfg.data.path
  if not path:
    yield (f"config.data.path: {path!r} with source idx; give the folder with "
           "the four files of MNIST or Fashion-MNIST")
  elif files:
    hint = ("; install Debian's package dataset-fashion-mnist"
            if pathlib.PurePath(path).name == "fashion-mnist" else "")
    yield from base.check_folder(cfg.data, _missing_files(path), hint)


def _missing_files(path: str) -> Iterator[str]:
  root = pathlib.Path(path).expanduser()
  for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
               "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
    if not any(file.is_file() for file in _idx_files(root, name)):
      yield f"config.data.path: {path} has no {name}[.gz]"


def _idx_files(root: pathlib.Path, name: str) -> tuple[pathlib.Path, ...]:
  """Where a file may be; the first that exists is used."""
  return root / name, root / f"{name}.gz"


def _read_idx(folder: str, name: str, n_dims: int) -> np.ndarray:
  root = pathlib.Path(folder).expanduser()
  file = next((f for f in _idx_files(root, name) if f.is_file()), None)
  if file is None:
    raise errors.ConfigError(f"config.data.path: {root} has no {name}[.gz]")
  try:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
      # Two zero bytes, the type (8: uint8), the number of dimensions, their
      # sizes.
      header = stream.read(4 + 4 * n_dims)
      if len(header) < 4 + 4 * n_dims or header[:4] != bytes((0, 0, 8, n_dims)):
        raise errors.ConfigError(
            f"{file}: is not an idx file of uint8 with {n_dims} dimensions")
      shape = struct.unpack(f">{n_dims}I", header[4:])
      size = math.prod(shape)
      # A small file may claim, or decompress to, any size.
      data = stream.read(min(size, _MAX_IDX_BYTES) + 1000)
  except (EOFError, zlib.error, OSError) as e:
    raise errors.ConfigError(f"{file}: cannot be read: {e}") from e
  if len(data) != size:
    raise errors.ConfigError(
        f"{file}: holds {len(data)} values, not {'x'.join(map(str, shape))}")
  return np.frombuffer(data, np.uint8).reshape(shape)
