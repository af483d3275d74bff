"""Experiments saved as data: a run's config.json, a file of weights.

Nothing in them is executed. What is imported because of them must be permitted
(`own.require_allowed`).
"""

import json
import pathlib
from typing import Any

from metaformer_jax import errors, imports
from metaformer_jax.config import (
  comparison,
  conversion,
  json_data,
  own,
  tensor_files,
  trees,
  typed,
)
from metaformer_jax.config.hub import folders
from metaformer_jax.config.model import Model
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry

# Sections and keys that may differ when a run is resumed: they change no
# result beyond the order of a sum. `init` is not read again.
RESUMABLE = ("mesh", "compile", "log", "checkpoint", "eval", "init",
             "data.workers", "data.threads", "data.path",
             "data.max_bad_fraction", "train.max_skipped")

# Keys that may differ among the processes of a run: places on a host, and how
# it reads. What is at these places is compared instead.
PER_HOST = ("data.path", "data.workers", "data.threads", "init",
            "log.compilation_cache")

# The key of a weights file's metadata that holds an experiment, as JSON.
METADATA = "experiment"


def read_json(path: pathlib.Path,
              allowed: own.Allowed = ()) -> trees.ConfigDict:
  """Reads an experiment as data, as runs write it to config.json.

  Absent keys take their defaults.

  Args:
    path: the file.
    allowed: modules that it may name in import paths.

  Raises:
    ConfigError: the file cannot be read, is not JSON in UTF-8, is too large or
      nested too deeply, has a key twice, a value that its key cannot have, or
      names a module that is not allowed.
  """
  try:
    tree = json_data.read(path)
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"--config_json: {path}: {e}") from e
  cfg = typed.typed(tree)
  own.require_allowed(cfg, allowed, f"--config_json: {path}")
  return typed.as_config(cfg)


def text(cfg: Experiment) -> str:
  """An experiment as `read_run` reads it.

  Raises:
    ConfigError: it is too large to be read again.
  """
  found = typed.to_json(cfg)
  if len(found) > json_data.MAX_BYTES:  # It has ASCII characters only.
    raise errors.ConfigError(
        f"config: takes {len(found):,} bytes as JSON, more than "
        f"{json_data.MAX_BYTES:,}, so that the run could not be resumed; give "
        "the classes shorter names (config.task.class_names)")
  return found


def find_workdir(path: pathlib.Path) -> pathlib.Path | None:
  """The workdir of a workdir, its checkpoints or a step in them; else None.

  A folder of transformers or timm has a config.json, too, but is none.
  """
  folder = path.absolute()
  if folder.parent.name == "checkpoints":
    folder = folder.parent
  if folder.name == "checkpoints":
    folder = folder.parent
  is_run = path.is_dir() and (folder / "config.json").is_file() and (
      not folders.is_folder(folder))
  return folder if is_run else None


def read_run(workdir: pathlib.Path,
             allowed: own.Allowed = ()) -> Experiment:
  """The experiment of a run, from its workdir's config.json.

  Args:
    workdir: of the run.
    allowed: modules that it may name in import paths, besides those that a run
      of this user in this folder has used.

  Raises:
    ConfigError: as `read_json`, or an earlier version wrote the file.
  """
  path = workdir / "config.json"
  try:
    cfg = typed.typed(_current(json_data.read(path)))
  except (OSError, ValueError, errors.ConfigError) as e:
    raise errors.ConfigError(f"{path}: {e}") from e
  if not own.is_remembered(workdir):
    own.require_allowed(cfg, allowed, str(path))
  return cfg


def read_weights(path: pathlib.Path, allowed: own.Allowed = (),
                 model: str | None = None) -> Experiment | None:
  """The experiment that made the weights, as far as they record it.

  Args:
    path: a safetensors file, a folder of transformers or timm, or a run's
      folder or a part of it.
    allowed: as for `read_run`.
    model: as for `folders.read`.

  Returns:
    None if neither the file nor its folder describes the model.

  Raises:
    ConfigError: as `read_run`; or a folder's config.json has settings that
      cannot be expressed.
  """
  workdir = find_workdir(path)
  if workdir:
    return read_run(workdir, allowed)
  if folders.is_folder(path):
    found = _read_metadata(path / folders.WEIGHTS, allowed)
    return found or folders.read(path, model)
  return _read_metadata(path, allowed)


