"""Copies a data set from gs:// to this machine: `tools.prepare --stage`."""

import itertools
import logging
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from typing import Any

from metaformer_jax import errors, storage
from metaformer_jax.config import paths

log = logging.getLogger("metaformer_jax.tools.prepare")

# Files that are copied at a time, by threads of this name; blocks of 16 MiB of
# each are in memory.
_AT_ONCE, _THREADS = 16, "staging"
# Files that wait for it.
_QUEUED = 4096

# Seconds for which a file is tried again while the service does not answer.
_PATIENCE = 300.0

# Seconds between two lines of progress.
_INTERVAL = 10.0

_DISK_BLOCK = 4096


def stage(path: str, output: pathlib.Path) -> None:
  """Copies all that is in a folder; the copy gets its name when it is complete.

  The checksum of each file is compared with the service's CRC-32C. A folder
  that has the same names and sizes already is left as it is.

  Args:
    path: gs://BUCKET/FOLDER.
    output: a new or empty folder.

  Raises:
    ConfigError: there is nothing to copy, or it cannot be listed; a name
      cannot be that of a file; or the output is something else.
    StorageError: the disk is too small, or a file cannot be read or written.
  """
  source = _source(path)
  try:
    objects = source.objects()
  except OSError as e:
    raise errors.ConfigError(
        f"--path: {path} cannot be listed: {_reason(e)}") from e
  if not objects:
    raise errors.ConfigError(
        f"--path: {path}: no object is in it, or there is no such bucket")
  _check_names(path, objects)
  if _is_copied(output, path, objects):
    return
  _check_space(output, objects)
  partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
  try:
    _copy(source, objects, partial)
    os.sync()
    os.replace(partial, output)
    storage.sync(output.parent)
  except OSError as e:
    name = f"{e.filename}: " if e.filename else ""
    raise errors.StorageError(
        f"--output: {output} was not made: {name}{_reason(e)}; free or repair "
        "what it says, and start again") from e
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  log.info("%s is a copy of %s: %d files, %s", output, path, len(objects),
           _bytes(sum(facts.size for facts in objects.values())))


def _source(path: str) -> Any:
  if not storage.is_remote(path):
    raise errors.ConfigError(
        f"--path: {path} is not on {storage.SCHEME}, and --stage copies from "
        "there; use a local folder as it is")
  return paths.given("--path", path)


def _check_names(path: str, names: Mapping[str, Any]) -> None:
  """Raises ConfigError unless all names can be those of files."""
  for name in names:
    parts = name.split("/")
    if {"", ".", ".."} & {*parts} or "\0" in name or any(
        len(os.fsencode(part)) > 255 for part in parts):
      raise errors.ConfigError(
          f"--path: {path} has the object {name!r:.300}, whose name cannot be "
          "that of a file; delete or rename it")
    for n in range(1, len(parts)):
      if (folder := "/".join(parts[:n])) in names:
        raise errors.ConfigError(
            f"--path: {path} has the object {folder!r:.300}, and others in a "
            "folder of that name; delete or rename it")


def _is_copied(output: pathlib.Path, path: str,
               objects: Mapping[str, Any]) -> bool:
  """Whether there is the copy; ConfigError if there is something else."""
  if not output.exists() or (output.is_dir() and not any(output.iterdir())):
    return False
  if different := _difference(output, objects):
    raise errors.ConfigError(
        f"--output: {output} exists and is no copy of {path}: {different}; "
        "delete it, or name a new folder")
  log.info("%s is a copy of %s already: %d files of the same sizes", output,
           path, len(objects))
  return True


def _difference(output: pathlib.Path, objects: Mapping[str, Any]) -> str:
  """What a folder does not share with what it may be a copy of, or ""."""
  if not output.is_dir():
    return "it is a file"
  try:
    found = storage.Contents(output)
  except storage.IrregularError as e:
    return f"{str(e)!r:.300} is not a regular file"
  names = found.names()
  for name in sorted(names | objects.keys()):
    if name not in names:
      return f"{name!r:.300} is missing"
    if name not in objects:
      return f"{name!r:.300} is not in the bucket"
    if found.size(name) != objects[name].size:
      return f"{name!r:.300} has another size"
  return ""


def _check_space(output: pathlib.Path, objects: Mapping[str, Any]) -> None:
  """Raises StorageError if the files do not fit on the disk."""
  needed = sum(-(-facts.size // _DISK_BLOCK) * _DISK_BLOCK
               for facts in objects.values())
  parent = paths.existing_parent(output)
  free = shutil.disk_usage(parent).free
  if needed > free:
    raise errors.StorageError(
        f"--output: {parent} has {_bytes(free)} of free space, and the data "
        f"needs {_bytes(needed)}; free space, or name a folder on another disk")


def _copy(source: Any, objects: Mapping[str, Any],
          target: pathlib.Path) -> None:
  """Copies files; raises what the first failure raises."""
  target.mkdir(parents=True)
  for folder in sorted({name.rpartition("/")[0] for name in objects}):
    (target / folder).mkdir(parents=True, exist_ok=True)

  def copy(name: str) -> int:
    storage.persist(lambda: (source / name).download(
        target / name, objects[name]), _PATIENCE, f"copying {name}")
    return objects[name].size

  names, total = iter(objects), sum(facts.size for facts in objects.values())
  pool = futures.ThreadPoolExecutor(_AT_ONCE, _THREADS)
  try:
    done, said = 0, time.monotonic()
    for size in _in_order(pool, copy, names):
      done += size
      if time.monotonic() - said > _INTERVAL:
        said = time.monotonic()
        log.info("%s of %s are copied", _bytes(done), _bytes(total))
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    # A pool that a signal has interrupted may not know its last thread.
    for thread in threading.enumerate():
      if thread.name.startswith(_THREADS) and thread.is_alive():
        thread.join()


def _in_order(pool: futures.Executor, function: Any,
              values: Iterator[str]) -> Iterator[Any]:
  """Like `pool.map`, which would keep a million results waiting."""
  while part := list(itertools.islice(values, _QUEUED)):
    yield from pool.map(function, part)


def _bytes(n: float) -> str:
  return f"{n / 1e9:.2f} GB" if n >= 1e7 else f"{n / 1e3:.1f} kB"


def _reason(error: OSError) -> str:
  return errors.one_line(error.strerror or error)
