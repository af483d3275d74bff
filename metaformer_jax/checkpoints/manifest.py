"""What a saved step consists of, and whether it is intact.

A step is the folder `checkpoints/STEP` with a `manifest.json`, which is written
once everything else is on disk: the size and checksum of every other file, the
shape and dtype of every array, and what the run had counted. A folder without
one is no step (`steps`). Nothing here imports jax, so that a workdir can be
inspected without devices.

A checksum is a SHA-256; on object storage the CRC-32C that the service keeps,
"crc32c:...", so that a step is compared without being read.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from metaformer_jax import errors, storage
from metaformer_jax.config.tasks import Measure
from metaformer_jax.runtime import accounting

NAME = "manifest.json"
STEP = re.compile(r"0|[1-9][0-9]{0,17}")  # The name of a step's folder.
VERSION = 3


class DamagedError(Exception):
  """A step differs from what was saved; names the file and the difference."""


class PartialError(DamagedError):
  """A step has no manifest."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The facts about a complete step.

  Attributes:
    step: optimizer steps taken.
    record: what the run had counted, the values of `accounting.Record`.
    metrics: of this state's evaluation; empty until it is done.
    data: the fingerprint of the data set, JSON values by split; empty if it is
      not known.
    tree: "item/name" -> "dtype[shape]" of every array.
    time: when it was completed, ISO 8601, UTC.
    files: path in the folder -> [bytes, checksum].
  """

  step: int
  record: dict[str, float]
  metrics: dict[str, float]
  data: dict[str, Any]
  tree: dict[str, str]
  time: str
  files: dict[str, list]

  @property
  def n_bytes(self) -> int:
    """Size of the files in bytes."""
    return sum(size for size, _ in self.files.values())

  @property
  def items(self) -> set[str]:
    """The trees that were saved: "params", ..."""
    return {name.partition("/")[0] for name in self.tree}


def write(folder: pathlib.Path, **facts: Any) -> Manifest:
  """Syncs a folder's files to disk, then writes their manifest, atomically.

  Args:
    folder: that becomes a step.
    **facts: the other values of a `Manifest`.
  """
  contents = _contents(folder)
  files = {name: [contents.size(name), contents.checksum(name, sync=True)]
           for name in sorted(contents.names() - {NAME})}
  contents.sync()
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  found = Manifest(time=now, files=files, **facts)
  _replace(folder, found)
  return found


def add_metrics(folder: pathlib.Path, metrics: Mapping[str, float]) -> None:
  """Adds what an evaluation has measured to the manifest of a step.

  Args:
    folder: of the step.
    metrics: by name.

  Raises:
    DamagedError: the step has no manifest, or its manifest has changed.
  """
  try:
    found = read(folder)
  except FileNotFoundError as e:
    raise PartialError(f"has no {NAME}") from e
  _replace(folder, dataclasses.replace(found, metrics=dict(metrics)))


def _replace(folder: pathlib.Path, facts: Manifest) -> None:
  storage.write(folder / NAME, _encode(dataclasses.asdict(facts)))


def verify(folder: pathlib.Path, *, contents: bool = True) -> Manifest:
  """Returns the manifest of a step after comparing the step with it.

  Only regular files of the folder are opened, never links. Additional files
  count as damage, as Orbax might read them; hidden files, which some systems
  create, do not.

  Args:
    folder: of the step.
    contents: compare checksums as well as names and sizes.

  Raises:
    PartialError: it has no manifest.
    DamagedError: it, or its manifest, has changed.
    ConfigError: read permission is missing.
    StorageError: object storage does not answer.
  """
  try:
    return _verify(folder, contents)
  except PermissionError as e:
    raise errors.ConfigError(
        f"{e.filename or folder}: cannot be read: {e.strerror}") from e
  except OSError as e:
    if storage.is_unavailable(e):  # Which says nothing of the step.
      raise errors.StorageError(
          f"{e.filename}: cannot be read: {e.strerror}") from e
    raise DamagedError(f"{e.filename or folder}: {e.strerror or e}") from e


def _verify(folder: pathlib.Path, contents: bool) -> Manifest:
  if folder.is_symlink() or not folder.is_dir():
    raise DamagedError("is not a folder")
  there = _contents(folder)
  names = there.names()
  if NAME not in names:
    raise PartialError(
        f"has no {NAME}: is not a step that a run has completed")
  found = read(folder)
  if STEP.fullmatch(folder.name) and folder.name != str(found.step):
    raise DamagedError(f"{NAME}: belongs to step {found.step}")
  problems = [f"{name}: is missing" for name in found.files.keys() - names]
  problems += [
      f"{name}: was added later" for name in
      names - found.files.keys() - {NAME}
      if not any(part.startswith(".") for part in name.split("/"))]
  for name in found.files.keys() & names:
    size, digest = found.files[name]
    actual = there.size(name)
    if actual != size:
      problems.append(f"{name}: has {actual} bytes, not {size}")
    elif contents and there.checksum(name, digest) != digest:
      problems.append(f"{name}: its checksum differs")
  if problems:
    problems.sort()
    more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
    raise DamagedError("; ".join(problems[:2]) + more)
  return found


def read(folder: pathlib.Path) -> Manifest:
  """Returns the manifest of a step that has been verified."""
  return _decode((folder / NAME).read_bytes())


def ranked(found: dict[int, Manifest], best: Measure) -> list[int]:
  """The steps that have a measure, best last; among equals the newest."""
  sign = 1 if best.higher_is_better else -1
  scores = {step: sign * each.metrics.get(best.name, math.nan)
            for step, each in found.items()}
  return sorted((step for step, score in scores.items()
                 if not math.isnan(score)),
                key=lambda step: (scores[step], step))


def kept(found: dict[int, Manifest], n_last: int, n_best: int,
         best: Measure) -> set[int]:
  """The steps to keep: the newest and the best ones."""
  by_score = ranked(found, best)
  return {*sorted(found)[-n_last:], *by_score[max(0, len(by_score) - n_best):]}


def _contents(folder: pathlib.Path) -> storage.Contents:
  try:
    return storage.Contents(folder)
  except storage.IrregularError as e:
    raise DamagedError(f"{e}: is not a regular file") from e


def _encode(facts: dict[str, Any]) -> bytes:
  """The file's bytes: JSON that includes the digest of its other values."""
  facts = {**facts, "version": VERSION}
  digest = hashlib.sha256(_json(facts)).hexdigest()
  return _json({**facts, "digest": digest}) + b"\n"


