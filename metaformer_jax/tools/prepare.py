r"""Writes a data set of many small files as few large ones, for pods:

    python -m metaformer_jax.tools.prepare --source=ade20k \
        --path=data/ADEChallengeData2016 --output=data/ade20k

The output is a new folder with ArrayRecord files, which are read by index from
any place; train on it with --config.data.source=array_record and
--config.data.path. The records have the files' bytes: the examples are the same
bit for bit.

    python -m metaformer_jax.tools.prepare --stage \
        --path=gs://BUCKET/imagenet --output=/mnt/ssd/imagenet

copies any data set from a bucket to this machine, as it is, and compares the
checksum of each file; a complete copy is recognised by names and sizes.

Each image, and label map, is decoded once. If one cannot be used, it is named,
and nothing is written, unless --skip_bad leaves it out. The folder gets its
name when it is complete; its bytes depend on the data and --shards only.
"""

import abc
import argparse
import itertools
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from metaformer_jax import command, errors
from metaformer_jax.config import paths, schema, tasks
from metaformer_jax.convert import files
from metaformer_jax.data import sources
from metaformer_jax.data.sources import (
  base,
  coco,
  label_maps,
  objects,
  outline_files,
  prepared,
)
from metaformer_jax.data.transforms import detection, segmentation
from metaformer_jax.tools import staging

log = logging.getLogger("metaformer_jax.tools.prepare")

# Examples that are decoded at a time.
_AT_ONCE = 64

# Bad examples that are named.
_NAMED = 10


