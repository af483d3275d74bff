"""From a ConfigDict or JSON to a checked `Experiment`.

A config file builds a `ConfigDict` from `default()` and sets what differs;
`resolve` turns it, with the overrides of the command line, into an
`Experiment`. Mistakes are found here, before jax is imported, and reported in
one line.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from metaformer_jax import errors
from metaformer_jax.config import checks, conversion, model, tasks
from metaformer_jax.config.schema import Experiment

# Sections and keys that may differ when a run is resumed: they change no
# result beyond the order of a sum. `init` is not read again.
RESUMABLE = ("mesh", "log", "checkpoint", "eval", "init", "data.workers",
             "data.threads", "data.path", "data.max_bad_fraction",
             "train.max_skipped")

# Limits of JSON: an experiment takes a few kilobytes, and the values of
# `mesh.rules` are nested four deep.
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 2**20, 8

def default() -> ml_collections.ConfigDict:
  """Every key of an experiment at its default, for a config file to change."""
  return _as_config(Experiment())


def read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads an experiment as data, as runs write it to config.json.

  Nothing in the file is executed. Absent keys take their defaults.

  Raises:
    ConfigError: the file cannot be read, is not JSON in UTF-8, is too large or
      nested too deeply, has a key twice, or a value that its key cannot have.
  """
  try:
    tree = _read(path)
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"--config_json: {path}: {e}") from e
  return _as_config(_typed(tree))


def read_run(workdir: pathlib.Path) -> Experiment:
  """The experiment of a run, from its workdir's config.json.

  Raises:
    ConfigError: as `read_json`, or an earlier version wrote the file.
  """
  path = workdir / "config.json"
  try:
    return _typed(_current(_read(path)))
  except (OSError, ValueError, errors.ConfigError) as e:
    raise errors.ConfigError(f"{path}: {e}") from e


def _read(path: pathlib.Path) -> Any:
  """Parses a JSON file; OSError or ValueError says why it cannot be."""
  if not path.is_file():  # Opening a pipe would block.
    raise ValueError("is not a file")
  with open(path, "rb") as file:
    data = file.read(_MAX_JSON_BYTES + 1)
  if len(data) > _MAX_JSON_BYTES:
    raise ValueError(f"is larger than {_MAX_JSON_BYTES} bytes")
  return _parse_json(data.decode())


def _current(tree: Any) -> Any:
  """Returns a saved experiment; ValueError if this version lacks its keys."""
  if not isinstance(tree, dict):
    raise ValueError(f"{conversion.shown(tree)} is not a section of keys")
  unknown = sorted(dict(_flatten(tree)).keys() - set(keys()))
  if unknown:
    more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
    raise ValueError(
        "was written by another version of metaformer_jax: there is no key "
        f"{', '.join(unknown[:3])}{more}")
  return tree


def _as_config(cfg: Any) -> ml_collections.ConfigDict:
  """A dataclass as a ConfigDict in which optional keys keep their type."""
  config = ml_collections.ConfigDict()
  for f in dataclasses.fields(cfg):
    value = getattr(cfg, f.name)
    if dataclasses.is_dataclass(f.type):
      value = _as_config(value)
    elif value is None or conversion.base_type(f.type) is object:
      value = config_dict.FieldReference(
          value, field_type=conversion.base_type(f.type))
    config[f.name] = value
  return config


