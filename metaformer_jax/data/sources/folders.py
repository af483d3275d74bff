"""Class folders of images, as ImageNet is commonly stored."""

import contextlib
import hashlib
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import paths, schema
from metaformer_jax.data.sources import base, file_names, fingerprints

_MAX_IMAGE_BYTES = 2**30  # Encoded; ImageNet's largest file has 15 million.


# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif",
                  ".tiff", ".webp")

# What data sets call their splits; the first one that is there is used.
TRAIN = ("train", "training")
EVAL = ("val", "valid", "validation", "test")


class Part(NamedTuple):
  """A part of the images of each class, chosen by hashes of their paths.

  Whether an image is chosen depends on the seed and on the other images of its
  class only: with more images, few of those before change sides.

  Attributes:
    fraction: of the images of a class that are held out; of two or more, at
      least one is held out and one is not.
    seed: of the choice.
    held_out: whether the part is these images, or the others.
  """

  fraction: float
  seed: int
  held_out: bool

  def of(self, files: list[str]) -> list[str]:
    """Those of a class's files that are in the part, in the same order."""
    n = len(files)
    n_held_out = min(max(1, round(self.fraction * n)), n - 1)
    chosen = set(sorted(files, key=self._hash)[:n_held_out])
    return [file for file in files if (file in chosen) == self.held_out]

  def _hash(self, file: str) -> bytes:
    return hashlib.blake2b(os.fsencode(f"{self.seed}/{file}")).digest()


class ClassFolders:
  """A folder with a folder of images per class.

  Classes are numbered in the order of their sorted names, as in torchvision's
  ImageFolder and timm; images are sorted within a class.
  """

  def __init__(self, root: pathlib.Path, classes: Sequence[str],
               part: Part | None = None):
    """Finds the images of `classes`, or a part of them.

    Raises:
      ConfigError: `root` cannot be read, has a class folder that is not in
        `classes`, or one without images; or the part has no images.
    """
    self._root = os.fspath(root)
    self.n_classes = len(classes)
    present = set(class_names(root))
    base.check_names(present, classes, root)
    files, labels = [], []
    for label, name in enumerate(classes):
      if name not in present:
        continue
      found = [f"{name}/{file}" for file in
               image_files(os.path.join(self._root, name))]
      if not found:
        raise errors.ConfigError(
            f"config.data.path: {root / name} has no images "
            f"({', '.join(IMAGE_SUFFIXES)})")
      found = part.of(found) if part else found
      files += map(os.fsencode, found)
      labels += [label] * len(found)
    if not files:
      raise errors.ConfigError(
          f"config.data.eval_fraction: no class of {root} has two images, of "
          "which one could be held out")
    self._files = file_names.FileNames(files)
    self._labels = np.array(labels, np.int32)
    self._names = tuple(classes)

  def __len__(self) -> int:
    return len(self._files)

  def path(self, index: int) -> str:
    """The path of an image; the file is not opened."""
    return os.path.join(self._root, os.fsdecode(self._files[index]))

  def __getitem__(self, index: int) -> base.Record:
    path = self.path(index)
    return {"image": read_file(path), "label": int(self._labels[index]),
            "path": path}

  def fingerprint(self) -> dict[str, Any]:
    """The classes' names, and `fingerprints.files`."""
    return {"classes": list(self._names),
            **fingerprints.files((self._root, self._files))}


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
  """A file to read; OSError if it is a pipe, a device or far too large."""
  with paths.open_file(path) as f:
    size = os.fstat(f.fileno()).st_size
    if size > _MAX_IMAGE_BYTES:
      raise OSError(f"{path} has {size} bytes, too many for an image")
    yield f


def read_file(path: str) -> bytes:
  """A file's bytes; OSError as for `opened`."""
  with opened(path) as f:
    return f.read()


def class_names(root: pathlib.Path) -> list[str]:
  """The sorted names of the class folders.

  Raises:
    ConfigError: `root` cannot be read, or has none.
  """
  try:
    names = _class_folders(root)
  except OSError as e:
    raise errors.ConfigError(
        f"config.data.path: {root} cannot be read: {e}") from e
  if not names:
    raise errors.ConfigError(f"config.data.path: {root} has no class folders")
  return names


def _class_folders(root: pathlib.Path) -> list[str]:
  """The sorted names of the folders in `root`; hidden ones do not count."""
  return sorted(e.name for e in os.scandir(root)
                if e.is_dir() and not e.name.startswith("."))


class Splits(NamedTuple):
  """Where the splits of a data set are.

  Attributes:
    train: the folder of the training split's class folders.
    evaluation: that of the evaluation split; None if it is a part of `train`.
  """

  train: pathlib.Path
  evaluation: pathlib.Path | None


def splits(data: schema.Data) -> Splits:
  """Finds the folders of the splits.

  By default the training split is the first of train/ and training/, the
  evaluation split the first of val/, valid/, validation/ and test/. Without
  the latter, `data.eval_fraction` of the training split's images is held out;
  then, if there is no training folder either, the class folders may be in
  `data.path` itself. The folders need not exist, except for that.

  Raises:
    ConfigError: a folder cannot be read.
  """
  root = pathlib.Path(data.path).expanduser()
  try:
    train = _first_split(root, data.train_split, TRAIN)
    evaluation = _first_split(root, data.eval_split, EVAL)
  except OSError as e:
    raise errors.ConfigError(f"config.data.path: {data.path}: {e}") from e
  if data.eval_fraction is not None and evaluation is None:
    return Splits(train or root, None)
  return Splits(train or root / TRAIN[0], evaluation or root / EVAL[0])