class _Split(abc.ABC):
  """A split that is being written; subclasses know its kind of records.

  Attributes:
    kept: the indices of the examples that were written.
    n_bad: how many could not be used.
  """

  def __init__(self, source: base.Source, data: schema.Data):
    self.source, self.data = source, data
    self._root = pathlib.Path(data.path).expanduser()
    self.kept: list[int] = []
    self.n_bad = 0

  @abc.abstractmethod
  def description(self) -> dict[str, Any]:
    """The attributes of the index, as for `prepared.write`."""

  @abc.abstractmethod
  def packed(self, record: base.Record) -> tuple[dict[str, Any], Any]:
    """What is written of a record, and the size of its image.

    Raises:
      Exception: the record cannot be used.
    """

  def others(self) -> dict[str, bytes]:
    """Further files, as for `prepared.write`."""
    return {}

  def shards(self, n: int) -> Iterator[Iterator[tuple[dict[str, Any], Any]]]:
    """The records of each of n files, with the sizes of their images."""
    total = len(self.source)
    for i in range(n):
      yield self._records(range(i * total // n, (i + 1) * total // n))

  def _records(self, indices: range):
    with futures.ThreadPoolExecutor() as pool:
      left = iter(indices)
      while part := list(itertools.islice(left, _AT_ONCE)):
        for i, (record, size, reason) in zip(part, pool.map(self._read, part)):
          if reason:
            self._name(reason)
          else:
            self.kept.append(i)
            yield record, size

  def _read(self, index: int) -> tuple[dict[str, Any], Any, str]:
    """A record, its image's size, and why it is bad, or ""."""
    record = {}
    try:
      record = self.source[index]
      packed, size = self.packed(record)
    except Exception as e:
      path = record.get("path") or self.source.path(index)
      return {}, None, errors.one_line(f"{path}: {type(e).__name__}: {e}")
    inside = os.path.relpath(record["path"], self._root)
    return {**packed, "path": os.fsencode(inside)}, size, ""

  def _name(self, reason: str) -> None:
    self.n_bad += 1
    if self.n_bad <= _NAMED:
      log.warning("%s", reason)
    elif self.n_bad == _NAMED + 1:
      log.warning("further bad examples are counted but not named")


class _LabelMaps(_Split):
  """A split of label maps."""

  def __init__(self, source: base.Source, data: schema.Data,
               reduce_zero_label: bool):
    super().__init__(source, data)
    self._task = tasks.Segmentation(num_classes=source.n_classes or 255,
                                    reduce_zero_label=reduce_zero_label)

  def description(self) -> dict[str, Any]:
    return {"records": "label_maps", "class_names": self.source.class_names,
            "reduce_zero_label": self._task.reduce_zero_label}

  def packed(self, record: base.Record) -> tuple[dict[str, Any], Any]:
    image, _ = segmentation.decode(record, self.data, self._task)
    return dict(record), image.shape[:2]


class _Objects(_Split):
  """A split of objects: boxes in a table, images and outlines in records."""

  def description(self) -> dict[str, Any]:
    return {"records": "objects", "class_names": self.source.class_names,
            "reduce_zero_label": False}

  def packed(self, record: base.Record) -> tuple[dict[str, Any], Any]:
    image, _, _ = detection.decode(record, self.data, self.source.n_classes)
    segments = json.dumps(record["segments"], separators=(",", ":"))
    return {"image": record["image"],
            "segments": segments.encode()}, image.shape[:2]

  def others(self) -> dict[str, bytes]:
    kept = np.array(self.kept, int)
    found = self.source.objects.subset(kept)
    segments = (self.source.segments[row] for row in
                self.source.objects.rows_of(kept))
    sizes = np.repeat(found.sizes, np.diff(found.starts), axis=0)
    return {prepared.TABLE: objects.save(found, self.source.category_ids),
            prepared.OUTLINES: outline_files.save(segments, sizes)}


def main(args: argparse.Namespace) -> None:
  """Writes the folder that the command line asks for."""
  if args.stage:
    staging.stage(args.path, paths.local("--output", args.output).absolute())
    return
  output = _output(args.output)
  data = schema.Data(source=args.source, path=args.path,
                     train_split=args.train_split, eval_split=args.eval_split,
                     max_pixels=args.max_pixels)
  try:
    for problem in base.check_folder(data, _check_inside(data)):
      raise errors.ConfigError(problem)
    _write_all(output, data, args)
  except errors.ConfigError as e:
    raise errors.ConfigError(str(e).replace("config.data.", "--")) from e


def _check_inside(data: schema.Data) -> Iterator[str]:
  if data.source == "coco":
    coco.classes(data, with_outlines=True)
  else:
    yield from label_maps.check_split(data, "train_split",
                                      label_maps.splits(data).train)


def _evaluation(data: schema.Data) -> str | None:
  """Why there is no evaluation split; None if there is one."""
  if data.source == "coco":
    return None if coco.has_split(data, train=False) else (
        f"{data.path} has no file of one")
  folder = label_maps.splits(data).evaluation[0]
  return None if folder.is_dir() else f"{folder} does not exist"


def _write_all(output: pathlib.Path, data: schema.Data,
               args: argparse.Namespace) -> None:
  """Writes all splits into another folder, which then is renamed."""
  missing = _evaluation(data)
  partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
  try:
    try:
      partial.mkdir(parents=True)
      _write(partial, "train", data, args)
      if missing:
        log.warning("%s: there is no evaluation split", missing)
      else:
        _write(partial, "val", data, args)
      os.replace(partial, output)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  except (OSError, RuntimeError) as e:  # The latter from array_record.
    raise errors.StorageError(
        f"--output: {output} cannot be written: {errors.one_line(e)}") from e


def _write(folder: pathlib.Path, name: str, data: schema.Data,
           args: argparse.Namespace) -> None:
  """Writes a split; raises DataError if examples are bad and not skipped."""
  source = sources.create(data, "train" if name == "train" else "eval",
                          task=tasks.Detection(head="mask_rcnn"))
  split = _Objects(source, data) if data.source == "coco" else _LabelMaps(
      source, data,
      args.reduce_zero_label or sources.reduces_zero_label(data))
  n_shards = min(args.shards, len(source))
  index = prepared.write(folder, name, split.shards(n_shards), n_shards,
                         split.description(), split.others)
  n = len(index.sizes)
  if split.n_bad and not args.skip_bad:
    raise errors.DataError(
        f"{split.n_bad} of {len(source)} examples of {name} cannot be used, "
        "and nothing was written; mend them, or leave them out with --skip_bad")
  if not n:
    raise errors.DataError(f"no example of {name} can be used")
  log.info("%s: %d examples in %d files, %d left out", name, n, n_shards,
           split.n_bad)


def _output(name: str) -> pathlib.Path:
  """The new folder; ConfigError if something is in its place."""
  output = paths.local("--output", name).absolute()
  try:
    files.check_new(output)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--output: {e}") from e
  return output


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "prepare")
  parser.add_argument("--source", choices=("ade20k", "coco", "label_maps"),
                      help="the form of the data, as in config.data.source")
  parser.add_argument("--path", required=True, help="as in config.data.path")
  parser.add_argument("--stage", action="store_true",
                      help="copy a folder from gs:// instead; any data set")
  parser.add_argument("--output", required=True, help="a new folder")
  parser.add_argument("--train_split", help="as in config.data")
  parser.add_argument("--eval_split", help="as in config.data")
  parser.add_argument("--max_pixels", type=count,
                      default=schema.Data.max_pixels, help="as in config.data")
  parser.add_argument("--shards", type=count, default=16,
                      help="files of each split")
  parser.add_argument("--reduce_zero_label", action="store_true",
                      help="0 in label maps is what has no class; always so "
                      "in ade20k")
  parser.add_argument("--skip_bad", action="store_true",
                      help="leave out examples that cannot be used")
  args = parser.parse_args(argv)
  others = [f"--{name}" for name, value in vars(args).items()
            if name not in ("path", "output", "stage")
            and value != parser.get_default(name)]
  if args.stage and others:
    parser.error(f"--stage copies files as they are, without {others[0]}")
  if not args.stage and not args.source:
    parser.error("--source is required, or --stage")
  return args


def count(text: str) -> int:
  """A positive integer; argparse names the function in its error."""
  if (value := int(text)) < 1:
    raise ValueError
  return value


def console() -> None:
  """The command metaformer-prepare."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
