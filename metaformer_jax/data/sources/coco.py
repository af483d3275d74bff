"""Objects in the form of COCO: folders of images, and a JSON file per split.

The file of a split is, by the names that COCO and common tools give it,

    annotations/instances_SPLIT.json    COCO, CVAT
    annotations/SPLIT.json
    SPLIT/_annotations.coco.json        Roboflow

and the images are in SPLIT/, images/SPLIT/, images/, or where the names in the
file begin.
"""

import itertools
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import (
  base,
  coco_json,
  fingerprints,
  folders,
  objects,
  outlines,
)

_FILES = ("annotations/instances_{}.json", "annotations/{}.json",
          "{}/_annotations.coco.json")
_FOLDERS = ("{}", "images/{}", "images", ".")

# What data sets call their splits; the first one that is there is used.
_TRAIN = ("train2017", *folders.TRAIN, "default")
_EVAL = ("val2017", *folders.EVAL)

# Images of which one must be there; the loader reports others that are not.
_LOOKED_AT = 100


class Coco(objects.Source):
  """A split. A record is as `base` describes those with boxes."""

  def __init__(self, index: coco_json.Index, root: pathlib.Path,
               chosen: np.ndarray | None = None):
    """Takes what the file says, the folder of images, and the images' indices.

    Args:
      index: of all images in the file.
      root: the names of files are relative to it.
      chosen: int [N], the images that the source is of; None: all.
    """
    files, found, segments = index.files, index.objects, index.outlines
    if chosen is not None:
      files = files[chosen]
      if segments is not None:
        segments = outlines.Chosen(segments.segments,
                                   segments.rows[found.rows_of(chosen)])
      found = found.subset(chosen)
    outlined = None if segments is None else segments.exist()
    super().__init__(found, index.class_names, index.category_ids, outlined,
                     segments)
    self._root, self._files = os.fspath(root), files

  def path(self, index: int) -> str:
    """The path of an image; the file is not opened."""
    return os.path.join(self._root, os.fsdecode(self._files[index]))

  def __getitem__(self, index: int) -> base.Record:
    path = self.path(index)
    record = {"path": path, "image": folders.read_file(path),
              **self.objects.record(index)}
    if self.segments is not None:
      record["segments"] = [self.segments[row] for row in
                            self.objects.rows(index)]
    return record

  def fingerprint(self) -> dict[str, str]:
    """`fingerprints.files` of the images, and a digest of the objects."""
    return {**fingerprints.files((self._root, self._files)),
            **super().fingerprint()}


def create(data: schema.Data, train: bool, with_outlines: bool = False) -> Coco:
  """Opens the training or the evaluation split.

  Without an evaluation split, `data.eval_fraction` of the training images is
  held out.

  Args:
    data: the section.
    train: whether it is the training split.
    with_outlines: whether records have "segments".

  Raises:
    ConfigError: a file is missing, or is not as COCO's; or none of the images
      that were looked for are there.
  """
  key, name = _split(data, train)
  file = _file(data, key, name)
  index = coco_json.read(file, with_outlines)
  root = _image_root(data, file, name, index)
  source = Coco(index, root, _part(data, train, file, index))
  if train:
    objects.report(file, (*index.notes, *source.missing()))
  return source


def _part(data: schema.Data, train: bool, file: pathlib.Path,
          index: coco_json.Index) -> np.ndarray | None:
  """The images of a split, if it is a part of the training split's file."""
  if _split(data, train=False)[0] == "eval_split":
    return None
  if len(index.files) < 2:
    raise errors.ConfigError(
        f"config.data.eval_fraction: {file} has one image, of which none can "
        "be held out")
  names = list(map(os.fsdecode, index.files))
  part = set(folders.Part(data.eval_fraction, data.eval_seed,
                          held_out=not train).of(names))
  return np.flatnonzero([name in part for name in names])


