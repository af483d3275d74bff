"""Class folders of images, as ImageNet is commonly stored."""

import os
import pathlib
import re
import stat
from collections.abc import Iterator

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import base

_MAX_IMAGE_BYTES = 2**30  # Encoded; ImageNet's largest file has 15 million.


# Those of torchvision's ImageFolder.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif",
                  ".tiff", ".webp")


class ClassFolders:
  """A folder with a folder of images per class.

  Classes are numbered in the order of their sorted names, as in torchvision's
  ImageFolder and timm; images are sorted within a class. One array holds all
  names, so that millions take little memory and are cheap to send to workers.
  """

  def __init__(self, root: pathlib.Path, classes: list[str]):
    """Finds the images of `classes`.

    Raises:
      ConfigError: `root` cannot be read, has a class folder that is not in
        `classes`, or one without images.
    """
    self._root = os.fspath(root)
    self.n_classes = len(classes)
    present = set(class_names(root))
    unknown = sorted(present.difference(classes))
    if unknown:
      nearest = errors.did_you_mean(unknown[0], classes)
      raise errors.ConfigError(
          f"config.data.path: {root} has the class {unknown[0]!r}, which the "
          f"training split does not have{nearest}")
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
    """The path of an image; the file is not opened."""
    return os.path.join(self._root, os.fsdecode(self._files[index]))

  def __getitem__(self, index: int) -> base.Record:
    path = self.path(index)
    return {"image": _read_file(path), "label": int(self._labels[index]),
            "path": path}


def _read_file(path: str) -> bytes:
  """A file's bytes; OSError if it is a pipe, a device or far too large."""

  def at_once(path, flags):  # Opening a pipe would wait for a writer.
    return os.open(path, flags | os.O_NONBLOCK)

  with open(path, "rb", opener=at_once) as f:
    found = os.fstat(f.fileno())
    if not stat.S_ISREG(found.st_mode):
      raise OSError(f"{path} is not a regular file")
    if found.st_size > _MAX_IMAGE_BYTES:
      raise OSError(f"{path} has {found.st_size} bytes, too many for an image")
    return f.read()


def class_names(root: pathlib.Path) -> list[str]:
  """The sorted names of the class folders; hidden folders do not count."""
  try:
    names = sorted(e.name for e in os.scandir(root)
                   if e.is_dir() and not e.name.startswith("."))
  except OSError as e:
    raise errors.ConfigError(
        f"config.data.path: {root} cannot be read: {e}") from e
  if not names:
    raise errors.ConfigError(f"config.data.path: {root} has no class folders")
  return names


def create(data: schema.Data, train: bool, numbered: bool) -> ClassFolders:
  """Opens a split.

  Args:
    data: `path`, `train_split` and `eval_split`.
    train: the training split; else the evaluation split.
    numbered: a folder's name is the number of its class.

  Raises:
    ConfigError: a folder is missing, cannot be read or has a wrong name.
  """
  root = pathlib.Path(data.path).expanduser()
  train_folder, eval_folder = (root / split for split in _splits(data).values())
  split_root = train_folder if train else eval_folder
  if numbered:  # As ImageNet-V2: 0 to 999.
    names = class_names(split_root)
    for name in names:
      if not re.fullmatch(r"0|[1-9]\d{0,5}", name):
        raise errors.ConfigError(
            f"config.data.eval_split: {split_root} has the folder {name!r}, "
            "which is not the number of a class")
    return ClassFolders(split_root, [
        str(i) for i in range(1 + max(map(int, names)))])
  # The training split's folders number the classes of both splits: a class
  # without evaluation images must not shift those after it.
  return ClassFolders(split_root, class_names(train_folder))


def classes(data: schema.Data) -> base.Classes:
  """The classes of the training split, without a look at the images.

  Raises:
    ConfigError: as `create`.
  """
  if not data.path:
    raise errors.ConfigError("config.data.path: is missing")
  names = class_names(
      pathlib.Path(data.path).expanduser() / _splits(data)["train_split"])
  return base.Classes(len(names), names)


def check(cfg: schema.Experiment, files: bool) -> Iterator[str]:
  """Yields a line per mistake in an experiment on class folders."""
  if not cfg.data.path:
    yield (f"config.data.path: {cfg.data.path!r} with source folder; give the "
           "folder that holds train/ and val/")
  elif files:
    yield from base.check_folder(cfg.data, _check_splits(cfg))


def _splits(data: schema.Data) -> dict[str, str]:
  """The folder of each split, by its key in the config; training first."""
  return {"train_split": data.train_split or "train",
          "eval_split": data.eval_split or "val"}


def _check_splits(cfg: schema.Experiment) -> Iterator[str]:
  root = pathlib.Path(cfg.data.path).expanduser()
  for key, split in _splits(cfg.data).items():
    folder = root / split
    if not folder.is_dir():
      yield (f"config.data.{key}: {cfg.data.path} has no folder {split!r}"
             f"{base.nearest_folder(folder)}")
      continue
    found = [p for p in folder.iterdir()
             if p.is_dir() and not p.name.startswith(".")]
    if not found:
      yield f"config.data.path: {folder} has no class folders"
    if key == "train_split":
      yield from base.check_classes(cfg, len(found))


def _image_files(folder: str) -> list[str]:
  """The images below a class folder: folder by folder, each sorted."""

  def fail(e):  # os.walk() would skip a folder that it cannot list.
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
  """Raises ConfigError if a link below `root` leads to one of its parents."""
  if not os.path.islink(path):
    return
  target, above = os.path.realpath(path), path
  while above != root:
    above = os.path.dirname(above)
    if os.path.realpath(above) == target:
      raise errors.ConfigError(
          f"config.data.path: {path} is a link to {target}, which contains it")
