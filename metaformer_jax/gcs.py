"""Objects of Google Cloud Storage as paths, by gcsfs; the extra `gcs`.

A folder is a common prefix of names: it exists while an object is in it. What
gcsfs raises becomes an OSError. gcsfs repeats a request itself, for about half
a minute, after 408, 429, 5xx and broken connections; an UnavailableError says
that this was not enough.
"""

import asyncio
import base64
import contextlib
import dataclasses
import errno
import fnmatch
import io
import logging
import os
from collections.abc import Iterator
from typing import IO, Any

import aiohttp
import fsspec
import google_crc32c
import requests
from google.auth import exceptions as auth

# No kind of bucket is special here, and need not be asked for. Listings must
# not be cached, as other processes write.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)

from etils import epath  # noqa: E402
from fsspec import asyn  # noqa: E402
from gcsfs import retry  # noqa: E402

# It logs tracebacks of failures that are raised as well.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

# Seconds: to connect, and between two pieces of an answer.
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=20, sock_read=60)
# Bytes of an object that are read at a time.
_BLOCK = 2**24
_BROKEN = (aiohttp.ClientError, asyncio.TimeoutError, auth.TransportError,
           requests.RequestException, fsspec.exceptions.FSTimeoutError)


class UnavailableError(OSError):
  """The service does not answer, or asks to come back later."""


@dataclasses.dataclass(frozen=True)
class Object:
  """What a listing says of an object.

  Attributes:
    size: in bytes.
    crc32c: as the service has computed it, in its notation; None if it is not
      given.
  """

  size: int
  crc32c: str | None


@contextlib.contextmanager
def _raising(path: object) -> Iterator[None]:
  """Raises what goes wrong as an OSError that names the path."""
  where = str(path)
  try:
    yield
  except FileNotFoundError as e:
    raise FileNotFoundError(
        errno.ENOENT, "there is no such object or bucket", where) from e
  except retry.HttpError as e:
    kind, code = ((UnavailableError, errno.EAGAIN) if retry.is_retriable(e)
                  else (PermissionError, errno.EACCES)
                  if str(e.code) == "401" else (OSError, errno.EIO))
    raise kind(code, _line(e), where) from e
  except _BROKEN as e:
    raise UnavailableError(errno.EAGAIN, _line(e), where) from e
  except auth.GoogleAuthError as e:
    raise PermissionError(errno.EACCES, _line(e), where) from e
  except (OSError, ValueError) as e:  # "Forbidden: ...", "Bad Request: ..."
    forbidden = str(e).startswith("Forbidden")
    kind, code = ((PermissionError, errno.EACCES) if forbidden
                  else (OSError, errno.EIO))
    raise kind(code, _line(e), where) from e


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())[:300] or type(error).__name__


def _fs() -> Any:
  """The client; there is one for a process."""
  return fsspec.filesystem("gcs", requests_timeout=_TIMEOUT)


