"""Local paths that users give, and files that others may have put there."""

import errno
import os
import pathlib
import stat
from typing import BinaryIO

from metaformer_jax import errors, storage


def given(key: str, value: str | pathlib.Path,
          kind: type[errors.UserError] = errors.ConfigError) -> pathlib.Path:
  """A path that a user gives: `local`, or one on object storage.

  Raises:
    kind: as `local` and `storage.path`; or object storage refuses to say what
      is there, or does not answer.
  """
  path = storage.path(value, key, kind)
  if not storage.is_remote(path):
    return local(key, value, kind)
  try:
    path.exists()
  except OSError as e:
    raise kind(f"{key}: {path}: {e.strerror}" if key else
               f"{path}: {e.strerror}") from e
  return path


def local(key: str, value: str | pathlib.Path,
          kind: type[errors.UserError] = errors.ConfigError) -> pathlib.Path:
  """A path with `~` expanded, of which a file system can be asked.

  Args:
    key: what the user set, for the message; may be empty.
    value: the path; it need not exist.
    kind: of the error.

  Raises:
    kind: it is a URL, or the path is too long, its user is unknown, or access
      is denied.
  """
  name = f"{key}: {value}" if key else f"{value}"
  if "://" in str(value):
    raise kind(f"{name} is a URL; give a local path")
  try:
    path = pathlib.Path(value).expanduser()
    path.exists()
  except (OSError, RuntimeError, ValueError) as e:
    raise kind(f"{name}: {e}") from e
  return path


def existing_parent(path: pathlib.Path) -> pathlib.Path:
  """The path itself or its nearest parent that exists."""
  path = path.absolute()
  while not path.exists():
    path = path.parent
  return path


def open_file(path: str | pathlib.Path, buffering: int = -1) -> BinaryIO:
  """Opens a regular file to read bytes.

  Opening a pipe would wait for a writer, and a device may have no end.

  Args:
    path: of the file.
    buffering: as for `open`.

  Raises:
    OSError: it cannot be opened, or is a pipe, a device or a folder.
  """

  def regular(path, flags):
    handle = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
      return handle
    os.close(handle)
    code, why = ((errno.EISDIR, os.strerror(errno.EISDIR))
                 if stat.S_ISDIR(mode) else
                 (errno.EINVAL, "is not a regular file"))
    raise OSError(code, why, os.fspath(path))

  return open(path, "rb", buffering, opener=regular)
