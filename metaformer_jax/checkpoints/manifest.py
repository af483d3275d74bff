"""What a saved step consists of, and whether all of it is still there.

A step is the folder `checkpoints/STEP`. It gets that name when everything in
it is on the disk, last of all `manifest.json`: the size and SHA-256 of every
other file, the shape and dtype of every array, and where the run was. What has
no manifest was never complete. Nothing here imports jax, so that a workdir can
be looked at without devices.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

from metaformer_jax import errors

NAME = "manifest.json"
ASIDE = "damaged"  # The folder beside the steps for those that are.
VERSION = 1

_STEP = re.compile(r"0|[1-9][0-9]{0,17}")
_UNFINISHED = re.compile(
    r"[0-9]+\.(?:saving.*|deleting|orbax-checkpoint-tmp.*)")


class DamagedError(Exception):
  """A step is not what was saved; says which file, and what is wrong."""


class PartialError(DamagedError):
  """A step has no manifest."""


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What is known of a complete step.

  Attributes:
    step: optimizer steps done.
    position: training examples consumed: where the data goes on.
    metrics: of this state's evaluation; empty if there was none.
    totals: what the run has counted over its restarts.
    tree: "item/name" -> "dtype[shape]" of every array.
    time: when it was complete, ISO 8601, UTC.
    files: path in the folder -> [bytes, SHA-256].
  """

  step: int
  position: int
  metrics: dict[str, float]
  totals: dict[str, float]
  tree: dict[str, str]
  time: str
  files: dict[str, list]

  @property
  def n_bytes(self) -> int:
    """Size of the files, in bytes."""
    return sum(size for size, _ in self.files.values())

  @property
  def items(self) -> set[str]:
    """The trees that were saved: "params", ..."""
    return {name.partition("/")[0] for name in self.tree}


def write(folder: pathlib.Path, **facts: Any) -> Manifest:
  """Measures a folder's files, puts them on the disk, then their manifest.

  Args:
    folder: to become a step.
    **facts: the other values of a `Manifest`.
  """
  files = {}
  for name in sorted({*_walk(folder)} - {NAME}):
    with open(folder / name, "rb") as f:
      files[name] = [_size(folder / name), _digest(f)]
      os.fsync(f.fileno())
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  found = Manifest(time=now, files=files, **facts)
  with open(folder / NAME, "wb") as f:
    f.write(_encode(dataclasses.asdict(found)))
    f.flush()
    os.fsync(f.fileno())
  for part, _, _ in os.walk(folder):
    sync(part)
  return found


