"""The protocol of a data set, random access by index, and shared checks.

A classification record is {"image", "label"}: the image either encoded, as
bytes, or uint8 [H, W] or [H, W, 3]; the label an int; and, if there is a file,
its "path", by which a bad image is reported. Several threads read a source, and
it is pickled to worker processes.

A record with a label map has "label" encoded as well, or as integers [H, W],
and its source `sizes()`: heights and widths of the images by their headers,
int32 [N, 2], 0 where a header cannot be read.

A record with objects has "boxes": float32 [n, 4], left, top, right and bottom
in pixels of the image; "labels": int32 [n]; "size": (height, width), which the
boxes are meant for; and, if masks are needed, "segments", their outlines as
COCO has them: polygons, an RLE, or None for one that training with masks leaves
out. Its source has `class_names`; `category_ids`, the numbers of the classes in
COCO files; `sizes()`; `has_objects()`, bool [N]; and `annotations()`, the data
set as a COCO file has it, which the evaluation measures against: {"images",
"annotations", "categories"}, its images in the order of the records, its
annotations with "segmentation" if masks are needed.
"""

import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from metaformer_jax import errors, storage
from metaformer_jax.config import paths, schema
from metaformer_jax.data.sources import fingerprints

Record = Mapping[str, Any]

# How data on gs:// is used that is not read from there.
ELSEWHERE = ("mount the bucket, as launch/tpu_vm.py does, or copy the data to "
             "this machine by tools.prepare --stage")


class Classes(NamedTuple):
  """The classes of a data set.

  Attributes:
    n: labels are below it; None if the source cannot know.
    names: one for each, by label; None if they have none.
  """

  n: int | None
  names: Sequence[str] | None


class Source(Protocol):
  """What the loader needs of a data set.

  Attributes:
    n_classes: of the labels, which are below it in classification; None if the
      source cannot know. A source may also have `class_names`, one for each.

  It may have `fingerprint()`, facts that tell its data from other data, besides
  number and classes: JSON values by what they are, as of `fingerprints.files`.
  A run compares them with those of its checkpoint, and between its processes.
  """

  @property
  def n_classes(self) -> int | None: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class MapSource(Source, Protocol):
  """A source of label maps."""

  def sizes(self) -> np.ndarray: ...


class ObjectSource(MapSource, Protocol):
  """A source of objects."""

  @property
  def category_ids(self) -> Sequence[int | None]: ...

  def has_objects(self) -> np.ndarray: ...

  def annotations(self) -> dict[str, Any]: ...


class _Renumbered:
  """A source whose classes have other numbers."""

  def __init__(self, source: Source, numbers: Sequence[int], n_classes: int):
    """`numbers` are the new ones, by the source's own."""
    self._source, self._numbers = source, numbers
    self.n_classes = n_classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    record = self._source[index]
    return {**record, "label": self._numbers[record["label"]]}

  def fingerprint(self) -> dict[str, Any]:
    return fingerprints.of(self._source)


class _RenumberedMaps(_Renumbered):
  """The same for a source of label maps; "numbers" are the classes' new ones.

  A label map is decoded, and renumbered, in the transform.
  """

  _source: MapSource

  def __getitem__(self, index: int) -> Record:
    return {**self._source[index], "numbers": self._numbers}

  def sizes(self) -> np.ndarray:
    return self._source.sizes()


class _RenumberedObjects(_Renumbered):
  """The same for a source of objects.

  `category_ids` are None for the classes that the source does not have.
  """

  _source: ObjectSource

  def __init__(self, source: ObjectSource, numbers: Sequence[int],
               n_classes: int):
    super().__init__(source, numbers, n_classes)
    self._array = np.array(numbers, np.int32)
    ids = dict(zip(numbers, source.category_ids))
    self.category_ids = tuple(ids.get(i) for i in range(n_classes))

  def __getitem__(self, index: int) -> Record:
    record = self._source[index]
    return {**record, "labels": self._array[record["labels"]]}

  def sizes(self) -> np.ndarray:
    return self._source.sizes()

  def has_objects(self) -> np.ndarray:
    return self._source.has_objects()

  def annotations(self) -> dict[str, Any]:
    return self._source.annotations()


