"""The folders of steps: begun, complete, removed or set aside.

A step exists when its manifest does, which is written last and removed first.
No folder is renamed, so that this holds on any file system. While a step is
saved or deleted, the file STEP.unfinished lies beside its folder; by it the
next start knows what an interruption has left. Nothing else is ever deleted:
without a manifest and that file, a folder may be anyone's.

On object storage, where moving means copying, a damaged step is set aside by
the file STEP.damaged, and is moved only when the step is saved again.
"""

import itertools
import logging
import os
import pathlib
import re

from metaformer_jax import errors, storage
from metaformer_jax.checkpoints import manifest

log = logging.getLogger(__name__)

DAMAGED = "damaged"  # The folder that damaged steps are moved to.

_MARK = re.compile(rf"({manifest.STEP.pattern})\.unfinished")
_TEXT = "metaformer_jax is {} step {}; without a manifest.json, it is no step\n"
_ACTIVITIES = ("saving", "deleting")
_ASIDE = "metaformer_jax has set aside step {}: "


def found(checkpoints: pathlib.Path) -> list[int]:
  """The steps with an entry in a folder, intact or not, ascending.

  Raises:
    ConfigError: read permission is missing.
  """
  names = _listed(checkpoints)
  steps = {name for name in names if manifest.STEP.fullmatch(name)}
  marked = {name.partition(".")[0] for name in names if "." in name}
  # On object storage each look at a mark is a request.
  looked_at = steps & marked if storage.is_remote(checkpoints) else steps
  return sorted(int(name) for name in steps
                if name not in looked_at
                or not (_activity(checkpoints / name)
                        or _is_aside(checkpoints / name)))


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
      if storage.exists(folder) and not _activity(folder):
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
    storage.discard(folder)
  if _is_aside(folder):
    _move_aside(folder)
    _aside_mark(folder).unlink()
  _require(folder, not storage.exists(folder))
  _write_mark(folder, "saving")


def finish(folder: pathlib.Path) -> None:
  """Ends what `begin` began: the step has its manifest."""
  _mark(folder).unlink(missing_ok=True)


def remove(folder: pathlib.Path) -> None:
  """Deletes a step; if interrupted, `clean` deletes the rest."""
  _write_mark(folder, "deleting")
  (folder / manifest.NAME).unlink()
  storage.sync(folder)
  storage.discard(folder)
  _mark(folder).unlink()


def unfinished(checkpoints: pathlib.Path) -> dict[pathlib.Path, str]:
  """The steps that are "saving" or "deleting", or were when interrupted."""
  return {folder: activity for folder in _marked(checkpoints)
          if (activity := _activity(folder))}


