"""A folder on object storage whose files grow.

Objects cannot be appended to. The files are written into a local folder, and
copied whole when they have changed: at most once a minute, and when they must
be stored.
"""

import logging
import os
import pathlib
import tempfile
import threading

from metaformer_jax import errors, storage

log = logging.getLogger(__name__)

# Seconds between two copies, and for which the last one is tried.
INTERVAL, PATIENCE = 60.0, 600.0


class Mirror:
  """Copies the files of a local folder, in the background or at once."""

  def __init__(self, target: pathlib.Path):
    """`target` is the folder on object storage."""
    self._target = target
    self._temporary = tempfile.TemporaryDirectory(prefix="metaformer_jax-")
    self.folder = pathlib.Path(self._temporary.name)
    self._copied: dict[str, tuple[int, int]] = {}
    self._copying, self._ended = threading.Lock(), threading.Event()
    self._thread = threading.Thread(
        target=self._copy_on, name="mirror", daemon=True)
    self._thread.start()

  def fetch(self, name: str) -> None:
    """Copies a file from object storage, if it is there."""
    partial = self.folder / f"{name}.tmp"  # Which is not copied back.
    try:
      self._target.joinpath(name).download(partial)
      partial.replace(self.folder / name)
    except FileNotFoundError:
      partial.unlink(missing_ok=True)

  def store(self) -> None:
    """Copies what has changed; raises OSError."""
    with self._copying:
      for part, _, names in os.walk(self.folder):
        for name in names:
          path = pathlib.Path(part, name)
          self._copy(path, path.relative_to(self.folder).as_posix())

  def _copy(self, path: pathlib.Path, name: str) -> None:
    if name.endswith(".tmp"):  # Of a file that is being replaced.
      return
    stat = path.stat()
    seen = stat.st_size, stat.st_mtime_ns
    if self._copied.get(name) != seen:
      storage.write(self._target / name, path.read_bytes())
      self._copied[name] = seen

  def _copy_on(self) -> None:
    while not self._ended.wait(INTERVAL):
      try:
        self.store()
      except OSError as e:
        log.warning("%s: metrics cannot be stored: %s; tried again within a "
                    "minute", self._target, errors.one_line(e))

  def close(self) -> None:
    """Copies for the last time, and deletes the local folder."""
    self._ended.set()
    self._thread.join()
    try:
      storage.persist(self.store, PATIENCE, "storing metrics")
    except OSError as e:
      log.warning("%s: the last metrics could not be stored: %s",
                  self._target, errors.one_line(e))
    self._temporary.cleanup()