def _json(facts: dict[str, Any]) -> bytes:
  return json.dumps(facts, indent=1, sort_keys=True).encode()


def _decode(raw: bytes) -> Manifest:
  """Inverse of `_encode`; DamagedError if a byte has changed."""
  try:
    facts = json.loads(raw)
    version = facts.pop("version")
    del facts["digest"]
    if version != VERSION:
      raise DamagedError(f"{NAME}: has version {version}, not {VERSION}")
    if _encode(facts) != raw:
      raise DamagedError(f"{NAME}: its checksum differs")
    found = Manifest(**facts)
    _check_types(found)
    return found
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as e:
    raise DamagedError(f"{NAME}: cannot be parsed") from e


def _check_types(found: Manifest) -> None:
  """TypeError, ValueError or AttributeError if a value has a wrong type."""
  for count in (found.step, found.record["position"],
                *(size for size, _ in found.files.values())):
    if type(count) is not int or count < 0:
      raise TypeError(count)
  for text in (found.time, *found.data.keys(), *found.tree.values(),
               *(digest for _, digest in found.files.values())):
    if not isinstance(text, str):
      raise TypeError(text)
  if not all(isinstance(split, dict) for split in found.data.values()):
    raise TypeError(found.data)
  for number in (*found.metrics.values(), *found.record.values()):
    if type(number) not in (int, float):
      raise TypeError(number)
  accounting.Record(**found.record)