class Path(type(epath.Path("gs://bucket"))):
  """A URL gs://BUCKET/NAME with the methods of a pathlib.Path.

  No character is a pattern, but for `glob`.
  """

  @property
  def _key(self) -> str:
    return str(self).removeprefix("gs://")

  def objects(self) -> dict[str, Object]:
    """The objects below a folder, by their relative names."""
    with _raising(self):
      found = _fs().find(self._key, detail=True)
    prefix = f"{self._key}/"
    return {name.removeprefix(prefix): Object(
        int(facts["size"]), facts.get("crc32c"))
            for name, facts in found.items()
            if name.startswith(prefix) and not name.endswith("/")}

  def _entries(self) -> dict[str, bool]:
    """Names in a folder, and whether each is a folder; empty if it is none."""
    with _raising(self):
      try:
        found = _fs().ls(self._key, detail=True)
      except FileNotFoundError:
        return {}
    entries = {}
    for facts in found:
      name = facts["name"].rstrip("/")
      if name != self._key and name.startswith(f"{self._key}/"):
        entries[name.rpartition("/")[2]] = facts["type"] == "directory"
    return entries

  def _info(self) -> dict[str, Any] | None:
    with _raising(self):
      try:
        return _fs().info(self._key)
      except FileNotFoundError:
        return None

  def exists(self) -> bool:
    return self._info() is not None

  def is_file(self) -> bool:
    return (self._info() or {}).get("type") == "file"

  def is_dir(self) -> bool:
    return (self._info() or {}).get("type") == "directory"

  def is_symlink(self) -> bool:
    return False

  def iterdir(self) -> Iterator["Path"]:
    yield from (self / name for name in self._entries())

  def glob(self, pattern: str) -> Iterator["Path"]:
    yield from (self / name for name in self._entries()
                if fnmatch.fnmatchcase(name, pattern))

  def absolute(self) -> "Path":
    return self

  def resolve(self, strict: bool = False) -> "Path":
    return self

  def expanduser(self) -> "Path":
    return self

  def mkdir(self, *args: Any, **kwargs: Any) -> None:
    """Does nothing: a folder exists by what is in it."""

  def read_bytes(self, end: int | None = None,
                 timeout: float | None = None) -> bytes:
    """The content, or its first `end` bytes; UnavailableError by a timeout."""
    fs = _fs()
    with _raising(self):
      if timeout is None:
        return fs.cat_file(self._key, None, end)
      return asyn.sync(fs.loop, fs._cat_file, self._key, timeout=timeout)

  def read_text(self, encoding: str | None = None) -> str:
    return self.read_bytes().decode(encoding or "utf-8")

  def write_bytes(self, data: bytes) -> int:
    """Writes the object: readers find the old one, or all of the new one."""
    with _raising(self):
      _fs().pipe_file(self._key, bytes(data))
    return len(data)

  def write_text(self, text: str, *args: Any, **kwargs: Any) -> int:
    return self.write_bytes(text.encode())

  def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
    self.write_bytes(b"")

  def open(self, mode: str = "r", **kwargs: Any) -> IO[Any]:
    """The object as a file in memory, which is written when it is closed."""
    if "r" not in mode:
      return _Written(self) if "b" in mode else _WrittenText(self)
    data = io.BytesIO(self.read_bytes())
    return data if "b" in mode else io.TextIOWrapper(data, "utf-8")

  def unlink(self, missing_ok: bool = False) -> None:
    with _raising(self):
      try:
        _fs().rm_file(self._key)
      except FileNotFoundError:
        if not missing_ok:
          raise

  def rmtree(self, missing_ok: bool = False) -> None:
    """Deletes all that is in a folder."""
    names = [f"{self._key}/{name}" for name in self.objects()]
    with _raising(self), contextlib.suppress(FileNotFoundError):
      if names:
        _fs().rm(names)

  def copy_to(self, target: "Path") -> None:
    """Copies the object, within the service."""
    with _raising(self):
      _fs().cp_file(self._key, target._key)

  def facts(self) -> Object:
    """What the service says of the object; FileNotFoundError if it has none."""
    found = self._info() or {}
    if found.get("type") != "file":
      raise FileNotFoundError(
          errno.ENOENT, "there is no such object or bucket", str(self))
    return Object(int(found["size"]), found.get("crc32c"))

  def download(self, target: str | os.PathLike,
               facts: Object | None = None) -> None:
    """Copies the object into a local file, and compares their checksums.

    Args:
      target: the file, which is replaced.
      facts: of the object, as of a listing; by default they are asked for.

    Raises:
      OSError: also if the object was replaced while it was read.
    """
    facts = facts or self.facts()
    with open(target, "wb") as file:
      checksum = google_crc32c.Checksum()
      for block in self.blocks(facts):
        checksum.update(block)
        file.write(block)
    if facts.crc32c not in (None, _encoded(checksum)):
      raise OSError(errno.EIO, "its checksum differs from the service's",
                    str(self))

  def blocks(self, facts: Object | None = None) -> Iterator[bytes]:
    """The content, in blocks of 16 MiB; `facts` as for `download`."""
    fs, size, start = _fs(), (facts or self.facts()).size, 0
    while start < size:
      with _raising(self):
        block = fs.cat_file(self._key, start, min(size, start + _BLOCK))
      if not block:
        raise UnavailableError(errno.EAGAIN, "it ended too early", str(self))
      yield block
      start += len(block)


class _Written(io.BytesIO):
  """Bytes that become an object when the file is closed without an error."""

  def __init__(self, path: Path):
    super().__init__()
    self._path = path

  def __exit__(self, kind, *error):
    if kind:
      super().close()
    return super().__exit__(kind, *error)

  def close(self):
    if not self.closed:
      try:
        self._path.write_bytes(self.getvalue())
      finally:
        super().close()


class _WrittenText(io.StringIO):
  """Likewise, text."""

  def __init__(self, path: Path):
    super().__init__()
    self._path = path

  __exit__ = _Written.__exit__

  def close(self):
    if not self.closed:
      try:
        self._path.write_text(self.getvalue())
      finally:
        super().close()


def crc32c(blocks: Iterator[bytes]) -> str:
  """The checksum of some bytes, in the service's notation."""
  checksum = google_crc32c.Checksum()
  for block in blocks:
    checksum.update(block)
  return _encoded(checksum)


def _encoded(checksum: google_crc32c.Checksum) -> str:
  return base64.b64encode(checksum.digest()).decode()