def clean(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """Deletes what interruptions have left; returns the steps being saved."""
  left = unfinished(checkpoints)
  for folder in left:
    storage.discard(folder)
  for folder in _marked(checkpoints):
    _mark(folder).unlink()
  return [folder for folder, activity in left.items() if activity == "saving"]


def set_aside(folder: pathlib.Path, reason: object = "") -> pathlib.Path:
  """Takes a damaged step out of the steps.

  Args:
    folder: of the step.
    reason: what is wrong with it.

  Returns:
    The folder in `damaged` that it was moved to. If that is interrupted, what
    is left is still damaged, and the next call moves it. On object storage, the
    file that marks it.
  """
  if storage.is_remote(folder):
    mark = _aside_mark(folder)
    _require(mark, not storage.exists(mark))
    storage.write(mark, f"{_ASIDE.format(folder.name)}{reason}\n")
    return mark
  return _move_aside(folder)


def _move_aside(folder: pathlib.Path) -> pathlib.Path:
  aside = folder.parent / DAMAGED
  aside.mkdir(exist_ok=True)
  for i in itertools.count():
    target = aside / (f"{folder.name}.{i}" if i else folder.name)
    if not storage.exists(target):
      storage.move(folder, target)
      storage.sync(aside)
      storage.sync(folder.parent)
      return target


def choose(checkpoints: pathlib.Path) -> int | None:
  """The newest step of which every byte is intact; the rest is tidied up.

  Newer entries with the name of a step are set aside, and what an interrupted
  save has left is deleted, with one warning each. Returns None if no step was
  ever complete.

  Raises:
    ConfigError: there were complete steps, but none is intact; all stay in
      place.
    StorageError: a damaged step cannot be set aside, or object storage does
      not answer.
  """
  chosen, bad = None, {}
  for step in reversed(found(checkpoints)):
    folder = checkpoints / str(step)
    try:
      manifest.verify(folder)
      chosen = step
      break
    except manifest.DamagedError as e:
      bad[folder] = e
  lost = [f"{folder.name}: {e}" for folder, e in bad.items()
          if not isinstance(e, manifest.PartialError)]
  if chosen is None and lost:
    raise errors.ConfigError(
        f"{checkpoints}: no step is intact ({'; '.join(lost)}); restore a "
        "copy of one, or delete the folder to start from the beginning")
  start = "the beginning" if chosen is None else f"step {chosen}"
  how = "set aside by" if storage.is_remote(checkpoints) else "moved to"
  try:
    checkpoints.mkdir(parents=True, exist_ok=True)
    for folder, e in bad.items():
      log.warning("%s: %s; %s %s; continuing from %s", folder, e, how,
                  set_aside(folder, e), start)
    for folder in clean(checkpoints):
      log.warning("%s: the save was interrupted; deleted; continuing from "
                  "%s", folder, start)
  except OSError as e:
    raise errors.StorageError(
        f"{checkpoints}: cannot be cleaned up: {e}") from e
  return chosen


def damaged(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the steps that `set_aside` has set aside."""
  found = [checkpoints / name for name in _listed(checkpoints)
           if manifest.STEP.fullmatch(name) and _is_aside(checkpoints / name)]
  folder = checkpoints / DAMAGED
  if folder.is_symlink() or not folder.is_dir():
    return found
  return found + sorted(p for p in folder.iterdir()
                        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", p.name))


def drop(folder: pathlib.Path) -> None:
  """Deletes one of the folders that `damaged` gives."""
  storage.discard(folder)
  if _is_aside(folder):
    _aside_mark(folder).unlink()


def _listed(checkpoints: pathlib.Path) -> list[str]:
  try:
    if storage.is_remote(checkpoints):
      return [path.name for path in checkpoints.iterdir()]
    return os.listdir(checkpoints)
  except FileNotFoundError:
    return []
  except OSError as e:
    raise errors.ConfigError(
        f"{checkpoints}: cannot be read: {e.strerror}") from e


def _mark(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f"{folder.name}.unfinished")


def _aside_mark(folder: pathlib.Path) -> pathlib.Path:
  return folder.with_name(f"{folder.name}.damaged")


def _is_aside(folder: pathlib.Path) -> bool:
  """Whether a file of this program says so; never of a folder in `damaged`."""
  text = _read_file(_aside_mark(folder))
  return text.startswith(_ASIDE.format(folder.name).encode())


def _read_file(path: pathlib.Path) -> bytes:
  """What is in a regular file; nothing if there is none."""
  if storage.is_remote(path):
    try:
      return path.read_bytes()
    except FileNotFoundError:
      return b""
  if path.is_symlink() or not path.is_file():
    return b""
  return path.read_bytes()


def _marked(checkpoints: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the steps that have a mark; they need not exist."""
  matches = map(_MARK.fullmatch, sorted(_listed(checkpoints)))
  folders = [checkpoints / match[1] for match in matches if match]
  return [folder for folder in folders if _read_mark(folder)]


def _write_mark(folder: pathlib.Path, activity: str) -> None:
  mark = _mark(folder)
  _require(mark, not storage.exists(mark) or bool(_read_mark(folder)))
  storage.write(mark, _TEXT.format(activity, folder.name))


def _read_mark(folder: pathlib.Path) -> str | None:
  """What the mark of a step says; None if it has none of this program."""
  text = _read_file(_mark(folder))
  return next((activity for activity in _ACTIVITIES
               if text == _TEXT.format(activity, folder.name).encode()), None)


def _activity(folder: pathlib.Path) -> str | None:
  """What the mark says, unless the step has its manifest."""
  activity = _read_mark(folder)  # First: a save writes the manifest before.
  complete = storage.exists(folder / manifest.NAME)
  return None if complete else activity


def _require(path: pathlib.Path, is_free: bool) -> None:
  if not is_free:
    raise errors.StorageError(
        f"{path}: is in the way of a step; move it elsewhere, then run the "
        "same command to continue from the last checkpoint")
