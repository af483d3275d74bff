"""The folder of a run: of one experiment, and written by one run at a time."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from metaformer_jax import errors
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Experiment


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps every other run and tool from writing to the folder.

  The lock ends with the process, however it ends.

  Raises:
    ConfigError: it is held already, or cannot be written.
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


def claim(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Makes the workdir this experiment's; to be held before.

  Raises:
    ConfigError: it holds a run of another experiment, or cannot be written.
    StorageError: the disk is full.
  """
  path = workdir / "config.json"
  if path.is_file():
    try:
      different = config_lib.differences(cfg, path.read_text())
    except (OSError, ValueError, AttributeError) as e:
      raise errors.ConfigError(
          f"--workdir: {path} cannot be read ({e}); choose a new folder") from e
    if different:
      raise errors.ConfigError(
          f"--workdir: {workdir} holds another experiment "
          f"({'; '.join(different)}); choose a new folder")
  with _writing():
    write(path, config_lib.to_json(cfg))


def write(path: pathlib.Path, text: str) -> None:
  """Writes beside and renames: a kill leaves the old or the new file."""
  beside = path.with_suffix(".tmp")
  with beside.open("w") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  beside.replace(path)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """A full disk may have room later; another folder is needed otherwise."""
  try:
    yield
  except OSError as e:
    full = e.errno in (errno.ENOSPC, errno.EDQUOT)
    kind = errors.StorageError if full else errors.ConfigError
    raise kind(f"--workdir: {e}") from e