def _parse_json(text: str) -> Any:
  """Parses standard JSON; ValueError says what is wrong with it."""

  def unique(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
      keys = sorted(key for key, _ in pairs)
      twice = next(a for a, b in itertools.pairwise(keys) if a == b)
      raise ValueError(f"has the key {conversion.shown(twice)} twice")
    return made

  def refuse(constant):
    raise ValueError(f"holds {constant}, which is not JSON")

  too_deep = ValueError(f"is nested more than {_MAX_JSON_DEPTH} deep")
  try:
    tree = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
  except RecursionError as e:
    raise too_deep from e
  level = [tree]
  for _ in range(_MAX_JSON_DEPTH):
    level = [child for node in level if isinstance(node, (dict, list))
             for child in (node.values() if isinstance(node, dict) else node)]
  if any(isinstance(node, (dict, list)) for node in level):
    raise too_deep
  return tree


def keys() -> list[str]:
  """Every "section.key" of an experiment, whatever its task."""
  return list(_fields(Experiment))


def optional_keys() -> list[str]:
  """Those of `keys` that may be None."""
  return [key for key, f in _fields(Experiment).items()
          if conversion.is_optional(f)]


def describe() -> list[str]:
  """A line for each key: "section.key=default  meaning"."""
  return [f"{key}={f.default!r}  {f.metadata['help']}"
          for key, f in _fields(Experiment).items()]


def did_you_mean(key: str) -> str:
  """The nearest valid "section.key"; first, one of the same last name."""
  name = key.rpartition(".")[2]
  same = [valid for valid in keys() if valid.rpartition(".")[2] == name]
  if same:
    return f"; did you mean {same[0]}?"
  return errors.did_you_mean(key, keys())


def _fields(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
  found = {}
  for f in dataclasses.fields(cls):
    if f.type is tasks.Task:
      for section in tasks.TASKS.values():
        found |= _fields(section, f"{prefix}{f.name}.")
    elif dataclasses.is_dataclass(f.type):
      found |= _fields(f.type, f"{prefix}{f.name}.")
    else:
      found[prefix + f.name] = f
  return found


def to_json(cfg: Experiment) -> str:
  """The experiment as JSON, as a run writes it to its workdir."""
  return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def differences(cfg: Experiment, path: pathlib.Path) -> list[str]:
  """What `cfg` changes, "key: old -> new", beyond what a resume may change.

  A key that the saved experiment does not have is newer and had its default.

  Args:
    cfg: the experiment to run.
    path: the config.json of a run.

  Raises:
    OSError, ValueError: the file is not an experiment of this version.
  """
  saved = _current(_read(path))
  defaults, new = (dict(_flatten(json.loads(to_json(c))))
                   for c in (Experiment(task=type(cfg.task)()), cfg))
  old = defaults | dict(_flatten(saved))
  resumable = {*RESUMABLE, *(f"task.{key}" for key in cfg.task.RESUMABLE)}
  absent = "no such key"
  return [
      f"{key}: {old[key]} -> {new.get(key, absent)}" for key in sorted(old)
      if old[key] != new.get(key, absent)
      and resumable.isdisjoint((key, key.split(".")[0]))]


# More checks for `resolve`: (experiment, files) -> a line per mistake.
Check = Callable[[Experiment, bool], Iterable[str]]


def resolve(config: Mapping[str, Any], files: bool = True,
            also: Check = lambda cfg, files: ()) -> Experiment:
  """Checks a config and returns it as dataclasses.

  Args:
    config: a ConfigDict, or a dict of the same shape; absent keys take their
      defaults.
    files: whether the data, the weights and the folders that it names must be
      on this machine.
    also: what rooms above this one check, as the data's sources.

  Raises:
    ConfigError: one line that names every wrong key, its value, the reason and
      the nearest valid choice.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  cfg = _typed(config)
  _refuse([*checks.check(cfg, files), *also(cfg, files)])
  return cfg


def _typed(config: Any) -> Experiment:
  """The experiment, each value checked alone; ConfigError as `resolve`."""
  problems = []
  cfg = _build(Experiment, config, "config", problems)
  _refuse(problems)
  return cfg


def _refuse(problems: list[str]) -> None:
  if problems:
    raise errors.ConfigError(" ".join("; also ".join(problems).split()))


def _flatten(tree: Mapping[str, Any], prefix="") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _build(cls, values, path, problems):
  """Makes a `cls` of a mapping; adds what is wrong to `problems`."""
  if not isinstance(values, Mapping):
    problems.append(
        f"{path}: {conversion.shown(values)} is not a section of keys")
    return None
  if cls is tasks.Task:
    cls = _task_section(values, problems)
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if cls is model.Model:
    fields = model.fields(values.get("name", cls.name))
  problems += [_unknown(cls, key, path, fields) for key in values
               if key not in fields]
  made = {}
  for name, f in fields.items():
    if name not in values:
      continue
    key, value = f"{path}.{name}", values[name]
    if dataclasses.is_dataclass(f.type):
      made[name] = _build(f.type, value, key, problems)
      continue
    try:
      made[name] = conversion.convert(value, f)
    except ValueError as e:
      problems.append(f"{key}: {conversion.shown(value)} {e}")
  return None if problems else cls(**made)


def _task_section(values: Mapping[str, Any],
                  problems: list[str]) -> type[tasks.Task]:
  """The dataclass of the task that a section names."""
  name = values.get("name", tasks.Classification.name)
  try:
    return tasks.TASKS[name]
  except (KeyError, TypeError):
    problems.append(f"config.task.name: {conversion.shown(name)} is not a task"
                    f"{errors.did_you_mean(name, tasks.TASKS)}")
    return tasks.Classification


def _unknown(cls, key: Any, path: str, fields: Mapping[str, Any]) -> str:
  """Reports a key that a section does not have."""
  name = key[:200] if isinstance(key, str) else conversion.shown(key)
  if issubclass(cls, tasks.Task):
    for task, section in tasks.TASKS.items():
      if name in (f.name for f in dataclasses.fields(section)):
        return (f"{path}.{name}: is a key of the task {task}, but {path}.name "
                f"is {cls.name}")
  return f"{path}.{name}: no such key{_nearest(f'{path}.{name}', fields)}"


def _nearest(key: str, fields: Mapping[str, Any]) -> str:
  """The key of the section that is nearest, or one of another section."""
  suggestion = did_you_mean(key.removeprefix("config."))
  name = key.rpartition(".")[2]
  if suggestion.endswith(f".{name}?"):
    return suggestion.replace("mean ", "mean config.")
  return errors.did_you_mean(name, fields)