def _read_metadata(path: pathlib.Path,
                   allowed: own.Allowed) -> Experiment | None:
  """The experiment in the metadata of a safetensors file, if it has one."""
  if path.suffix != ".safetensors" or not path.is_file():
    return None
  try:
    with tensor_files.opened(path) as file:
      text = (file.metadata() or {}).get(METADATA)
  except (OSError, ValueError) as e:
    raise errors.WeightsError(f"{path}: {e}") from e
  if text is None:
    return None
  try:
    cfg = typed.typed(_current(json_data.parse(text)))
  except (ValueError, errors.ConfigError) as e:
    raise errors.ConfigError(f"{path}: its metadata: {e}") from e
  own.require_allowed(cfg, allowed, str(path))
  return cfg


def differences(cfg: Experiment, path: pathlib.Path,
                complete: bool = True) -> list[str]:
  """What `cfg` changes, "key: old -> new", beyond what a resume may change.

  With other data, if that is allowed, the names of the classes may, too. A key
  that the saved experiment does not have is newer and had its default.

  Args:
    cfg: the experiment to run.
    path: the config.json of a run.
    complete: whether `cfg` has all derived values; otherwise keys that are left
      to be derived are not compared.

  Raises:
    OSError, ValueError: the file is not an experiment of this version.
  """
  saved = _current(json_data.read(path))
  task = cfg.task if imports.is_path(cfg.task.name) else type(cfg.task)()
  old = flat(Experiment(task=task)) | dict(typed.flatten(saved))
  skipped = {*RESUMABLE, *(f"task.{key}" for key in cfg.task.RESUMABLE)}
  if cfg.checkpoint.allow_other_data:
    skipped.add("task.class_names")
  kept = [key for key in sorted(old)
          if skipped.isdisjoint((key, key.split(".")[0]))]
  new = flat(cfg)
  if not complete:
    kept = [key for key in kept if new.get(key) is not None]
  return list(comparison.between(
      {key: old[key] for key in kept},
      {key: new[key] for key in kept if key in new}))


def flat(cfg: Experiment) -> dict[str, Any]:
  """The experiment as JSON values, by "section.key"."""
  return dict(typed.flatten(json.loads(typed.to_json(cfg))))


def of_all_hosts(cfg: Experiment) -> dict[str, Any]:
  """Those of `flat` that must be the same on all processes of a run."""
  left_out = {*PER_HOST, *(f"task.{key}" for key in cfg.task.PER_HOST)}
  return {key: value for key, value in flat(cfg).items()
          if key not in left_out}


def model_differences(made: Model, wanted: Model) -> list[str]:
  """How two models compute differently with the same weights.

  Args:
    made: the model that made the weights.
    wanted: the one that is to use them.

  Returns:
    A line for each hyper-parameter, "config.model.key: made, wanted". What
    shows in the weights' names and shapes, or matters in training only, is left
    out: reading the weights reports the former.
  """
  names = made.name, wanted.name
  if None in names or any(map(imports.is_path, names)):
    one, other = ({"name": m.name, **m.overrides()} for m in (made, wanted))
    return [f"config.model.{key}: {one.get(key)}, {other.get(key)}"
            for key in sorted(one.keys() | other)
            if one.get(key) != other.get(key)]
  one, other = (registry.get_spec(m.name).override(**m.overrides())
                for m in (made, wanted))
  if type(one) is not type(other):
    return [f"config.model.name: {made.name}, {wanted.name}"]
  return [f"config.model.{key}: {getattr(one, key)}, {getattr(other, key)}"
          for key in one.differences(other)]


def _current(tree: Any) -> Any:
  """Returns a saved experiment; ValueError if this version lacks its keys."""
  if not isinstance(tree, dict):
    raise ValueError(f"{conversion.shown(tree)} is not a section of keys")
  shared = {**tree, "task": {}} if own.has_own_task(tree) else tree
  unknown = sorted(dict(typed.flatten(shared)).keys() - set(typed.keys()))
  if unknown:
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    raise ValueError(
        "was written by another version of metaformer_jax: there is no key "
        f"{', '.join(unknown[:3])}{more}")
  return tree
