"""The folder of a run: one experiment, written by one run at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import socket
from collections.abc import Iterator

from metaformer_jax import errors
from metaformer_jax.config import json_data, own, saved
from metaformer_jax.config.schema import Experiment

log = logging.getLogger(__name__)

# Orbax expands these in the whole path, so that nothing could be restored.
_PATTERN = re.compile(r"[\[\]*?]")


def check_path(workdir: pathlib.Path) -> None:
  """Raises ConfigError if checkpoints in the folder could not be restored."""
  path = str(workdir.absolute())
  found = sorted(set(_PATTERN.findall(path)))
  if found:
    raise errors.ConfigError(
        f"--workdir: {path} has {' '.join(found)} in it, from which "
        "checkpoints cannot be restored; choose a path without [ ] * ?")


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other runs and tools from writing to the folder.

  The lock is released when the process ends, however it ends.

  Raises:
    ConfigError: another process has the lock, or the folder cannot be written.
    StorageError: the disk is full.
  """
  path = workdir / "lock"
  with _writing():
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("ab+", buffering=0)
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      file.seek(0)
      who = file.read(200).decode(errors="replace").strip() or e
      raise errors.ConfigError(
          f"--workdir: {workdir} is in use ({who}); wait for it, or choose "
          "another folder") from e
    with _writing():
      file.truncate(0)
      file.write(f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    yield


def claim(cfg: Experiment, workdir: pathlib.Path,
          parameters: str | None = None) -> None:
  """Writes the experiment to the workdir, which must be held.

  What a run without any checkpoint has left is deleted: a mistake in a config
  that shows late does not block the folder for the corrected one.

  Args:
    cfg: the experiment.
    workdir: of the run.
    parameters: what to write to parameters.txt, if anything.

  Raises:
    ConfigError: it has a run of another experiment, or cannot be written.
    StorageError: the disk is full.
  """
  path = workdir / "config.json"
  if path.exists():
    try:
      found = saved.differences(cfg, path)
    except (OSError, ValueError) as e:
      raise errors.ConfigError(
          f"--workdir: {path} cannot be used ({e}); choose a new folder") from e
    failed, different = not _has_results(workdir), "; ".join(found)
    if different and not failed:
      other = any(not text.startswith("task.class_names") for text in found)
      hint = "" if other else (", or accept the names of the data's classes by "
                               "--config.checkpoint.allow_other_data=True")
      raise errors.ConfigError(
          f"--workdir: {workdir} has another experiment ({different}); choose "
          f"a new folder{hint}")
    if different:
      log.info("%s: replacing another experiment, which ended before its first "
               "checkpoint (%s)", workdir, different)
    if failed:
      with _writing():
        _clear(workdir)
  with _writing():
    write(path, saved.text(cfg))
    if parameters is not None:
      write(workdir / "parameters.txt", parameters)
    _note_modules(cfg, workdir)


def _has_results(workdir: pathlib.Path) -> bool:
  """Whether a run has finished, or saved anything, even if it is damaged."""
  checkpoints = workdir / "checkpoints"
  return (workdir / "summary.json").exists() or (
      checkpoints.exists() and (
          not checkpoints.is_dir() or any(checkpoints.iterdir())))


def _clear(workdir: pathlib.Path) -> None:
  """Deletes what a run writes before its first checkpoint."""
  for name in ("metrics.jsonl", "modules.json", "parameters.txt"):
    (workdir / name).unlink(missing_ok=True)
  for events in (workdir / "tensorboard").glob("events*"):
    events.unlink()


def _note_modules(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Keeps digests of the user's own modules; warns of those that changed."""
  digests = {name: own.digest(name) for name in own.modules(cfg)}
  if not digests:
    return
  path = workdir / "modules.json"
  try:
    before = dict(json_data.read(path))
  except (OSError, ValueError, TypeError):
    before = {}
  for name in digests:
    if before.get(name, digests[name]) != digests[name]:
      log.warning("the module %s has changed since the run in %s was started",
                  name, workdir)
  write(path, json.dumps(digests, indent=2) + "\n")
  own.remember(workdir)


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file atomically: a crash leaves the old or the new one."""
  temporary = path.with_suffix(".tmp")
  temporary.unlink(missing_ok=True)  # Opening a pipe would wait for a reader.
  with temporary.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """A full disk may be freed; otherwise another folder is needed."""
  try:
    yield
  except OSError as e:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    kind = errors.StorageError if full else errors.ConfigError
    raise kind(f"--workdir: {e}") from e
