"""Folders of images with a label map for each: ADE20K's, and a user's own.

A folder has images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png; images and
label maps may be in further folders, the same in both. The label of a pixel is
the number in its label map.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import ade20k, schema
from metaformer_jax.data import images
from metaformer_jax.data.sources import (
  base,
  file_names,
  fingerprints,
  folders,
)

# The folder that ADE20K's archive unpacks to.
_ADE20K = "ADEChallengeData2016"

# What the folders of images and of label maps are called; the first pair of
# which both are there is used.
_FOLDERS = [(one, other) for one in ("images", "img_dir", "image", "imgs")
            for other in ("annotations", "ann_dir", "labels", "masks", "mask")]

# The file with the names of the classes, one on each line, the first of class
# 0, or with task.reduce_zero_label of label 1.
CLASSES_FILE = "classes.txt"

# Labels are uint8, and 255 marks what is ignored.
_MAX_CLASSES = 255


class LabelMaps:
  """Images and the label maps of the same names, sorted by them.

  A record is {"image": bytes, "label": bytes, "path": of the image}.
  """

  def __init__(self, image_root: pathlib.Path, label_root: pathlib.Path,
               classes: base.Classes, part: folders.Part | None = None,
               max_pixels: int = schema.Data.max_pixels):
    """Finds the images below one folder and the label maps below the other.

    Args:
      image_root, label_root: of a split.
      classes: of the labels.
      part: of the images, to which the source is restricted.
      max_pixels: of an image; the size of one with more is not known.

    Raises:
      ConfigError: a folder cannot be read, two images or label maps have the
        same name, an image has no label map, or the reverse.
    """
    self._roots = os.fspath(image_root), os.fspath(label_root)
    self.n_classes, self.class_names = classes
    self._max_pixels = max_pixels
    named = _by_name(image_root, folders.IMAGE_SUFFIXES)
    labels = _by_name(label_root, (".png",))
    _check_pairs(image_root, named, label_root, labels)
    names = list(named)
    if part:
      if len(names) < 2:
        raise errors.ConfigError(
            f"config.data.eval_fraction: {image_root} has one image, of which "
            "none can be held out")
      names = part.of(names)
    self._files = tuple(
        file_names.FileNames(os.fsencode(found[name]) for name in names)
        for found in (named, labels))
    self._sizes: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self._files[0])

  def path(self, index: int) -> str:
    """The path of an image; the file is not opened."""
    return self._path(0, index)

  def _path(self, kind: int, index: int) -> str:
    """The path of an image (0) or of a label map (1)."""
    return os.path.join(self._roots[kind],
                        os.fsdecode(self._files[kind][index]))

  def __getitem__(self, index: int) -> base.Record:
    path = self.path(index)
    return {"path": path, "image": folders.read_file(path),
            "label": folders.read_file(self._path(1, index))}

  def fingerprint(self) -> dict[str, str]:
    """`fingerprints.files` of images and label maps."""
    return fingerprints.files(*zip(self._roots, self._files))

  def sizes(self) -> np.ndarray:
    """Heights and widths of the images by their headers: int32 [N, 2].

    0 where a header cannot be read. Headers are read at the first call only.
    """
    if self._sizes is None:
      with futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(self._size, range(len(self))))
      self._sizes = np.array(found, np.int32).reshape(-1, 2)
    return self._sizes

  def _size(self, index: int) -> tuple[int, int]:
    try:
      with folders.opened(self.path(index)) as file:
        return images.size(file, self._max_pixels)
    except Exception:  # Of many types; the loader will say what is wrong.
      return 0, 0


def _by_name(root: pathlib.Path, suffixes: Sequence[str]) -> dict[str, str]:
  """The files below a folder with such suffixes, by their names without it."""
  found, twice = {}, []
  for file in folders.image_files(os.fspath(root)):
    name, suffix = os.path.splitext(file)
    if suffix.lower() not in suffixes:
      continue
    if name in found:
      twice.append((found[name], file))
    found[name] = file
  if twice:
    one, other = twice[0]
    raise errors.ConfigError(
        f"config.data.path: {root} has {one} and {other}, which have the same "
        f"name{_and_more(len(twice))}")
  if not found:
    kind = "label maps" if tuple(suffixes) == (".png",) else "images"
    raise errors.ConfigError(
        f"config.data.path: {root} has no {kind} ({', '.join(suffixes)})")
  return dict(sorted(found.items()))


def _check_pairs(image_root: pathlib.Path, named: dict[str, str],
                 label_root: pathlib.Path, labels: dict[str, str]) -> None:
  """Raises ConfigError unless both have the same names."""
  problems = []
  for own, other, root, kind in (
      (named, labels, label_root, "label map"),
      (labels, named, image_root, "image")):
    alone = [file for name, file in own.items() if name not in other]
    if alone:
      problems.append(f"{root} has no {kind} for {alone[0]}"
                      f"{_and_more(len(alone))}")
  if problems:
    raise errors.ConfigError(f"config.data.path: {'; '.join(problems)}")


def _and_more(n: int) -> str:
  return f", and {n - 1:,} more" if n > 1 else ""


class Splits(NamedTuple):
  """Where the splits of a data set are: folders of images and of label maps.

  Attributes:
    train: the training split.
    evaluation: the evaluation split; None if it is a part of `train`.
  """

  train: tuple[pathlib.Path, pathlib.Path]
  evaluation: tuple[pathlib.Path, pathlib.Path] | None


def splits(data: schema.Data) -> Splits:
  """Finds the folders of the splits, which need not exist.

  By default a split is the first of `folders.TRAIN` or `folders.EVAL` that is
  among the folders of images. Without an evaluation split,
  `data.eval_fraction` of the training split's images is held out.

  Raises:
    ConfigError: a folder cannot be read.
  """
  root = _root(data)
  try:
    names = next((pair for pair in _FOLDERS
                  if all((root / name).is_dir() for name in pair)), _FOLDERS[0])
    found = [name or next((n for n in known if (root / names[0] / n).is_dir()),
                          None)
             for name, known in ((data.train_split, folders.TRAIN),
                                 (data.eval_split, folders.EVAL))]
  except OSError as e:
    raise errors.ConfigError(f"config.data.path: {data.path}: {e}") from e
  if found[1] is None and data.eval_fraction is None:
    found[1] = folders.EVAL[0]
  where = [split and tuple(root / name / split for name in names)
           for split in (found[0] or folders.TRAIN[0], found[1])]
  return Splits(*where)


def _root(data: schema.Data) -> pathlib.Path:
  """The folder that holds the images' folder."""
  root = pathlib.Path(data.path).expanduser()
  if data.source == "ade20k" and (root / _ADE20K).is_dir():
    return root / _ADE20K
  return root


