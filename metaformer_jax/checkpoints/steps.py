"""The folders of steps: begun, complete, removed or set aside.

A step exists when its manifest does, which is written last and removed first.
No folder is renamed, so that this holds on any file system. While a step is
saved or deleted, the file STEP.unfinished lies beside its folder; by it the
next start knows what an interruption has left. Nothing else is ever deleted:
without a manifest and that file, a folder may be anyone's.
"""

import itertools
import os
import pathlib
import re
import shutil

from metaformer_jax import errors
from metaformer_jax.checkpoints import manifest
from metaformer_jax.runtime import workdir

DAMAGED = "damaged"  # The folder that damaged steps are moved to.

_MARK = re.compile(rf"({manifest.STEP.pattern})\.unfinished")
_TEXT = "metaformer_jax is {} step {}; without a manifest.json, it is no step\n"
_ACTIVITIES = ("saving", "deleting")


def found(checkpoints: pathlib.Path) -> list[int]:
  """The steps with an entry in a folder, intact or not, ascending.

  Raises:
    ConfigError: read permission is missing.
  """
  return sorted(int(name) for name in _listed(checkpoints)
                if manifest.STEP.fullmatch(name)
                and not _activity(checkpoints / name))


def survey(checkpoints: pathlib.Path, *, contents: bool = False) -> tuple[
    dict[int, manifest.Manifest], dict[int, manifest.DamagedError]]:
  """The complete steps of a folder, and the others with their problems."""
  good, bad = {}, {}
  for step in found(checkpoints):
    folder = checkpoints / str(step)
    try:
      good[step] = manifest.verify(folder, contents=contents)
    except manifest.DamagedError as e:
      # Otherwise it was deleted meanwhile.
      if os.path.lexists(folder) and not _activity(folder):
        bad[step] = e
  return good, bad


def begin(folder: pathlib.Path) -> None:
  """Prepares to save a step; what an interrupted save of it left is deleted.

  Raises:
    StorageError: there is something else in its place.
    OSError: the folder cannot be written.
  """
  folder.parent.mkdir(parents=True, exist_ok=True)
  if _activity(folder):
    discard(folder)
  _require(folder, not os.path.lexists(folder))
  _write_mark(folder, "saving")


def finish(folder: pathlib.Path) -> None:
  """Ends what `begin` began: the step has its manifest."""
  _mark(folder).unlink()


def remove(folder: pathlib.Path) -> None:
  """Deletes a step; if interrupted, `clean` deletes the rest."""
  _write_mark(folder, "deleting")
  (folder / manifest.NAME).unlink()
  workdir.sync(folder)
  discard(folder)
  _mark(folder).unlink()


def unfinished(checkpoints: pathlib.Path) -> dict[pathlib.Path, str]:
  """The steps that are "saving" or "deleting", or were when interrupted."""
  return {folder: activity for folder in _marked(checkpoints)
          if (activity := _activity(folder))}


def clean(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """Deletes what interruptions have left; returns the steps being saved."""
  left = unfinished(checkpoints)
  for folder in left:
    discard(folder)
  for folder in _marked(checkpoints):
    _mark(folder).unlink()
  return [folder for folder, activity in left.items() if activity == "saving"]


def set_aside(folder: pathlib.Path) -> pathlib.Path:
  """Moves a damaged step to the folder `damaged`; returns its new path.

  If interrupted, what is left is still damaged, and the next call moves it.
  """
  aside = folder.parent / DAMAGED
  aside.mkdir(exist_ok=True)
  for i in itertools.count():
    target = aside / (f"{folder.name}.{i}" if i else folder.name)
    if not os.path.lexists(target):
      _move(folder, target)
      workdir.sync(aside)
      workdir.sync(folder.parent)
      return target


def _move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves file by file, as object storage does."""
  if source.is_symlink() or not source.is_dir():
    os.rename(source, target)
    return
  target.mkdir()
  for name in os.listdir(source):
    _move(source / name, target / name)
  source.rmdir()


def damaged(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """The folders that `set_aside` has moved."""
  folder = checkpoints / DAMAGED
  if folder.is_symlink() or not folder.is_dir():
    return []
  return sorted(p for p in folder.iterdir()
                if re.fullmatch(r"[0-9]+(\.[0-9]+)?", p.name))


def discard(path: pathlib.Path) -> None:
  """Deletes a folder, file or link, if there is one; never follows links."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink(missing_ok=True)


def _listed(checkpoints: pathlib.Path) -> list[str]:
  try:
    return os.listdir(checkpoints)
  except FileNotFoundError:
    return []
  except OSError as e:
    raise errors.ConfigError(
        f"{checkpoints}: cannot be read: {e.strerror}") from e


def _mark(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f"{folder.name}.unfinished")


def _marked(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the steps that have a mark; they need not exist."""
  matches = map(_MARK.fullmatch, sorted(_listed(checkpoints)))
  folders = [checkpoints / match[1] for match in matches if match]
  return [folder for folder in folders if _read_mark(folder)]


def _write_mark(folder: pathlib.Path, activity: str) -> None:
  mark = _mark(folder)
  _require(mark, not os.path.lexists(mark) or bool(_read_mark(folder)))
  workdir.write(mark, _TEXT.format(activity, folder.name))


def _read_mark(folder: pathlib.Path) -> str | None:
  """What the mark of a step says; None if it has none of this program."""
  mark = _mark(folder)
  if mark.is_symlink() or not mark.is_file():
    return None
  text = mark.read_bytes()
  return next((activity for activity in _ACTIVITIES
               if text == _TEXT.format(activity, folder.name).encode()), None)


def _activity(folder: pathlib.Path) -> str | None:
  """What the mark says, unless the step has its manifest."""
  activity = _read_mark(folder)  # First: a save writes the manifest before.
  complete = os.path.lexists(folder / manifest.NAME)
  return None if complete else activity


def _require(path: pathlib.Path, is_free: bool) -> None:
  if not is_free:
    raise errors.StorageError(
        f"{path}: is in the way of a step; move it elsewhere, then run the "
        "same command to continue from the last checkpoint")
