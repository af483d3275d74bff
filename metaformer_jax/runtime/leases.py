"""A workdir on object storage is held by a heartbeat, which is advisory.

Nothing there is released when a process ends, as the lock of a file is. So the
object `lock` names the run that holds the folder and is rewritten every few
seconds; a run that finds one which has not changed for longer takes the folder
over. What has changed is compared, not when, so that clocks need not agree.

Two runs write only if the first one stops for longer than that (a suspended
machine, a network that is away) and has read its name in the lock just before:
the manifest that it writes next, within seconds, is that of a step which the
other run may save as well. A step that both have written is then found damaged.
"""

import contextlib
import datetime
import logging
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from metaformer_jax import errors, storage

log = logging.getLogger(__name__)

# Seconds between two heartbeats, and without one before a run takes over.
INTERVAL, SILENCE = 15.0, 50.0
_POLL = 2.0


def lost(path: pathlib.Path) -> errors.StorageError:
  """The error of a run whose lock, at this path, no longer names it."""
  return errors.StorageError(
      f"{path}: was deleted or replaced while this run held it, so that "
      "another one may write to the folder; nothing more is saved; run the "
      "same command to continue from the last checkpoint")


class Lease:
  """That this process holds a workdir, as its object `lock` says."""

  def __init__(self, path: pathlib.Path):
    """`path` is that of the object; see `hold`."""
    self.path = path
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    self.holder = (f"pid {os.getpid()} on {socket.gethostname()} since {now}, "
                   f"run {uuid.uuid4().hex}")
    self._n_beats = 0
    self._ended = threading.Event()
    self._writing = threading.Lock()
    self._thread = threading.Thread(
        target=self._beat_on, name="heartbeat", daemon=True)

  def start(self) -> None:
    """Writes the first heartbeat, and starts the others."""
    self.beat()
    self._thread.start()

  def beat(self) -> None:
    """Writes a heartbeat."""
    self._n_beats += 1
    storage.write(self.path, f"{self.holder}, heartbeat {self._n_beats}\n")

  def _beat_on(self) -> None:
    """Writes heartbeats while the object names this run."""
    while not self._ended.wait(INTERVAL):
      try:
        with self._writing:
          if not self._ended.is_set() and self.is_held():
            self.beat()
      except OSError as e:  # `require` says so, if it matters.
        log.debug("%s: %s", self.path, e)

  def is_held(self) -> bool:
    """Whether the object still names this run; OSError if it is not known."""
    return _read(self.path).startswith(f"{self.holder},")

  def reachable(self, seconds: float) -> bool:
    """Whether the service answers within some seconds."""
    try:
      _read(self.path, seconds)
    except OSError as e:
      if storage.is_unavailable(e):
        return False
      raise
    return True

  def require(self) -> None:
    """Raises StorageError unless the workdir is still held."""
    if not self.is_held():
      raise lost(self.path)

  def end(self) -> None:
    """Ends the heartbeats, and deletes the object if it names this run."""
    self._ended.set()
    with self._writing, contextlib.suppress(OSError):
      if self.is_held():
        self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[Lease]:
  """Keeps other runs and tools from writing to a folder on object storage.

  Raises:
    ConfigError: another run holds it, or it cannot be written.
    StorageError: the service does not answer.
  """
  lease = Lease(workdir / "lock")
  with _reporting():
    _await_silence(lease.path)
    lease.start()
  try:
    yield lease
  finally:
    lease.end()


def _await_silence(path: pathlib.Path) -> None:
  """Raises ConfigError if a run holds the folder; returns if it has ended."""
  before = _read(path)
  if not before or _has_ended(before):
    return
  log.info("%s: a run that did not end in order may still hold the folder "
           "(%s); waiting %g s for its heartbeat", path,
           before.strip(), SILENCE)
  end = time.monotonic() + SILENCE
  while time.monotonic() < end:
    time.sleep(min(_POLL, SILENCE))
    now = _read(path)
    if not now:
      return
    if now != before:
      raise errors.ConfigError(
          f"--workdir: {path.parent} is in use ({now.strip()}); wait for it, "
          "or choose another folder")


def _has_ended(text: str) -> bool:
  """Whether the holder was a process of this machine that is no more."""
  found = re.match(r"pid (\d+) on (\S+) since ", text)
  if not found or found[2] != socket.gethostname():
    return False
  try:
    os.kill(int(found[1]), 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False


def _read(path: pathlib.Path, timeout: float | None = None) -> str:
  """What an object holds; empty if there is none."""
  try:
    return path.read_bytes(timeout=timeout).decode(errors="replace")
  except FileNotFoundError:
    return ""


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  try:
    yield
  except OSError as e:
    kind = (errors.StorageError if storage.is_unavailable(e)
            else errors.ConfigError)
    raise kind(f"--workdir: {e.filename}: {e.strerror}") from e
