"""Files and folders by the same calls: on disks, and on object storage.

A local path is a pathlib.Path. A URL gs://BUCKET/NAME is a `gcs.Path`, which
has the methods of one, so that most code need not know. What differs is here:
how a file is replaced at once, what is in a folder, and checksums.
"""

import atexit
import hashlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from metaformer_jax import errors

# By which etils decides, once, how Orbax reaches a bucket: TensorFlow has a
# client of its own, with other settings.
os.environ.setdefault("EPATH_USE_TF", "false")

log = logging.getLogger(__name__)

SCHEME = "gs://"

# Of TensorStore's errors, the kinds that may pass.
_PASSING = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|RESOURCE_EXHAUSTED)\b")
_LONGEST_WAIT = 30.0  # Seconds between two tries.

# Local copies of what is on object storage.
_copies: dict[pathlib.Path, pathlib.Path] = {}

# Prefix of a checksum that is not a SHA-256.
_CRC32C = "crc32c:"


def is_remote(path: object) -> bool:
  """Whether a path, or the text of one, is on object storage."""
  return str(path).startswith(SCHEME)


def path(value: str | os.PathLike, key: str = "",
         kind: type[errors.UserError] = errors.ConfigError) -> pathlib.Path:
  """A local path, or the `gcs.Path` of a URL.

  Args:
    value: what a user gives.
    key: what it was given as, for the message; may be empty.
    kind: of the error.

  Raises:
    kind: it is a URL of something else, or the extra `gcs` is missing.
  """
  text = os.fspath(value)
  name = f"{key}: {text}" if key else text
  if is_remote(text):
    _check_url(text, name, kind)
    return _client(name, kind).Path(text)
  if "://" in text:
    raise kind(f"{name} is neither a local path nor a {SCHEME} URL; give one "
               "of these")
  if isinstance(value, os.PathLike) and text.startswith("gs:/"):
    raise kind(f"{name}: a pathlib.Path cannot be a URL; give the text "
               f"{SCHEME}{text[4:]}")
  return pathlib.Path(value)


def _check_url(text: str, name: str, kind: type[errors.UserError]) -> None:
  """Raises an error unless a URL means one object or folder only."""
  rest = text.removeprefix(SCHEME)
  parts = rest.rstrip("/").split("/")
  if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,221}", parts[0]):
    raise kind(f"{name}: has no valid name of a bucket; write "
               f"{SCHEME}BUCKET/NAME")
  found = re.search(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff*?\[\]#\\%~]",
                    rest)
  if found:
    raise kind(f"{name!r}: has the character {found[0]!r}, which clients of "
               "object storage give a meaning; choose another name")
  if {"", ".", ".."} & {*parts[1:]}:
    raise kind(f"{name}: has an empty name, . or .. between slashes; choose "
               "another name")
  if len(rest) > 700:
    raise kind(f"{name[:200]}: has more than 700 characters, so that objects "
               "in it could not be named; choose another name")


def _client(name: str, kind: type[errors.UserError]) -> Any:
  try:
    from metaformer_jax import gcs  # noqa: PLC0415  Optional.
  except ImportError as e:
    raise kind(f"{name}: needs the extra gcs ({e}); "
               "pip install 'metaformer-jax[gcs]'") from e
  return gcs


def is_unavailable(error: BaseException | None) -> bool:
  """Whether it may pass: object storage that does not answer for a while.

  TensorStore and Orbax raise their own types, with the first error as cause or
  in the text.
  """
  while error is not None:
    if type(error).__name__ == "UnavailableError" or (
        not isinstance(error, errors.UserError)
        and _PASSING.search(str(error))):
      return True
    error = error.__cause__ or error.__context__
  return False


def persist(act: Callable[[], Any], seconds: float, what: str) -> Any:
  """Returns what a call returns, which is repeated while storage is away.

  Args:
    act: may be called again after it has failed anywhere.
    seconds: after which its failure is raised.
    what: it does, for the message.
  """
  end, wait = time.monotonic() + seconds, 1.0
  while True:
    try:
      return act()
    except Exception as e:
      if not is_unavailable(e) or time.monotonic() + wait > end:
        raise
      log.warning("object storage does not answer (%s); %s is tried again",
                  errors.one_line(e), what)
    time.sleep(wait)
    wait = min(2 * wait, _LONGEST_WAIT)


