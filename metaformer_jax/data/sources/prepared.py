"""Data sets that `tools.prepare` wrote: few large files, read by index.

A folder has for each split an index, train.json, and the ArrayRecord files
train-00000-of-00016.array_record, ... that it names. A record is a map in
MessagePack, for example {"image": bytes, "label": bytes, "path": bytes}. The
files are read from any place, of which many small files would be slow.

Of objects, the boxes are in train.safetensors (`objects.save`), and outlines in
train.outlines.safetensors (`outline_files.save`), so that images can be chosen,
and detections measured, without reading the records; these have the images and
their outlines.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np

from metaformer_jax import errors, storage
from metaformer_jax.config import json_data, paths, schema
from metaformer_jax.data.sources import (
  array_records,
  base,
  fingerprints,
  folders,
  objects,
  outline_files,
)

_VERSION = 1

# Each record alone, as it is read by index. Images are compressed already.
_OPTIONS = "group_size:1,uncompressed"

# What a record is, by the task that needs it.
_RECORDS = {"segmentation": "label_maps", "detection": "objects"}

# Of an index: ten million images.
_MAX_INDEX_BYTES = 2**28

_AGAIN = array_records.AGAIN


@dataclasses.dataclass(frozen=True)
class Index:
  """What train.json says of a split.

  Attributes:
    records: what a record is: "label_maps" or "objects".
    shards: the number of records of each file.
    class_names: by class; None if they have no names.
    reduce_zero_label: 0 in label maps is what has no class.
    sizes: (height, width) of each image.
    version: of this format.
  """

  records: str
  shards: list[int]
  class_names: list[str] | None
  reduce_zero_label: bool
  sizes: list[list[int]]
  version: int = _VERSION


class _Shard(NamedTuple):
  """A file as `array_records.Records` takes it."""

  filename: str
  skip: int
  take: int
  examples_in_shard: int


def _shard_path(folder: pathlib.Path, split: str, i: int, n: int) -> str:
  return os.fspath(folder / f"{split}-{i:05}-of-{n:05}.array_record")


# What the names of the files of objects end with: of boxes, and of outlines.
TABLE, OUTLINES = ".safetensors", ".outlines.safetensors"


def write(folder: pathlib.Path, split: str,
          shards: Iterable[Iterable[tuple[Mapping[str, Any], Any]]],
          n_shards: int, description: Mapping[str, Any],
          others: Callable[[], Mapping[str, bytes]] = dict) -> Index:
  """Writes a split into a folder; the same records give the same bytes.

  Args:
    folder: it must exist.
    split: its name in the names of the files.
    shards: for each file (record, size of its image), ...
    n_shards: how many files there are.
    description: the other attributes of the index.
    others: gives the contents of further files by the ends of their names,
      TABLE and OUTLINES, when all records are written.

  Raises:
    OSError, RuntimeError: a file cannot be written.
  """
  from array_record.python import array_record_module  # noqa: PLC0415  Linux.

  counts, sizes = [], []
  for i, records in enumerate(shards):
    path = _shard_path(folder, split, i, n_shards)
    writer = array_record_module.ArrayRecordWriter(path, _OPTIONS)
    counts.append(0)
    for record, size in records:
      writer.write(msgpack.packb(record))
      counts[-1] += 1
      sizes.append([int(side) for side in size])
    writer.close()
    with open(path, "rb+") as file:
      os.fsync(file.fileno())
  for end, content in others().items():
    _write_file(folder / f"{split}{end}", content)
  index = Index(shards=counts, sizes=sizes, **description)
  # Last: a split without an index is not a split.
  _write_file(folder / f"{split}.json", json.dumps(
      dataclasses.asdict(index), separators=(",", ":")).encode())
  return index


def _write_file(path: pathlib.Path, content: bytes) -> None:
  with open(path, "wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())


class _Records:
  """The records of a split, with their paths as texts."""

  def __init__(self, folder: pathlib.Path, split: str, index: Index):
    """Takes an index; raises ConfigError if a file is not as it says."""
    n = len(index.shards)
    self._paths = [_shard_path(folder, split, i, n) for i in range(n)]
    self._records = array_records.Records([
        _Shard(path, 0, count, count)
        for path, count in zip(self._paths, index.shards)])

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = msgpack.unpackb(self._records[index])
    return {**record, "path": os.fsdecode(record["path"])}

  def fingerprint(self) -> dict[str, str]:
    """`fingerprints.files` of the files that the records are in."""
    folder = os.path.dirname(self._paths[0])
    names = [os.fsencode(os.path.basename(path)) for path in self._paths]
    return fingerprints.files((folder, names))


class Prepared:
  """A split of label maps, with the records that it was made of."""

  def __init__(self, records: _Records, index: Index):
    names = index.class_names
    self.n_classes = len(names) if names else None
    self.class_names = names and tuple(names)
    self._sizes = np.array(index.sizes, np.int32).reshape(-1, 2)
    self._records = records

  def __len__(self) -> int:
    return len(self._sizes)

  def __getitem__(self, index: int) -> base.Record:
    return self._records[index]

  def sizes(self) -> np.ndarray:
    """Heights and widths of the images: int32 [N, 2]."""
    return self._sizes

  def fingerprint(self) -> dict[str, str]:
    """The records' files, and a digest of the images' sizes."""
    return {**self._records.fingerprint(),
            "sizes of images": fingerprints.arrays(self._sizes)}


class PreparedObjects(objects.Source):
  """A split of objects, with the records that it was made of."""

  def __init__(self, records: _Records, *args: Any):
    """Takes the arguments of `objects.Source` as well."""
    super().__init__(*args)
    self._records = records

  def __getitem__(self, index: int) -> base.Record:
    record = self._records[index] | self.objects.record(index)
    segments = record.pop("segments")
    if self.outlined is not None:
      record["segments"] = json.loads(segments)
    return record

  def fingerprint(self) -> dict[str, str]:
    """The records' files, and a digest of the objects."""
    return {**self._records.fingerprint(), **super().fingerprint()}


