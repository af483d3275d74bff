"""Files of COCO annotations, read into a few arrays and checked.

A file is {"images", "annotations", "categories"}, as https://cocodataset.org
describes it. What cannot be meant is an error that says where it is. What
training leaves out, or can do without, is counted in `Index.notes`.
"""

import array
import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import conversion, json_data
from metaformer_jax.data.sources import file_names, objects, outlines

# Four times COCO's training split.
_MAX_BYTES = 2**31

# Of sides and coordinates, which are float32 in the end, and of areas.
_MAX_NUMBER = 2**24
_MAX_AREA = _MAX_NUMBER**2
_MAX_NAME = 4096  # Of a path; Linux's.


@dataclasses.dataclass(frozen=True)
class Index:
  """What a file says.

  Attributes:
    files: N names of the images' files.
    objects: of the images, in their order in the file; those of an image in
      their order as well.
    outlines: of the objects; None if they were not asked for.
    class_names, category_ids: by label; labels are in the order of the ids.
    notes: what is left out, a line for each kind.
  """

  files: file_names.FileNames
  objects: objects.Objects
  outlines: outlines.Chosen | None
  class_names: tuple[str, ...]
  category_ids: tuple[int, ...]
  notes: tuple[str, ...]


def read(path: pathlib.Path, with_outlines: bool = False) -> Index:
  """Reads a file; the same object, if it has not changed since.

  Args:
    path: of the file.
    with_outlines: whether "segmentation" is read, too; of COCO's training split
      it takes most of the memory.

  Raises:
    ConfigError: the file is unreadable or not as described; says where.
  """
  try:
    found = path.stat()
  except OSError as e:
    raise errors.ConfigError(f"config.data.path: {path}: {e}") from e
  # Large files take many seconds, and a run opens the data several times.
  return _read(path, with_outlines, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=2)
def _read(path: pathlib.Path, with_outlines: bool, *stamp: int) -> Index:
  del stamp
  parts = {"images": _Images(), "categories": _Categories(),
           "annotations": _Annotations(with_outlines)}
  where, seen = f"config.data.path: {path}", set()
  try:
    # Tools on Windows begin a file with U+FEFF.
    text = json_data.read_text(path, _MAX_BYTES).removeprefix("\ufeff")
    for key, i, item in json_data.members(text):
      if key not in parts:
        continue
      seen.add(key)
      if i is None and item != []:
        raise ValueError(f"its {key!r} are not a list")
      if i is not None:
        _add(parts[key], key, i, item)
    missing = [key for key in parts if key not in seen]
    if missing:
      raise ValueError(f"has no {', no '.join(map(repr, missing))}, which COCO "
                       "files have")
    return _index(*parts.values())
  except (OSError, ValueError) as e:
    raise errors.ConfigError(
        f"{where}: cannot be used: {errors.one_line(e)}") from e


def _add(part: Any, key: str, i: int, item: Any) -> None:
  """Adds an item of a list; a ValueError says which one it is."""
  try:
    if not isinstance(item, dict):
      raise ValueError("is not an object in braces")
    part.add(item)
  except ValueError as e:
    known = item.get("id") if isinstance(item, dict) else None
    numbered = f" (id {conversion.shown(known)})" if known is not None else ""
    raise ValueError(f"{key}[{i}]{numbered} {e}") from e


def _index(images: "_Images", categories: "_Categories",
           annotations: "_Annotations") -> Index:
  """Joins the parts of a file; ValueError if they do not fit."""
  if not images.ids:
    raise ValueError("it has no images")
  files = file_names.FileNames(images.files)
  sizes = np.array(images.sizes, np.int32).reshape(-1, 2)
  order, image_ids = _sorted("images", images.ids)
  of_image = order[_places(annotations, "image_id", image_ids, "images")]
  order, category_ids = _sorted("categories", categories.ids)
  labels = _places(annotations, "category_id", category_ids, "categories")
  _sorted("annotations", annotations.ids)
  rows = np.argsort(of_image, kind="stable")
  starts = np.searchsorted(of_image[rows], np.arange(len(files) + 1))
  found = objects.Objects(
      np.array(images.ids, np.int64), sizes, starts,
      np.array(annotations.boxes).reshape(-1, 4)[rows],
      labels[rows].astype(np.int32), np.array(annotations.areas)[rows],
      np.array(annotations.crowd, bool)[rows],
      np.array(annotations.ignored, bool)[rows])
  notes, segments = _notes(found, rows), None
  if annotations.outlines is not None:
    segments, unusable = annotations.outlines.build(sizes[of_image])
    notes += unusable
    segments = outlines.Chosen(segments, rows)
  return Index(files, found, segments,
               tuple(categories.names[i] for i in order),
               tuple(category_ids.tolist()), tuple(notes))


