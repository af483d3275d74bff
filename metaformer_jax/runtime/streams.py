"""Standard streams that are closed, full, or no longer read."""

import contextlib
import os
import sys
from collections.abc import Iterator

from metaformer_jax import errors


class _Output:
  """stdout: where it cannot be written, a user's error says so."""

  def __init__(self, stream):
    self._stream = stream

  def __getattr__(self, name):
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    with _storing():
      return self._stream.write(text)

  def flush(self) -> None:
    with _storing():
      self._stream.flush()


class _Messages(_Output):
  """stderr: no message is worth a run, so what cannot be written is lost.

  Long lines lose their middle.
  """

  def write(self, text: str) -> int:
    with contextlib.suppress(OSError):
      self._stream.write("\n".join(map(errors.cut, text.split("\n"))))
    return len(text)

  def flush(self) -> None:
    with contextlib.suppress(OSError):
      self._stream.flush()


@contextlib.contextmanager
def _storing() -> Iterator[None]:
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as e:
    raise errors.StorageError(
        f"stdout: cannot be written: {e.strerror or e}") from e


@contextlib.contextmanager
def guarded() -> Iterator[None]:
  """Within it, the standard streams are open, and stderr never fails.

  stdout that cannot be written raises a StorageError; or a BrokenPipeError if
  its reader has ended, as of `| head`. When it ends, stdout is flushed.
  """
  _open_closed()
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = _Output(sys.stdout), _Messages(sys.stderr)
  try:
    yield
  finally:
    sys.stdout, sys.stderr = before
    for stream in before:
      try:
        stream.flush()
      except OSError:  # Python would report it when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextlib.contextmanager
def flushing() -> Iterator[None]:
  """Flushes stdout at the end, also at that of the process."""
  try:
    yield
  except SystemExit:
    sys.stdout.flush()
    raise
  sys.stdout.flush()


def _open_closed() -> None:
  """Opens closed streams on /dev/null, as by `2>&-`.

  A file that is opened later would get the stream's number, and messages of
  libraries in C would be written into it.
  """
  for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
    if getattr(sys, name) is None:
      stream = open(os.devnull, mode)  # noqa: SIM115  Until the process ends.
      os.set_inheritable(stream.fileno(), True)
      setattr(sys, name, stream)
      setattr(sys, f"__{name}__", stream)