def fetched(path: pathlib.Path,
            is_wanted: Callable[[str], bool]) -> pathlib.Path:
  """A copy on this machine of an object, or of files of a folder.

  It is made once, and deleted when the process ends.

  Args:
    path: on object storage; it need not exist.
    is_wanted: whether a file directly in a folder is copied, by its name.

  Returns:
    The copy; the path itself if there is nothing to be copied.

  Raises:
    OSError: it cannot be read, or written.
  """
  if path in _copies:
    return _copies[path]
  names = ([p.name for p in path.iterdir() if is_wanted(p.name)]
           if path.is_dir() else [""] if path.is_file() else [])
  if not names:
    return path
  where = tempfile.TemporaryDirectory(prefix="metaformer_jax-")
  atexit.register(where.cleanup)
  copy = pathlib.Path(where.name, path.name)
  for name in names:
    log.info("copying %s", path / name)
    (copy / name).parent.mkdir(exist_ok=True)
    (path / name).download(copy / name)
  _copies[path] = copy
  return copy


def exists(path: pathlib.Path) -> bool:
  """Whether there is anything, be it a link to nothing."""
  return path.exists() if is_remote(path) else os.path.lexists(path)


def write(path: pathlib.Path, content: str | bytes) -> None:
  """Writes a file atomically: a crash leaves the old or the new one."""
  content = content.encode() if isinstance(content, str) else content
  if is_remote(path):
    path.write_bytes(content)
    return
  temporary = path.with_name(f".{path.name}.tmp")
  temporary.unlink(missing_ok=True)  # Opening a pipe would wait for a reader.
  with temporary.open("wb") as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)
  sync(path.parent)


def sync(folder: str | pathlib.Path) -> None:
  """Syncs the entries of a folder to disk."""
  if is_remote(folder):
    return
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def discard(path: pathlib.Path) -> None:
  """Deletes a folder, file or link, if there is one; never follows links."""
  if is_remote(path):
    path.rmtree()
    path.unlink(missing_ok=True)
  elif path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a folder file by file, as object storage does."""
  if is_remote(source):
    for name in source.objects():
      (source / name).copy_to(target / name)
      (source / name).unlink(missing_ok=True)
    return
  if source.is_symlink() or not source.is_dir():
    os.rename(source, target)
    return
  target.mkdir()
  for name in os.listdir(source):
    move(source / name, target / name)
  source.rmdir()


class IrregularError(Exception):
  """Something in a folder is neither a file nor a folder; has its name."""


class Contents:
  """The regular files of a folder when it was looked at.

  Attributes:
    sizes: bytes of each, by its path in the folder.
  """

  def __init__(self, folder: pathlib.Path):
    """Looks: one request on object storage.

    Raises:
      IrregularError: there is a link, a pipe or a device.
      OSError: the folder cannot be read.
    """
    self._folder = folder
    self._objects = folder.objects() if is_remote(folder) else None
    self._names = [*(self._objects if self._objects is not None
                     else _walk(folder))]

  def names(self) -> set[str]:
    """The paths of the files in the folder."""
    return set(self._names)

  def size(self, name: str) -> int:
    """Of a file, in bytes."""
    if self._objects is not None:
      return self._objects[name].size
    return (self._folder / name).stat().st_size

  def checksum(self, name: str, like: str = "", sync: bool = False) -> str:
    """A SHA-256 in hexadecimal, or "crc32c:" and the service's CRC-32C.

    The service's is not computed again; a file that has another checksum than
    `like` names is read.

    Args:
      name: of the file.
      like: a checksum of the kind that is wanted; by default the one that
        takes no reading, if there is one.
      sync: also write the file to disk.

    Raises:
      ConfigError: google-crc32c is needed, and missing.
    """
    given = self._objects and self._objects[name].crc32c
    kind = _CRC32C if like.startswith(_CRC32C) or (
        self._objects is not None and not like) else ""
    if kind and given:
      return f"{_CRC32C}{given}"
    if self._objects is not None:
      blocks = (self._folder / name).blocks()
      return _crc32c(blocks) if kind else _sha256(blocks)
    with open(self._folder / name, "rb") as file:
      found = (_crc32c(iter(lambda: file.read(2**20), b"")) if kind else
               hashlib.file_digest(file, "sha256").hexdigest())
      if sync:
        os.fsync(file.fileno())
    return found

  def sync(self) -> None:
    """Writes the entries of all folders to disk."""
    if self._objects is None:
      for part, _, _ in os.walk(self._folder):
        sync(part)


def _sha256(blocks: Iterator[bytes]) -> str:
  digest = hashlib.sha256()
  for block in blocks:
    digest.update(block)
  return digest.hexdigest()


def _crc32c(blocks: Iterator[bytes]) -> str:
  client = _client("its checksums", errors.ConfigError)
  return f"{_CRC32C}{client.crc32c(blocks)}"


def _walk(folder: str | pathlib.Path, prefix: str = "") -> Iterator[str]:
  """Yields the relative paths of a folder's files, all regular."""
  with os.scandir(folder) as entries:
    for entry in entries:
      name = prefix + entry.name
      if entry.is_dir(follow_symlinks=False):
        yield from _walk(entry.path, f"{name}/")
      elif entry.is_file(follow_symlinks=False):
        yield name
      else:
        raise IrregularError(name)
