"""Downloads a file: resumed after a break, and checked before it is visible.

Until a file is complete, two others are beside its place: NAME.partial has the
bytes that have arrived, and NAME.partial.json what the server said of the file.
"""

import contextlib
import fcntl
import functools
import hashlib
import http.client
import logging
import os
import pathlib
import ssl
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NoReturn

from tqdm import auto as tqdm

from metaformer_jax import errors
from metaformer_jax.checkpoints import headers as headers_lib

log = logging.getLogger(__name__)

# Seconds without a byte after which a connection is given up.
_TIMEOUT = 15.0
# Seconds before each further try if the last one brought nothing new; a server
# may ask for more, up to `_LONGEST_WAIT`.
_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT = 120.0
# Seconds between looks at what another process downloads.
_POLL = 0.2
_CHUNK = 2**20

# Statuses below 500 that may pass: too slow, too early, too many requests.
_PASSING = (408, 425, 429)
# Of a connection that was made and has broken; others could not be made.
_BROKEN = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError,
           ssl.SSLEOFError)


class DownloadError(Exception):
  """Why a server does not give a file."""


class _Again(Exception):
  """What went wrong in one try, and may not in the next."""

  def __init__(self, reason: object, seconds: float = 0.0):
    """`seconds`: how long the server asks to wait."""
    super().__init__(reason)
    self.seconds = seconds


def download(url: str, target: pathlib.Path,
             check: Callable[[pathlib.Path], None],
             beat: Callable[[], None] = lambda: None) -> None:
  """Downloads a file, or waits for another process that does.

  Args:
    url: of the file, http or https; proxies are those of the environment.
    target: where it is to be; a missing folder is made.
    check: called with the path of the complete file; raises a WeightsError if
      it is not what it should be.
    beat: called whenever something has arrived.

  Raises:
    DownloadError: the server cannot be reached, does not send the file, or
      sends another one. What has arrived is kept for the next call, unless it
      is wrong.
    OSError: the file cannot be written.
  """
  target.parent.mkdir(parents=True, exist_ok=True)
  partial = target.with_name(f"{target.name}.partial")
  notes = target.with_name(f"{target.name}.partial.json")
  with _alone(partial, target, beat) as file:
    if file is None:
      return
    try:
      facts = _Transfer(url, file, notes, beat).complete()
      try:
        require(partial, facts.digests, check)
      except DownloadError:
        file.truncate(0)
        raise
      os.fsync(file.fileno())
      os.replace(partial, target)
    finally:
      if not _is_at(file, partial):
        notes.unlink(missing_ok=True)
      elif not file.seek(0, os.SEEK_END):
        notes.unlink(missing_ok=True)
        partial.unlink()


def require(path: pathlib.Path, digests: Mapping[str, str],
            check: Callable[[pathlib.Path], None]) -> None:
  """Raises DownloadError if a complete file is not the one that is published.

  Args:
    path: of the file.
    digests: as in `headers.Facts`.
    check: as for `download`.
  """
  try:
    for name, want in digests.items():
      # Also where FIPS forbids MD5 for security, which this is not for.
      new = functools.partial(hashlib.new, name, usedforsecurity=False)
      with path.open("rb") as file:
        found = hashlib.file_digest(file, new).hexdigest()
      if not found.startswith(want):
        raise errors.WeightsError(
            f"its {name} is {found}, but {want} is published")
    check(path)
  except errors.WeightsError as e:
    reason = str(e).removeprefix(f"{path}: ")
    raise DownloadError(f"the file that it sends is refused: {reason}") from e


@contextlib.contextmanager
def _alone(partial: pathlib.Path, target: pathlib.Path,
           beat: Callable[[], None]) -> Iterator[BinaryIO | None]:
  """Opens the partial file for this process alone; waits for another one.

  The lock ends with the process that has it. None: the target exists.
  """
  waiting = False
  while not target.exists():
    if os.path.lexists(partial) and not stat.S_ISREG(partial.lstat().st_mode):
      raise FileExistsError(0, "is not a file; remove it", str(partial))
    with partial.open("ab") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        if not waiting:
          log.info("waiting for another process that downloads %s", target)
        waiting = True
        beat()
        time.sleep(_POLL)
        continue
      if _is_at(file, partial):  # Else it was moved or removed meanwhile.
        yield file
        return
  yield None


def _is_at(file: BinaryIO, path: pathlib.Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file.fileno()), path.lstat())
  except FileNotFoundError:
    return False


