"""The folder of a run: one experiment, written by one run at a time."""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import socket
from collections.abc import Iterator
from typing import BinaryIO

from metaformer_jax import errors, storage
from metaformer_jax.config import json_data, own, saved
from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import leases

log = logging.getLogger(__name__)

# The file that keeps the id of the run on Weights & Biases.
TRACKED = "wandb_run.json"

# What no path of a workdir may have, because Orbax, etils or TensorStore would
# refuse it, or write to another place.
_REFUSED = {
    "bytes that are not UTF-8": r"[\ud800-\udfff]",
    "control characters": r"[\0-\x1f\x7f-\x9f\u2028\u2029]",
    "a backslash, which would become a slash": r"\\",
    "a name that ends with .__lock": r"\.__lock/",
    "a name that ends with gs:": r"gs:/",
    "a first folder that stands for object storage": r"^/(gs|s3|az|hf)/",
}
# In bytes; Linux takes 4,095, of which files of checkpoints need a part.
_LONGEST = 4095 - 255


def check_path(workdir: pathlib.Path) -> None:
  """Raises ConfigError if checkpoints could not be saved in the folder."""
  if storage.is_remote(workdir):
    if not workdir.parts[3:]:
      raise errors.ConfigError(
          f"--workdir: {workdir} is a bucket; name a folder in it")
    return
  path = f"{real_path(workdir)}/"
  problem = next((problem for problem, pattern in _REFUSED.items()
                  if re.search(pattern, path)), None)
  if not problem and len(os.fsencode(path)) > _LONGEST:
    problem = f"more than {_LONGEST} bytes"
  if problem:
    raise errors.ConfigError(
        f"--workdir: {errors.one_line(path)[:500]} has {problem}, so that "
        "checkpoints cannot be saved there; choose another path")


def real_path(workdir: pathlib.Path) -> pathlib.Path:
  """The absolute path without links: libraries resolve `link/..` wrongly."""
  if storage.is_remote(workdir):
    return workdir
  return pathlib.Path(os.path.realpath(workdir))


class Lock:
  """That this process holds a workdir, as the file `lock` says.

  A file that was deleted does not keep others out. It is its content that is
  compared, not its inode, which some network file systems change.
  """

  def __init__(self, path: pathlib.Path):
    """`path` is that of the file; see `hold`."""
    self.path = path
    now = datetime.datetime.now(datetime.UTC).isoformat()
    self.holder = f"pid {os.getpid()} on {socket.gethostname()} since {now}\n"

  def is_held(self) -> bool:
    """Whether the file still names this process."""
    try:
      with self.path.open("rb") as file:
        return file.read(len(self.holder) + 1) == self.holder.encode()
    except OSError:
      return False

  def require(self) -> None:
    """Raises StorageError unless the lock is still held."""
    if not self.is_held():
      raise leases.lost(self.path)


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[Lock | leases.Lease]:
  """Keeps other runs and tools from writing to the folder.

  The lock is released when the process ends, however it ends.

  Raises:
    ConfigError: another process has the lock, or the folder cannot be written.
    StorageError: the disk is full.
  """
  if storage.is_remote(workdir):
    with leases.hold(workdir) as lease:
      yield lease
    return
  lock = Lock(workdir / "lock")
  with _writing():
    workdir.mkdir(parents=True, exist_ok=True)
  for _ in range(10):
    with _writing():
      file = lock.path.open("ab+", buffering=0)
    with file:
      _lock(file, workdir)
      with _writing():
        file.truncate(0)
        file.write(lock.holder.encode())
      if lock.is_held():  # Otherwise it was deleted before it was locked.
        yield lock
        return
  lock.require()


def _lock(file: BinaryIO, workdir: pathlib.Path) -> None:
  """Raises ConfigError if another process has locked the file."""
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as e:
    file.seek(0)
    who = file.read(200).decode(errors="replace").strip() or e
    raise errors.ConfigError(
        f"--workdir: {workdir} is in use ({who}); wait for it, or choose "
        "another folder") from e


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
        if different:  # It is not to continue the other one's.
          (workdir / TRACKED).unlink(missing_ok=True)
  with _writing():
    storage.write(path, saved.text(cfg))
    if parameters is not None:
      storage.write(workdir / "parameters.txt", parameters)
    _note_modules(cfg, workdir)


def _has_results(workdir: pathlib.Path) -> bool:
  """Whether a run has finished, or saved anything, even if it is damaged."""
  checkpoints = workdir / "checkpoints"
  return (workdir / "summary.json").exists() or (
      checkpoints.exists() and (
          not checkpoints.is_dir() or any(checkpoints.iterdir())))


def _clear(workdir: pathlib.Path) -> None:
  """Deletes what a run writes before its first checkpoint."""
  for name in ("metrics.jsonl", "metrics.csv", "modules.json",
               "parameters.txt"):
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
  storage.write(path, json.dumps(digests, indent=2) + "\n")
  own.remember(workdir)


@contextlib.contextmanager
def _writing() -> Iterator[None]:
  """A full disk may be freed; otherwise another folder is needed."""
  try:
    yield
  except OSError as e:
    full = (e.errno in (errno.ENOSPC, errno.EDQUOT)
            or storage.is_unavailable(e))
    kind = errors.StorageError if full else errors.ConfigError
    raise kind(f"--workdir: {e}") from e
