"""Random access to data sets: `len(source)`, `source[i] -> record`.

A record of a classification source is {"image", "label"}: the image either
encoded, as bytes, or uint8 [H, W] or [H, W, 3]; the label an int; and, where it
has one, the "path" that a bad image is named by. A source has `n_classes`, or
None where it cannot know. Sources are read by several threads and pickled to
worker processes.
"""

import gzip
import math
import os
import pathlib
import re
import stat
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config.schema import Data

Record = Mapping[str, Any]

_MAX_IDX_BYTES = 2**31  # Unpacked; MNIST's largest file has 47 million.
_MAX_IMAGE_BYTES = 2**30  # Encoded; ImageNet's largest file has 15 million.


class Source(Protocol):
  """What the loader needs of a data set."""

  n_classes: int | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


def create(cfg: Data, split: str, numbered: bool = False) -> Source:
  """Opens the "train" or the "eval" split that the config names.

  Args:
    cfg: what is where.
    split: "train" or "eval".
    numbered: source folder: the names of the class folders are the classes.

  Raises:
    ConfigError: what is missing, or cannot be read, and where.
  """
  train = split == "train"
  named = cfg.train_split if train else cfg.eval_split
  match cfg.source:
    case "digits":
      return digits(train)
    case "idx":
      return idx(cfg.path, train)
    case "folder":
      return _class_folders(cfg, train, numbered)
    case "tfds":
      # A module of its own, as only this source needs the extra `tfds`.
      from metaformer_jax.data.sources import tfds as tfds_source  # noqa: PLC0415

      return tfds_source.create(cfg.name, cfg.path, named, train)
  raise ValueError(f"unknown source {cfg.source!r}")


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

  def __getitem__(self, index: int) -> Record:
    return {"image": self._images[index], "label": int(self._labels[index])}


def digits(train: bool) -> InMemory:
  """scikit-learn's 1,797 handwritten digits, 8x8: 1,500 to train, 297 to test.

  The split is in file order, so that other writers write the test digits.
  """
  from sklearn import datasets  # noqa: PLC0415  A second to import.

  data = datasets.load_digits()
  images = (data.images * (255 / 16)).round().astype(np.uint8)
  part = slice(None, 1500) if train else slice(1500, None)
  return InMemory(images[part], data.target[part])


def idx(path: str, train: bool) -> InMemory:
  """MNIST's four idx files, gzipped or not; n x H x W and n values of uint8."""
  prefix = "train" if train else "t10k"
  images = _read_idx(path, f"{prefix}-images-idx3-ubyte", 3)
  labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte", 1)
  if len(images) != len(labels) or not len(images):
    raise errors.ConfigError(
        f"config.data.path: {path} has {len(images)} {prefix} images but "
        f"{len(labels)} labels")
  return InMemory(images, labels)


def _read_idx(folder: str, name: str, n_dims: int) -> np.ndarray:
  root = pathlib.Path(folder).expanduser()
  file = next((f for f in (root / name, root / f"{name}.gz") if f.is_file()),
              None)
  if file is None:
    raise errors.ConfigError(f"config.data.path: {root} has no {name}[.gz]")
  try:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
      # Two zero bytes, the type (8: uint8), the number of dimensions, their
      # sizes.
      header = stream.read(4 + 4 * n_dims)
      if len(header) < 4 + 4 * n_dims or header[:4] != bytes((0, 0, 8, n_dims)):
        raise errors.ConfigError(
            f"{file}: is no idx file of uint8 with {n_dims} dimensions")
      shape = struct.unpack(f">{n_dims}I", header[4:])
      size = math.prod(shape)
      # A few bytes may claim, and compressed ones expand to, any size.
      data = stream.read(min(size, _MAX_IDX_BYTES) + 1000)
  except (EOFError, zlib.error, OSError) as e:
    raise errors.ConfigError(f"{file}: cannot be read: {e}") from e
  if len(data) != size:
    raise errors.ConfigError(
        f"{file}: holds {len(data)} values, not {'x'.join(map(str, shape))}")
  return np.frombuffer(data, np.uint8).reshape(shape)


# As torchvision's ImageFolder takes them.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif",
                  ".tiff", ".webp")


