"""ArrayRecord files, read by index, on disks and on gs://.

array_record has its own client of Google Cloud Storage, which finds credentials
itself, and repeats a request for a quarter of an hour after 429, 5xx and broken
connections. Its errors do not distinguish a damaged record from a file that
cannot be read, so this module opens the file again after a failed read: if it
has changed, is missing or cannot be read, the run ends. Otherwise the record is
damaged, and is a bad example.
"""

import atexit
import bisect
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from metaformer_jax import errors, storage
from metaformer_jax.config import paths
from metaformer_jax.data.sources import tfrecords

# Files that are opened at a time.
_AT_ONCE = 16

# Single records are read, so that nothing behind one is wanted.
_OPTIONS, _BUFFER = "readahead_buffer_size:0", 2**15

AGAIN = "prepare the data set again"

# Seconds for which Python waits, when it ends, for records that are being read.
_LONGEST_END = 10.0


class _Reads:
  """The reads of all threads, which Python waits for when it ends.

  A thread that returns from C++ to an interpreter that has ended would abort
  the process.
  """

  def __init__(self):
    self._changed = threading.Condition()
    self._n, self._has_ended = 0, False
    atexit.register(self._end)

  @contextlib.contextmanager
  def one(self) -> Iterator[None]:
    """Within it, Python does not end."""
    with self._changed:
      if self._has_ended:
        raise RuntimeError("the interpreter is shutting down")
      self._n += 1
    try:
      yield
    finally:
      with self._changed:
        self._n -= 1
        self._changed.notify_all()

  def _end(self) -> None:
    with self._changed:
      self._has_ended = True
      self._changed.wait_for(lambda: not self._n, _LONGEST_END)


_reads = _Reads()


class Records:
  """The data of records in files; several threads may read them."""

  def __init__(self, parts: Sequence[tfrecords.Part]):
    """Opens all files; on gs://, each for a request of 1 MiB.

    Raises:
      ConfigError: a file is missing, cannot be read, or has another number of
        examples.
    """
    self._parts = [(os.fspath(part.filename), part.skip, part.examples_in_shard)
                   for part in parts]
    self._ends = list(itertools.accumulate(
        part.take if part.take >= 0 else part.examples_in_shard - part.skip
        for part in parts))
    names = [(path, n) for path, _, n in self._parts]
    with futures.ThreadPoolExecutor(_AT_ONCE) as pool:
      list(pool.map(_check, names))
    self._start()

  def _start(self) -> None:
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()

  def __getstate__(self):
    return self._parts, self._ends  # Each process opens its own.

  def __setstate__(self, state):
    self._parts, self._ends = state
    self._start()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> bytes:
    """The data of a record.

    Raises:
      DataError: on gs://, the file is not there any more, is another one, or
        cannot be read now.
      Exception: the record is damaged.
    """
    if not 0 <= index < len(self):
      raise IndexError(index)
    part = bisect.bisect_right(self._ends, index)
    place = self._parts[part][1] + index - (self._ends[part - 1] if part else 0)
    with _reads.one():
      return self._read_or_explain(part, place)

  def _read_or_explain(self, part: int, place: int) -> bytes:
    """As `__getitem__`, by file; on gs:// it is tried a second time."""
    try:
      return self._read(part, place)
    except Exception:
      path, _, n = self._parts[part]
      if not storage.is_remote(path):
        raise
      with self._lock:
        self._readers.pop(part, None)
      _require(path, n)
    return self._read(part, place)

  def _read(self, part: int, place: int) -> bytes:
    reader = self._readers.get(part)
    if reader is None:
      path, _, n = self._parts[part]
      reader = _opened(path)
      if reader.num_records() != n:
        raise OSError(f"{path}: holds {reader.num_records()} examples, not {n}")
      with self._lock:
        self._readers[part] = reader
    return reader.read([place])[0]


def _opened(path: str) -> Any:
  from array_record.python import array_record_module  # noqa: PLC0415  Linux.

  return array_record_module.ArrayRecordReader(
      path, options=_OPTIONS, file_reader_buffer_size=_BUFFER)


def _check(part: tuple[str, int]) -> None:
  """Raises ConfigError unless the file has that many records."""
  path, n_examples = part
  try:
    if storage.is_remote(path):
      found = _remote_count(path)
    else:
      paths.open_file(path).close()  # The library would wait for a pipe.
      found = _count(path)
  except (OSError, RuntimeError, ValueError) as e:
    raise errors.ConfigError(f"{path}: cannot be read: {_reason(e)}") from e
  if found != n_examples:
    raise errors.ConfigError(
        f"{path}: holds {found} examples, not {n_examples}; {AGAIN}")


def _require(path: str, n_examples: int) -> None:
  """Raises DataError unless an object has that many records."""
  try:
    found = _remote_count.__wrapped__(path)
  except (OSError, RuntimeError, ValueError) as e:
    raise errors.DataError(
        f"config.data.path: {path} cannot be read any more: {_reason(e)}; "
        "start the run again when it can") from e
  if found != n_examples:
    raise errors.DataError(
        f"config.data.path: {path} has changed: it holds {found} examples, not "
        f"{n_examples}; a run needs the data that it began with")


@functools.cache
def _remote_count(path: str) -> int:
  """The number of records in an object, which is asked for once.

  Raises:
    OSError: the object is missing or cannot be read; says why.
    RuntimeError: it is damaged.
  """
  try:
    found = _count(path)
  except RuntimeError:
    storage.path(path).read_bytes(1)  # This client says why it cannot.
    raise
  if not found:  # Older versions of array_record raise nothing.
    storage.path(path).read_bytes(1)
  return found


def _count(path: str) -> int:
  reader = _opened(path)
  try:
    return reader.num_records()
  finally:
    reader.close()


def _reason(error: Exception) -> str:
  """Without the path, which the message has."""
  return errors.one_line(getattr(error, "strerror", None) or error)