def sync(folder: str | pathlib.Path) -> None:
  """Puts on the disk which entries a folder has."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def verify(folder: pathlib.Path, *, contents: bool = True) -> Manifest:
  """Returns the manifest of a step, once all of the step agrees with it.

  Only files that the folder is found to hold are opened, and no links. More
  files are damage as well, as Orbax might read them, but for the hidden ones
  that systems leave.

  Args:
    folder: of the step.
    contents: compare the checksums; else names and sizes only.

  Raises:
    PartialError: it has no manifest.
    DamagedError: it, or its manifest, is not as it was written.
    ConfigError: permission is missing.
  """
  try:
    return _verify(folder, contents)
  except PermissionError as e:
    raise errors.ConfigError(
        f"{e.filename or folder}: cannot be read: {e.strerror}") from e
  except OSError as e:
    raise DamagedError(f"{e.filename or folder}: {e.strerror or e}") from e


def _verify(folder: pathlib.Path, contents: bool) -> Manifest:
  if folder.is_symlink() or not folder.is_dir():
    raise DamagedError("is not a folder")
  names = set(_walk(folder))
  if NAME not in names:
    raise PartialError(
        f"has no {NAME}: it was never complete, or an earlier version saved it")
  found = read(folder)
  if _STEP.fullmatch(folder.name) and folder.name != str(found.step):
    raise DamagedError(f"{NAME}: is that of step {found.step}")
  problems = [f"{name}: is missing" for name in found.files.keys() - names]
  problems += [
      f"{name}: was not saved with it" for name in
      names - found.files.keys() - {NAME}
      if not any(part.startswith(".") for part in name.split("/"))]
  for name in found.files.keys() & names:
    size, digest = found.files[name]
    actual = _size(folder / name)
    if actual != size:
      problems.append(f"{name}: has {actual} bytes, not {size}")
    elif contents:
      with open(folder / name, "rb") as f:
        if _digest(f) != digest:
          problems.append(f"{name}: its checksum differs")
  if problems:
    problems.sort()
    more = f"; and {len(problems) - 2} more" if len(problems) > 2 else ""
    raise DamagedError("; ".join(problems[:2]) + more)
  return found


def read(folder: pathlib.Path) -> Manifest:
  """Returns the manifest of a step that was verified."""
  return _decode((folder / NAME).read_bytes())


def steps(checkpoints: pathlib.Path) -> list[int]:
  """The steps that a folder has entries for, whole or not, ascending."""
  try:
    names = os.listdir(checkpoints)
  except FileNotFoundError:
    return []
  except OSError as e:
    raise errors.ConfigError(
        f"{checkpoints}: cannot be read: {e.strerror}") from e
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def survey(checkpoints: pathlib.Path, *, contents: bool = False,
           ) -> tuple[dict[int, Manifest], dict[int, DamagedError]]:
  """The complete steps of a folder, and the others with what is wrong."""
  good, bad = {}, {}
  for step in steps(checkpoints):
    folder = checkpoints / str(step)
    try:
      good[step] = verify(folder, contents=contents)
    except DamagedError as e:
      if os.path.lexists(folder):  # Else it was deleted meanwhile.
        bad[step] = e
  return good, bad


def ranked(found: dict[int, Manifest], metric: str) -> list[int]:
  """The steps that have a metric, the highest last; of equals the newest."""
  scores = {step: each.metrics.get(metric, math.nan)
            for step, each in found.items()}
  return sorted((step for step, score in scores.items()
                 if not math.isnan(score)),
                key=lambda step: (scores[step], step))


def kept(found: dict[int, Manifest], last: int, best: int,
         metric: str) -> set[int]:
  """The steps to keep: the `last` newest, and the `best` best besides."""
  by_score = ranked(found, metric)
  return {*sorted(found)[-last:], *by_score[max(0, len(by_score) - best):]}


def set_aside(folder: pathlib.Path) -> pathlib.Path:
  """Moves a step out of the way, where nothing reads it; returns where to."""
  aside = folder.parent / ASIDE
  aside.mkdir(exist_ok=True)
  for i in itertools.count():
    target = aside / (f"{folder.name}.{i}" if i else folder.name)
    if not os.path.lexists(target):
      os.rename(folder, target)
      sync(aside)
      sync(folder.parent)
      return target


def damaged(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """What `set_aside` moved."""
  folder = checkpoints / ASIDE
  if folder.is_symlink() or not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir()
                if re.fullmatch(r"[0-9]+(\.[0-9]+)?", p.name))


def remove(folder: pathlib.Path) -> None:
  """Deletes a step; cut off, what is left is no step."""
  leaving = folder.with_name(f"{folder.name}.deleting")
  if os.path.lexists(leaving):
    discard(leaving)
  os.rename(folder, leaving)
  discard(leaving)


def discard(path: pathlib.Path) -> None:
  """Deletes a folder, file or link; follows no link."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


def unfinished(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """What is left of saves and deletions that were cut off."""
  if not checkpoints.is_dir():
    return []
  return sorted(p for p in checkpoints.iterdir()
                if _UNFINISHED.fullmatch(p.name))


def _walk(folder: str | pathlib.Path, prefix: str = "") -> Iterator[str]:
  """Yields the paths in a folder of its files, which must be regular ones."""
  with os.scandir(folder) as entries:
    for entry in entries:
      name = prefix + entry.name
      if entry.is_dir(follow_symlinks=False):
        yield from _walk(entry.path, f"{name}/")
      elif entry.is_file(follow_symlinks=False):
        yield name
      else:
        raise DamagedError(f"{name}: is not a regular file")


def _size(path: pathlib.Path) -> int:
  return path.stat().st_size


def _digest(file) -> str:
  return hashlib.file_digest(file, "sha256").hexdigest()


def _encode(facts: dict[str, Any]) -> bytes:
  """The file's bytes: JSON that contains the digest of its other values."""
  facts = {**facts, "version": VERSION}
  digest = hashlib.sha256(_json(facts)).hexdigest()
  return _json({**facts, "digest": digest}) + b"\n"


def _json(facts: dict[str, Any]) -> bytes:
  return json.dumps(facts, indent=1, sort_keys=True).encode()


def _decode(raw: bytes) -> Manifest:
  """The inverse of `_encode`; DamagedError where a byte is not as written."""
  try:
    facts = json.loads(raw)
    version = facts.pop("version")
    del facts["digest"]
    if version != VERSION:
      raise DamagedError(f"{NAME}: is of version {version}, not {VERSION}")
    if _encode(facts) != raw:
      raise DamagedError(f"{NAME}: its checksum differs")
    found = Manifest(**facts)
    _check_types(found)
    return found
  except (ValueError, KeyError, TypeError, AttributeError,
          RecursionError) as e:
    raise DamagedError(f"{NAME}: cannot be understood") from e


def _check_types(found: Manifest) -> None:
  """TypeError, ValueError or AttributeError where a value cannot be."""
  for count in (found.step, found.position,
                *(size for size, _ in found.files.values())):
    if type(count) is not int or count < 0:
      raise TypeError(count)
  for text in (found.time, *found.tree.values(),
               *(digest for _, digest in found.files.values())):
    if not isinstance(text, str):
      raise TypeError(text)
  for number in (*found.metrics.values(), *found.totals.values()):
    if type(number) not in (int, float):
      raise TypeError(number)