class _Redirects(urllib.request.HTTPRedirectHandler):
  """Follows redirects that stay as safe; keeps what they say of the file."""

  def __init__(self):
    self.headers: list[http.client.HTTPMessage] = []

  def redirect_request(self, req, fp, code, msg, headers, newurl):
    old, new = (urllib.parse.urlsplit(url).scheme
                for url in (req.full_url, newurl))
    if new != "https" and (old, new) != ("http", "http"):
      fp.close()
      raise DownloadError(f"it redirects to {newurl}, which is not https")
    self.headers.append(headers)
    return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Transfer:
  """One file from a server, in as many responses as it takes."""

  def __init__(self, url: str, file: BinaryIO, notes: pathlib.Path,
               beat: Callable[[], None]):
    """Goes on with what an earlier one left in the file and its notes."""
    self._url, self._file, self._notes, self._beat = url, file, notes, beat
    self._received = False
    self._facts = headers_lib.read(notes)
    if not (self._facts.validator or self._facts.digests):
      self._file.truncate(0)  # The server's may have changed.
    self._bar = tqdm.tqdm(
        desc=notes.name.removesuffix(".partial.json"), unit="B", delay=0.01,
        unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty())

  def complete(self) -> headers_lib.Facts:
    """Receives all of the file that is missing; returns what is known of it.

    Raises:
      DownloadError: see `download`.
    """
    n_failures, furthest = 0, self._offset
    with self._bar:
      while not self._facts.size or self._offset < self._facts.size:
        try:
          self._receive()
          break
        except _Again as e:
          again = e
        n_failures = 0 if self._offset > furthest else n_failures + 1
        furthest = max(furthest, self._offset)
        if n_failures > len(_WAITS):
          raise DownloadError(f"{again}, {n_failures} times") from again
        seconds = max(again.seconds, _WAITS[max(0, n_failures - 1)])
        self._say(f"{self._url}: {again}; trying again in {seconds:g} s")
        self._beat()
        time.sleep(seconds)
    self._file.flush()
    return self._facts

  def _say(self, message: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._bar.disable:
      log.info("%s", message)
    else:
      self._bar.write(message, file=sys.stderr)

  @property
  def _offset(self) -> int:
    return self._file.seek(0, os.SEEK_END)

  def _restart(self, facts: headers_lib.Facts) -> None:
    """Begins from the beginning, of a file of which this is known."""
    self._file.truncate(0)
    self._facts = facts
    facts.write(self._notes)

  def _receive(self) -> None:
    """Takes one response.

    Raises:
      _Again: it is not all that is missing.
      DownloadError: no other try would be better.
    """
    response, redirects = self._open()
    with response:
      self._begin(response, redirects)
      self._bar.total, self._bar.n = self._facts.size, self._offset
      self._bar.refresh()
      while chunk := _next(response):
        self._file.write(chunk)
        self._received = True
        self._bar.update(len(chunk))
        self._beat()
    size, offset = self._facts.size, self._offset
    if size is not None and offset < size:
      raise _Again(f"it ended after {offset} of {size} bytes")
    if size is not None and offset > size:
      self._restart(headers_lib.Facts())
      raise DownloadError(f"it sends more than the {size} bytes that it names")

  def _open(self) -> tuple[http.client.HTTPResponse,
                           list[http.client.HTTPMessage]]:
    """Sends a request; returns the response and the headers of redirects."""
    headers = {"User-Agent": "metaformer_jax", "Accept-Encoding": "identity"}
    if self._offset:
      headers["Range"] = f"bytes={self._offset}-"
      if self._facts.validator:
        headers["If-Range"] = self._facts.validator
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    try:
      if urllib.parse.urlsplit(self._url).scheme not in ("http", "https"):
        raise ValueError("its address does not begin with http")
      request = urllib.request.Request(self._url, headers=headers)
      return opener.open(request, timeout=_TIMEOUT), redirects.headers
    except urllib.error.HTTPError as e:
      with e:
        self._refuse(e)
    except urllib.error.URLError as e:
      if self._received or isinstance(e.reason, _BROKEN):
        raise _Again(e.reason) from e
      raise DownloadError(e.reason) from e
    except (OSError, http.client.HTTPException) as e:
      raise _Again(_shown(e)) from e
    except ValueError as e:
      raise DownloadError(e) from e

  def _refuse(self, e: urllib.error.HTTPError) -> NoReturn:
    """Raises what a status from 300 on means."""
    reason = errors.one_line(f"HTTP {e.code} {e.reason}")
    if e.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
      self._restart(headers_lib.Facts())
    elif e.code not in _PASSING and e.code < 500:
      raise DownloadError(reason)
    seconds = headers_lib.retry_after(e.headers)
    if seconds > _LONGEST_WAIT:
      raise DownloadError(f"{reason}, and asks to wait for {seconds:.0f} s")
    raise _Again(reason, seconds)

  def _begin(self, response: http.client.HTTPResponse,
             redirects: list[http.client.HTTPMessage]) -> None:
    """Looks at what a response brings, before anything is written."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
      raise DownloadError(f"it sends the file encoded as {encoding}")
    if response.headers.get_content_type() == "text/html":
      raise DownloadError("it sends a web page, not the file")
    if response.status not in (200, 206):
      raise DownloadError(f"HTTP {response.status} {response.reason}")
    try:
      told, known = headers_lib.facts(response, redirects), self._facts
    except headers_lib.SizesDiffer as e:
      raise DownloadError(e) from e
    if response.status == 200:
      self._restart(told)
    elif headers_lib.first_byte(response) != self._offset or (
        told.validator != known.validator) or (
        None not in (told.size, known.size) and told.size != known.size):
      self._restart(headers_lib.Facts())
      raise _Again("it sends a part of another file")
    else:
      known.size = told.size
    if self._bar.disable:
      size = "" if told.size is None else f", {told.size / 1e6:.1f} MB"
      start = f", from byte {self._offset} on" if self._offset else ""
      self._say(f"downloading {self._url}{size}{start}")


def _next(response: http.client.HTTPResponse) -> bytes:
  """The next bytes of a response; empty at its end."""
  try:
    return response.read1(_CHUNK)
  except (OSError, http.client.HTTPException) as e:
    raise _Again(_shown(e)) from e


def _shown(e: Exception) -> str:
  return errors.one_line(e) or type(e).__name__