class ClassFolders:
  """A folder of class folders of images, as ImageNet is commonly kept.

  Classes are numbered in the order of their sorted names, as torchvision's
  ImageFolder and timm do; images are sorted within a class. Names are kept in
  one array, so that millions are cheap to hold and to send to workers.
  """

  def __init__(self, root: pathlib.Path, classes: list[str]):
    """Finds the images of `classes`; a folder of another name is an error."""
    self._root = os.fspath(root)
    self.n_classes = len(classes)
    present = set(class_names(root))
    unknown = sorted(present.difference(classes))
    if unknown:
      raise errors.ConfigError(
          f"config.data.path: {root} has the class {unknown[0]!r}, which the "
          f"training split has not{errors.did_you_mean(unknown[0], classes)}")
    files, labels = [], []
    for label, name in enumerate(classes):
      if name not in present:
        continue
      found = _image_files(os.path.join(self._root, name))
      if not found:
        raise errors.ConfigError(
            f"config.data.path: {root / name} has no images "
            f"({', '.join(IMAGE_SUFFIXES)})")
      files += [os.fsencode(f"{name}/{file}") for file in found]
      labels += [label] * len(found)
    self._files = np.array(files)
    self._labels = np.array(labels, np.int32)

  def __len__(self) -> int:
    return len(self._files)

  def path(self, index: int) -> str:
    """Where an image lies; the file is not touched."""
    return os.path.join(self._root, os.fsdecode(self._files[index]))

  def __getitem__(self, index: int) -> Record:
    path = self.path(index)
    return {"image": _read_file(path), "label": int(self._labels[index]),
            "path": path}


def _read_file(path: str) -> bytes:
  """A file's bytes; OSError where it is a pipe or device, or has no end."""

  def at_once(path, flags):  # Who opens a pipe waits for who writes to it.
    return os.open(path, flags | os.O_NONBLOCK)

  with open(path, "rb", opener=at_once) as f:
    found = os.fstat(f.fileno())
    if not stat.S_ISREG(found.st_mode):
      raise OSError(f"{path} is no regular file")
    if found.st_size > _MAX_IMAGE_BYTES:
      raise OSError(f"{path} has {found.st_size} bytes, more than any image")
    return f.read()


def class_names(root: pathlib.Path) -> list[str]:
  """The sorted names of the class folders; hidden folders are none."""
  try:
    names = sorted(e.name for e in os.scandir(root)
                   if e.is_dir() and not e.name.startswith("."))
  except OSError as e:
    raise errors.ConfigError(
        f"config.data.path: {root} cannot be read: {e}") from e
  if not names:
    raise errors.ConfigError(f"config.data.path: {root} has no class folders")
  return names


def _class_folders(cfg: Data, train: bool, numbered: bool) -> ClassFolders:
  root = pathlib.Path(cfg.path).expanduser()
  train_root = root / (cfg.train_split or "train")
  split_root = train_root if train else root / (cfg.eval_split or "val")
  if numbered:  # ImageNet-V2 is so: 0 to 999.
    names = class_names(split_root)
    for name in names:
      if not re.fullmatch(r"0|[1-9]\d{0,5}", name):
        raise errors.ConfigError(
            f"config.data.eval_split: {split_root} has the folder {name!r}, "
            "which is no number of a class")
    return ClassFolders(split_root, [
        str(i) for i in range(1 + max(map(int, names)))])
  # Both splits number the classes by the training split's folders: a class
  # without evaluation images must not shift the ones after it.
  return ClassFolders(split_root, class_names(train_root))


def _image_files(folder: str) -> list[str]:
  """The images below a class folder: folder by folder, each sorted."""

  def fail(e):  # os.walk() would leave out what it cannot list.
    raise errors.ConfigError(
        f"config.data.path: {folder} cannot be read: {e}") from e

  visited = []
  for where, folders, names in os.walk(folder, followlinks=True, onerror=fail):
    visited.append((where, names))
    for name in folders:
      _check_link(os.path.join(where, name), folder)
  found = []
  for where, names in sorted(visited):
    inside = os.path.relpath(where, folder)
    found += [os.path.normpath(os.path.join(inside, name))
              for name in sorted(names)
              if name.lower().endswith(IMAGE_SUFFIXES)]
  return found


def _check_link(path: str, root: str) -> None:
  """ConfigError: a folder below root leads back to one that it lies in."""
  if not os.path.islink(path):
    return
  target, above = os.path.realpath(path), path
  while above != root:
    above = os.path.dirname(above)
    if os.path.realpath(above) == target:
      raise errors.ConfigError(
          f"config.data.path: {path} is a link to {target}, which it lies in")