def classes(data: schema.Data, with_outlines: bool = False) -> base.Classes:
  """The classes of the training split; arguments and errors as for `create`."""
  index = coco_json.read(_file(data, *_split(data, train=True)), with_outlines)
  return base.Classes(len(index.class_names), index.class_names)


def has_split(data: schema.Data, train: bool) -> bool:
  """Whether a split has a file; ConfigError if a folder cannot be read."""
  _, name = _split(data, train)
  return name is not None and bool(_files(data, name))


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on a COCO data set.

  Args:
    cfg: the experiment.
    files: whether the data must be on this machine.
    train: whether the training split must be there, too.
  """
  yield from base.check_path(
      cfg.data, files, "give the folder that holds annotations/ and the images",
      _check_inside(cfg, train))


def _check_inside(cfg: schema.Experiment, train: bool) -> Iterator[str]:
  with_outlines = cfg.task.has_masks
  if train:
    yield from create(cfg.data, True, with_outlines).check()
    yield from base.check_classes(cfg, classes(cfg.data, with_outlines).n)
  create(cfg.data, False, with_outlines)


def _split(data: schema.Data, train: bool) -> tuple[str, str | None]:
  """The key of a split, and its name: as set, or the first that is there.

  It is that of the training split if the evaluation split is a part of it.
  """
  key = "train_split" if train else "eval_split"
  name = getattr(data, key) or next(
      (name for name in (_TRAIN if train else _EVAL) if _files(data, name)),
      None)
  if name is None and not train and data.eval_fraction is not None:
    return _split(data, train=True)
  return key, name


def _files(data: schema.Data, name: str) -> list[pathlib.Path]:
  """The files of a split that exist."""
  root = pathlib.Path(data.path).expanduser()
  try:
    return [root / file.format(name) for file in _FILES
            if (root / file.format(name)).is_file()]
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"config.data.path: {data.path}: {e}") from e


def _file(data: schema.Data, key: str, name: str | None) -> pathlib.Path:
  """The file of a split; ConfigError says what was looked for."""
  if name and (found := _files(data, name)):
    return found[0]
  names = [name] if name else _TRAIN if key == "train_split" else _EVAL
  *others, last = (file.format("SPLIT") for file in _FILES)
  wanted = "the split " + names[0] if name else (
      f"SPLIT in {', '.join(names)}")
  hint = _other_splits(pathlib.Path(data.path).expanduser(), name)
  if key == "eval_split" and name is None:
    hint += ("; config.data.eval_fraction=0.2 evaluates on a fifth of the "
             "training images")
  raise errors.ConfigError(
      f"config.data.{key}: {data.path} has no {', no '.join(others)} and no "
      f"{last} for {wanted}{hint}")


def _other_splits(root: pathlib.Path, name: str | None) -> str:
  """A hint: the names of splits that have a file."""
  found = {}
  for pattern in _FILES:
    start, end = pattern.split("{}")
    for path in root.glob(pattern.format("*")):
      inside = path.relative_to(root).as_posix()
      found.setdefault(path, inside.removeprefix(start).removesuffix(end))
  if name or not found:
    return errors.did_you_mean(name or "", found.values())
  return f"; there are the splits {', '.join(sorted(set(found.values()))[:12])}"


def _image_root(data: schema.Data, file: pathlib.Path, name: str,
                index: coco_json.Index) -> pathlib.Path:
  """The folder in which one of the first images is; ConfigError if none is."""
  first = list(map(os.fsdecode, index.files[:_LOOKED_AT]))
  root = pathlib.Path(data.path).expanduser()
  roots = [root / folder.format(name) for folder in _FOLDERS]
  for folder, image in itertools.product(roots, first):
    if os.path.isfile(folder / image):
      return folder
  raise errors.ConfigError(
      f"config.data.path: {file} names images as {first[0]!r}, but none of the "
      f"first {len(first)} is in "
      f"{', '.join(folder.format(name) for folder in _FOLDERS[:-1])} or "
      f"{data.path} itself")