def _split(data: schema.Data, train: bool) -> str:
  """The name of a split: what the config says, or the first that is there."""
  named = data.train_split if train else data.eval_split
  names = folders.TRAIN if train else folders.EVAL
  root = _folder(data)
  return named or next((name for name in names
                        if (root / f"{name}.json").is_file()), names[0])


def _folder(data: schema.Data) -> pathlib.Path:
  return paths.given("config.data.path", data.path)


def _here(path: pathlib.Path) -> pathlib.Path:
  """A local file with the content: the same, or a copy that is made once."""
  try:
    return storage.fetched(path, bool) if storage.is_remote(path) else path
  except OSError as e:
    raise errors.ConfigError(
        f"config.data.path: {path} cannot be copied to this machine: "
        f"{e.strerror or errors.one_line(e)}") from e


def _read_index(data: schema.Data, train: bool) -> tuple[str, Index]:
  """The name and the index of a split; ConfigError if it is not one."""
  split = _split(data, train)
  path = _folder(data) / f"{split}.json"
  where = f"config.data.path: {path}"
  if not path.exists():
    raise errors.ConfigError(
        f"{where}: does not exist; give a folder that python -m "
        "metaformer_jax.tools.prepare wrote")
  try:
    tree = json_data.read(_here(path), _MAX_INDEX_BYTES)
    version = tree.get("version") if isinstance(tree, dict) else None
    if version != _VERSION:
      raise ValueError(f"has version {version!r} of the format, not {_VERSION}")
    index = Index(**tree)
    _check_types(index)
  except (OSError, TypeError, ValueError) as e:
    raise errors.ConfigError(
        f"{where}: is not the index of a prepared data set: "
        f"{errors.one_line(e)}; {_AGAIN}") from e
  return split, index


