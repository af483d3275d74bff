"""The folder of a run: of one experiment, and written by one run at a time."""

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

from metaformer_jax import config as config_lib
from metaformer_jax import errors
from metaformer_jax.experiment import Experiment


@contextlib.contextmanager
def hold(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps every other run and tool from writing to the folder.

  The lock ends with the process, however it ends.

  Raises:
    ConfigError: it is held already, or cannot be written.
  """
  path = workdir / "lock"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
  except OSError as e:
    raise errors.ConfigError(f"--workdir: {e}") from e
  with file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      file.seek(0)
      who = file.read(200).strip() or e
      raise errors.ConfigError(
          f"--workdir: {workdir} is in use ({who}); wait for it, or choose "
          "another folder") from e
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


def claim(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Makes the workdir this experiment's; to be held before.

  Raises:
    ConfigError: it holds a run of another experiment, or cannot be written.
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
  try:
    beside = path.with_suffix(".tmp")
    beside.write_text(config_lib.to_json(cfg))
    beside.replace(path)
  except OSError as e:
    raise errors.ConfigError(f"--workdir: {e}") from e