class Grouped:
  """A source whose records have their index and that of their group."""

  def __init__(self, source: Source, groups: Sequence[np.ndarray]):
    """Takes the indices of each group's examples; -1 is the group of others."""
    self._source = source
    self._numbers = np.full(len(source), -1, np.int32)
    for number, group in enumerate(groups):
      self._numbers[group] = number

  @property
  def n_classes(self) -> int | None:
    return self._source.n_classes

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    return {**self._source[index], "index": index,
            "group": int(self._numbers[index])}


def renumbered(source: Source, names: Sequence[str]) -> Source:
  """The source with its classes numbered as in `names`.

  Raises:
    ConfigError: it has a class that is not among the names.
  """
  own = getattr(source, "class_names", None)
  if own is None or tuple(own) == tuple(names):
    return source
  check_names(own, names, "the data")
  numbers = {name: i for i, name in enumerate(names)}
  kind: Callable[..., Source] = (
      _RenumberedObjects if hasattr(source, "annotations") else
      _RenumberedMaps if hasattr(source, "sizes") else _Renumbered)
  return kind(source, [numbers[name] for name in own], len(names))


def check_names(own: Iterable[str], names: Iterable[str], where: Any) -> None:
  """Raises ConfigError if a class of the data is not among the names."""
  unknown = sorted(set(own).difference(names))
  if unknown:
    raise errors.ConfigError(
        f"config.task.class_names: {where} has the class {unknown[0]!r}, which "
        f"is not one of them{errors.did_you_mean(unknown[0], names)}; None "
        "takes the classes of the training data")


def check_path(data: schema.Data, files: bool, advice: str,
               inside: Iterable[str], hint: str = "",
               remote: bool = False) -> Iterator[str]:
  """Yields a line if `data.path` is missing, else those of `check_folder`.

  Args:
    data: its `path` may be None or empty.
    files: whether the folder must be on this machine.
    advice: what the path must name, for one that is missing.
    inside, hint, remote: as for `check_folder`.
  """
  if not data.path:
    yield f"config.data.path: {data.path!r} with source {data.source}; {advice}"
  elif files:
    yield from check_folder(data, inside, hint, remote)


def check_folder(data: schema.Data, inside: Iterable[str] = (),
                 hint: str = "", remote: bool = False) -> Iterator[str]:
  """Yields a line if `data.path` is not a folder, else those of `inside`.

  Args:
    data: its `path` is set.
    inside: further checks; not iterated over if there is no folder.
    hint: where to get the folder; by default the nearest existing folder.
    remote: whether the source also reads gs://.
  """
  assert data.path is not None
  is_remote = storage.is_remote(data.path)
  if "://" in data.path and not (remote and is_remote):
    yield (f"config.data.path: {data.path} is not a local folder, which source "
           f"{data.source} needs" + (f"; {ELSEWHERE}" if is_remote else
                                     f", or a {storage.SCHEME} URL" if remote
                                     else ""))
    return
  try:
    root = paths.given("config.data.path", data.path)
    if root.is_dir():
      yield from inside
    else:
      hint = hint or ("; no object is in it, or there is no such bucket"
                      if is_remote else nearest_folder(root))
      yield f"config.data.path: {data.path} is not a folder{hint}"
  except errors.ConfigError as e:
    yield str(e)
  except OSError as e:  # A folder inside cannot be read.
    yield f"config.data.path: {data.path}: {e}"


def check_classes(cfg: schema.Experiment, n_classes: int) -> Iterator[str]:
  """Yields a line if the training data has another number of classes."""
  outputs = cfg.task.num_classes
  if outputs not in (None, n_classes):
    yield (f"config.task.num_classes: {outputs}, but the training data has "
           f"{n_classes} classes; set it to {n_classes}, or to None")


def nearest_folder(path: pathlib.Path) -> str:
  """A hint: the folder most like the first component that does not exist."""
  while not path.parent.is_dir():
    path = path.parent
  siblings = [p.name for p in path.parent.iterdir() if p.is_dir()]
  if not siblings:
    return f"; {path.parent} has no folders"
  return f" (in {path.parent}{errors.did_you_mean(path.name, siblings)})"