def _first_split(root: pathlib.Path, name: str | None,
                 names: Sequence[str]) -> pathlib.Path | None:
  """The folder that is named, or the first that holds class folders."""
  if name is not None:
    return root / name
  return next((root / name for name in names
               if (root / name).is_dir() and _class_folders(root / name)),
              None)


def create(data: schema.Data, train: bool, numbered: bool = False,
           names: Sequence[str] | None = None) -> ClassFolders:
  """Opens a split.

  Args:
    data: `path`, `train_split`, `eval_split` and `eval_fraction`.
    train: the training split; else the evaluation split.
    numbered: a folder's name is the number of its class.
    names: of the classes, by number. By default the training split's folders
      number the classes of both splits: a class without evaluation images must
      not shift those after it.

  Raises:
    ConfigError: a folder is missing, cannot be read or has a wrong name.
  """
  where = splits(data)
  root = where.evaluation if where.evaluation and not train else where.train
  if numbered:  # As ImageNet-V2: 0 to 999.
    found = class_names(root)
    for name in found:
      if not re.fullmatch(r"0|[1-9]\d{0,5}", name):
        raise errors.ConfigError(
            f"config.data.eval_split: {root} has the folder {name!r}, which "
            "is not the number of a class")
    names = [str(i) for i in range(1 + max(map(int, found)))]
  part = None if where.evaluation else Part(
      data.eval_fraction, data.eval_seed, held_out=not train)
  return ClassFolders(root, names or class_names(where.train), part)


def classes(data: schema.Data) -> base.Classes:
  """The classes of the training split, without a look at the images.

  Raises:
    ConfigError: as `create`.
  """
  if not data.path:
    raise errors.ConfigError("config.data.path: is missing")
  names = class_names(splits(data).train)
  return base.Classes(len(names), names)


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on class folders.

  Args:
    cfg: the experiment.
    files: whether the data must be on this machine.
    train: whether the training split must be there, too.
  """
  yield from base.check_path(
      cfg.data, files, "give the folder that holds train/ and val/",
      _check_splits(cfg, train))


def _check_splits(cfg: schema.Experiment, train: bool) -> Iterator[str]:
  where = splits(cfg.data)
  if not train and cfg.task.class_names is None:
    train = True  # Its folders number the classes.
  wanted = {"eval_split": where.evaluation}
  if train or where.evaluation is None:
    wanted = {"train_split": where.train} | wanted
  for key, folder in wanted.items():
    if folder is None:
      continue
    if not folder.is_dir():
      yield _missing(cfg.data, key, folder)
      continue
    found = _class_folders(folder)
    if not found:
      yield f"config.data.path: {folder} has no class folders"
    if key == "train_split" and train:
      yield from base.check_classes(cfg, len(found))


def _missing(data: schema.Data, key: str, folder: pathlib.Path) -> str:
  """What to say of a split's folder that does not exist."""
  line = f"config.data.{key}: {data.path} has no folder {folder.name!r}"
  root = pathlib.Path(data.path).expanduser()
  if data.eval_split is None and data.eval_fraction is None and (
      _class_folders(root)) and (key == "eval_split" or _has_images(root)):
    return (f"{line}; config.data.eval_fraction=0.2 evaluates on a fifth of "
            "each class's images")
  return f"{line}{base.nearest_folder(folder)}"


def _has_images(root: pathlib.Path) -> bool:
  """Whether a folder below `root` has images directly in it."""
  return any(file.lower().endswith(IMAGE_SUFFIXES)
             for name in _class_folders(root)
             for file in os.listdir(root / name))


def image_files(folder: str, key: str = "config.data.path") -> list[str]:
  """The paths of the images below a folder: folder by folder, each sorted.

  Raises:
    ConfigError: a folder cannot be read, or a link leads to one that contains
      it; the message begins with `key`.
  """

  def fail(e):  # os.walk() would skip a folder that it cannot list.
    raise errors.ConfigError(f"{key}: {folder} cannot be read: {e}") from e

  visited = []
  for where, folders, names in os.walk(folder, followlinks=True, onerror=fail):
    visited.append((where, names))
    for name in folders:
      _check_link(os.path.join(where, name), folder, key)
  found = []
  for where, names in sorted(visited):
    inside = os.path.relpath(where, folder)
    found += [os.path.normpath(os.path.join(inside, name))
              for name in sorted(names)
              if name.lower().endswith(IMAGE_SUFFIXES)]
  return found


def _check_link(path: str, root: str, key: str) -> None:
  """Raises ConfigError if a link below `root` leads to one of its parents."""
  if not os.path.islink(path):
    return
  target, above = os.path.realpath(path), path
  while above != root:
    above = os.path.dirname(above)
    if os.path.realpath(above) == target:
      raise errors.ConfigError(
          f"{key}: {path} is a link to {target}, which contains it")