def _check_types(index: Index) -> None:
  """Raises ValueError if a value of an index is not as `Index` says."""

  def counts(values, low):
    return isinstance(values, list) and all(
        type(v) is int and low <= v < 2**31 for v in values)

  names = index.class_names
  good = {
      "records": index.records in _RECORDS.values(),
      "shards": counts(index.shards, 0) and len(index.shards) > 0,
      "class_names": names is None or (
          isinstance(names, list) and all(type(v) is str for v in names)),
      "reduce_zero_label": type(index.reduce_zero_label) is bool,
      "sizes": isinstance(index.sizes, list) and all(
          counts(v, 1) and len(v) == 2 for v in index.sizes)}
  for name, is_good in good.items():
    if not is_good:
      raise ValueError(f"{name} has another form")
  if not 0 < sum(index.shards) == len(index.sizes):
    raise ValueError(f"it has {len(index.sizes)} sizes of "
                     f"{sum(index.shards)} images")


def create(data: schema.Data, train: bool,
           with_outlines: bool = False) -> Prepared | PreparedObjects:
  """Opens the training or the evaluation split.

  Args:
    data: the section.
    train: whether it is the training split.
    with_outlines: whether records of objects have "segments".

  Raises:
    ConfigError: the index or a file of it is missing or damaged.
  """
  folder = _folder(data)
  split, index = _read_index(data, train)
  records = _Records(folder, split, index)
  if index.records == "label_maps":
    return Prepared(records, index)
  source = _objects(folder, split, records, index, with_outlines, train)
  if train:
    objects.report(folder / f"{split}.json", tuple(source.missing()))
  return source


def _objects(folder: pathlib.Path, split: str, records: _Records, index: Index,
             with_outlines: bool, train: bool) -> PreparedObjects:
  """A split of objects; in training, the outlines are those of the records."""
  outlined, segments = None, None
  path = folder / f"{split}{TABLE}"
  try:
    found, ids = objects.load(_here(path))
    if found.sizes.tolist() != index.sizes:
      raise ValueError("it has images of other sizes than the index")
    if len(ids) != len(index.class_names or ()):
      raise ValueError(f"it has {len(ids)} classes, and the index others")
    if with_outlines:
      path = folder / f"{split}{OUTLINES}"
      if not path.exists():
        raise ValueError("it does not exist, and masks need it")
      segments = None if train else outline_files.load(_here(path))
      outlined = (outline_files.exist(_here(path)) if train else
                  segments.exist())
      if len(outlined) != len(found.boxes):
        raise ValueError(f"it has {len(outlined)} outlines of "
                         f"{len(found.boxes)} objects")
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"config.data.path: {path}: cannot be used: "
                             f"{errors.one_line(e)}; {_AGAIN}") from e
  return PreparedObjects(records, found, index.class_names, ids, outlined,
                         segments)


def classes(data: schema.Data) -> base.Classes:
  """The classes of the training split; ConfigError as for `create`."""
  _, index = _read_index(data, train=True)
  names = index.class_names
  return base.Classes(len(names), tuple(names)) if names else base.Classes(
      None, None)


def reduces_zero_label(data: schema.Data) -> bool:
  """Whether 0 has no class; ConfigError as for `create`."""
  return _read_index(data, train=True)[1].reduce_zero_label


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on a prepared data set.

  Args:
    cfg: the experiment.
    files: whether the data must be on this machine.
    train: whether the training split must be there, too.
  """
  yield from base.check_path(
      cfg.data, files, "give the folder that tools.prepare wrote",
      _check_inside(cfg, train), remote=True)


def _check_inside(cfg: schema.Experiment, train: bool) -> Iterator[str]:
  wanted, found = _RECORDS.get(cfg.task.name), _read_index(cfg.data, train)[1]
  if wanted not in (None, found.records):
    yield (f"config.data.path: {cfg.data.path} has {found.records}, but "
           f"{cfg.task.name} needs {wanted}")
    return
  if train:
    source = create(cfg.data, True, cfg.task.has_masks)
    if found.records == "objects":
      yield from source.check()
    n = classes(cfg.data).n
    if n is not None:
      yield from base.check_classes(cfg, n)
  create(cfg.data, False, cfg.task.has_masks)