def _sorted(key: str, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
  """Their order, and the sorted ids; ValueError if one is there twice."""
  values = np.array(ids, np.int64)
  order = np.argsort(values, kind="stable")
  values = values[order]
  twice = np.flatnonzero(values[1:] == values[:-1])
  if len(twice):
    one, other = order[twice[0]:twice[0] + 2]
    raise ValueError(f"{key}[{one}] and {key}[{other}] have the same id, "
                     f"{values[twice[0]]}")
  return order, values


def _places(annotations: "_Annotations", key: str, ids: np.ndarray,
            kind: str) -> np.ndarray:
  """Where the ids that annotations name are among the sorted ones of a kind."""
  named = np.array(getattr(annotations, f"{key}s"), np.int64)
  places = np.searchsorted(ids, named)
  wrong = np.flatnonzero(ids.take(places, mode="clip") != named
                         if len(ids) else np.ones(len(named), bool))
  if len(wrong):
    i = wrong[0]
    raise ValueError(f"annotations[{i}] (id {annotations.ids[i]}) has the "
                     f"{key} {named[i]}, which is not an id of the {kind}"
                     f"{_and_more(len(wrong))}")
  return places


def _notes(found: objects.Objects, rows: np.ndarray) -> list[str]:
  """Lines about the boxes that training leaves out."""
  lines = []
  for wrong, what in (
      (found.is_large & ~found.is_inside, "have no part of their images"),
      (~found.is_large, "are less than a pixel wide or high, or have no "
       "area")):
    if wrong.any():
      lines.append(f"{wrong.sum():,} boxes {what}, the first in annotations["
                   f"{rows[wrong].min()}]; training leaves them out")
  return lines


def _and_more(n: int) -> str:
  return f"; so do {n - 1:,} more" if n > 1 else ""


class _Images:
  """The ids, file names and sizes of the images."""

  def __init__(self):
    self.ids, self.sizes = array.array("q"), array.array("q")
    self.files: list[bytes] = []

  def add(self, item: dict[str, Any]) -> None:
    self.ids.append(_integer(item, "id"))
    self.files.append(_file_name(item))
    for key in ("height", "width"):
      side = _integer(item, key)
      if not 0 < side <= _MAX_NUMBER:
        raise ValueError(f"has the {key} {side}")
      self.sizes.append(side)


class _Categories:
  """The ids and names of the classes."""

  def __init__(self):
    self.ids, self.names = array.array("q"), []

  def add(self, item: dict[str, Any]) -> None:
    self.ids.append(_integer(item, "id"))
    name = _value(item, "name")
    if not isinstance(name, str) or not name.strip():
      raise ValueError(f"has the name {conversion.shown(name)}, which is not a "
                       "text")
    conversion.check_text(name)
    if name in self.names:
      raise ValueError(f"has the name {conversion.shown(name)}, which "
                       f"categories[{self.names.index(name)}] has, too")
    self.names.append(name)


class _Annotations:
  """The columns of all annotations, in the order of the file."""

  def __init__(self, with_outlines: bool):
    self.ids, self.image_ids, self.category_ids = (
        array.array("q") for _ in range(3))
    self.boxes, self.areas = array.array("d"), array.array("d")
    self.crowd, self.ignored = array.array("b"), array.array("b")
    self.outlines = outlines.Builder() if with_outlines else None

  def add(self, item: dict[str, Any]) -> None:
    self.ids.append(_integer(item, "id"))
    self.image_ids.append(_integer(item, "image_id"))
    self.category_ids.append(_integer(item, "category_id"))
    box, area = _box(item), item.get("area")
    self.boxes.extend(box)
    self.areas.append(box[2] * box[3] if area is None else _area(area))
    self.crowd.append(_flag(item, "iscrowd"))
    self.ignored.append(_flag(item, "ignore"))
    if self.outlines is not None:
      self.outlines.add(item.get("segmentation"))


def _value(item: dict[str, Any], key: str) -> Any:
  if key not in item:
    raise ValueError(f"has no {key}")
  return item[key]


def _integer(item: dict[str, Any], key: str) -> int:
  """An integer, also one that is written as 3.0."""
  value = _value(item, key)
  if isinstance(value, float) and value.is_integer():
    value = int(value)
  if type(value) is not int or abs(value) >= 2**63:
    raise ValueError(f"has the {key} {conversion.shown(value)}, which is not "
                     "an integer")
  return value


def _area(area: Any) -> float:
  if type(area) not in (int, float) or not abs(area) <= _MAX_AREA:
    raise ValueError(f"has the area {conversion.shown(area)}, which is not a "
                     "number of pixels")
  return float(area)


def _box(item: dict[str, Any]) -> list[float]:
  box = _value(item, "bbox")
  if type(box) is not list or len(box) != 4 or not all(
      type(v) in (int, float) and abs(v) <= _MAX_NUMBER for v in box):
    raise ValueError(f"has the bbox {conversion.shown(box)}, which is not four "
                     "numbers")
  if box[2] < 0 or box[3] < 0:
    raise ValueError(f"has the bbox {conversion.shown(box)} of negative size; "
                     "a bbox is left, top, width and height")
  return box


def _flag(item: dict[str, Any], key: str) -> bool:
  value = item.get(key)
  if value is None:
    return False
  if value not in (False, True):
    raise ValueError(f"has the {key} {conversion.shown(value)}, which is "
                     "neither 0 nor 1")
  return bool(value)


def _file_name(item: dict[str, Any]) -> bytes:
  """The path of an image below the folder of the images."""
  name = _value(item, "file_name")
  if not isinstance(name, str) or not name or len(name) > _MAX_NAME:
    raise ValueError(f"has the file_name {conversion.shown(name)}, which is "
                     "not a file's name")
  conversion.check_text(name)
  path = pathlib.PurePosixPath(name)
  if path.is_absolute() or ".." in path.parts:
    raise ValueError(f"has the file_name {conversion.shown(name)}, which is "
                     "not inside of the folder of images")
  return os.fsencode(name)