def create(data: schema.Data, train: bool) -> LabelMaps:
  """Opens the training or the evaluation split.

  Raises:
    ConfigError: a folder is missing or cannot be read, or its files do not
      match.
  """
  where = splits(data)
  part = None if where.evaluation else folders.Part(
      data.eval_fraction, data.eval_seed, held_out=not train)
  roots = where.evaluation if where.evaluation and not train else where.train
  return LabelMaps(*roots, classes(data), part, data.max_pixels)


def classes(data: schema.Data) -> base.Classes:
  """ADE20K's classes, or those that `CLASSES_FILE` names.

  Raises:
    ConfigError: the file cannot be read, or has a blank line, a name twice or
      too many.
  """
  if data.source == "ade20k":
    return base.Classes(len(ade20k.CLASSES), ade20k.CLASSES)
  path = os.path.join(_root(data), CLASSES_FILE)
  if not os.path.lexists(path):
    return base.Classes(None, None)
  where = f"config.data.path: {path}"
  try:
    text = folders.read_file(path).decode("utf-8-sig")
  except (OSError, UnicodeDecodeError) as e:
    raise errors.ConfigError(f"{where} cannot be read as UTF-8: {e}") from e
  names = [line.strip() for line in text.rstrip("\r\n").split("\n")]
  if not text.strip():
    raise errors.ConfigError(f"{where} is empty; give a name of a class on "
                             "each line")
  for number, name in enumerate(names, 1):
    first = names.index(name) + 1
    if not name or first < number:
      problem = f"repeats {name!r} of line {first}" if name else "is blank"
      raise errors.ConfigError(f"{where}: line {number} {problem}")
  if len(names) > _MAX_CLASSES:
    raise errors.ConfigError(f"{where} names {len(names)} classes; label maps "
                             f"have up to {_MAX_CLASSES}")
  return base.Classes(len(names), tuple(names))


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on folders of label maps.

  Args:
    cfg: the experiment.
    files: whether the data must be on this machine.
    train: whether the training split must be there, too.
  """
  yield from base.check_path(
      cfg.data, files, "give the folder that holds images/ and annotations/",
      _check_inside(cfg, train))


def _check_inside(cfg: schema.Experiment, train: bool) -> Iterator[str]:
  found = classes(cfg.data)
  if found.n is not None:
    yield from base.check_classes(cfg, found.n)
  where = splits(cfg.data)
  wanted = {"eval_split": where.evaluation}
  if train or where.evaluation is None:
    wanted = {"train_split": where.train} | wanted
  for key, roots in wanted.items():
    yield from check_split(cfg.data, key, roots or ())


def check_split(data: schema.Data, key: str,
                roots: Sequence[pathlib.Path]) -> Iterator[str]:
  """Yields a line if one of a split's folders does not exist."""
  missing = next((root for root in roots if not root.is_dir()), None)
  if missing:
    advice = base.nearest_folder(missing)
    if key == "eval_split" and data.eval_split is None:
      advice = ("; config.data.eval_fraction=0.2 evaluates on a fifth of the "
                "training images")
    yield (f"config.data.{key}: {_root(data)} has no folder "
           f"'{missing.parent.name}/{missing.name}'{advice}")
