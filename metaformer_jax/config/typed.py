"""From a ConfigDict or a dict to an `Experiment`: keys, types and limits.

A config file builds a `ConfigDict` from `default()` and sets what differs.
Mistakes are found here, before jax is imported, and reported in one line.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from metaformer_jax import errors, imports
from metaformer_jax.config import conversion, model, tasks, trees
from metaformer_jax.config.schema import Experiment


def default(task: str = tasks.Classification.name,
            ) -> trees.ConfigDict:
  """Every key of an experiment at its default, for a config file to change."""
  return as_config(Experiment(task=tasks.TASKS[task]()))


def as_config(cfg: Any) -> trees.ConfigDict:
  """A dataclass as a ConfigDict in which optional keys keep their type."""
  if isinstance(cfg, tasks.Own):
    return trees.ConfigDict({"name": cfg.name, **cfg.settings})
  config = trees.ConfigDict()
  for f in dataclasses.fields(cfg):
    value = getattr(cfg, f.name)
    if dataclasses.is_dataclass(f.type):
      value = as_config(value)
    elif value is None or conversion.base_type(f.type) is object:
      value = trees.FieldReference(
          value, field_type=conversion.base_type(f.type))
    config[f.name] = value
  return config


def to_json(cfg: Experiment) -> str:
  """The experiment as JSON, as a run writes it to its workdir."""
  return json.dumps(as_dict(cfg), indent=2) + "\n"


def as_dict(cfg: Experiment) -> dict[str, Any]:
  """The experiment as nested dicts; the inverse of `typed`."""
  tree = dataclasses.asdict(cfg)
  if isinstance(cfg.task, tasks.Own):
    tree["task"] = {"name": cfg.task.name, **cfg.task.settings}
  return tree


def keys() -> list[str]:
  """Every "section.key" of an experiment, whatever its task."""
  return list(_fields(Experiment))


def optional_keys() -> list[str]:
  """Those of `keys` that may be None."""
  return [key for key, f in _fields(Experiment).items()
          if conversion.is_optional(f)]


def describe() -> list[str]:
  """A line for each key: "section.key=default  meaning".

  A key that several tasks have is described as the first one declares it.
  """
  return [f"{key}={f.default!r}  {f.metadata['help']}"
          for key, f in _fields(Experiment).items()]


def did_you_mean(key: str) -> str:
  """Asks for the nearest "section.key", or lists those of the section.

  A key of the same name in another section is the best.
  """
  section, _, name = key.rpartition(".")
  known = keys()
  if section in known:
    return errors.suggest([section])
  inside = [k for k in known if k.startswith(f"{section}.")]
  found = (_of_name(key) or errors.nearest(name, inside, by=_name)
           or errors.nearest(name, known, by=_name))
  valid = inside or list(dict.fromkeys(k.partition(".")[0] for k in known))
  more = ", ...; --help lists all" if len(valid) > 12 else ""
  return errors.suggest(found) or f"; valid: {', '.join(valid[:12])}{more}"


def _name(key: str) -> str:
  return key.rpartition(".")[2]


def _of_name(key: str) -> list[str]:
  """The keys with the name of a key, those of a similar section first."""
  section = key.rpartition(".")[0]
  same = [k for k in keys() if _name(k) == _name(key)]
  near = errors.nearest(section, same, by=lambda k: k.rpartition(".")[0])
  return [*near, *(k for k in same if k not in near)][:3]


def _fields(cls: type, prefix: str = "") -> dict[str, dataclasses.Field]:
  found = {}
  for f in dataclasses.fields(cls):
    if f.type is tasks.Task:
      for section in reversed(tasks.TASKS.values()):  # The first one wins.
        found = found | _fields(section, f"{prefix}{f.name}.")
    elif dataclasses.is_dataclass(f.type):
      found |= _fields(f.type, f"{prefix}{f.name}.")
    else:
      found[prefix + f.name] = f
  return found


def typed(config: Mapping[str, Any]) -> Experiment:
  """The experiment, each value checked alone.

  Args:
    config: a ConfigDict, or a dict of the same shape; absent keys take their
      defaults.

  Raises:
    ConfigError: one line that names every wrong key, its value, the reason and
      the nearest valid choice.
  """
  if isinstance(config, trees.ConfigDict):
    config = config.to_dict()
  problems = []
  cfg = _build(Experiment, config, "config", problems)
  refuse(problems)
  return cfg


def with_task(cfg: Experiment, section: type[tasks.Task]) -> Experiment:
  """The experiment of an own task, its section as the task's own dataclass.

  Args:
    cfg: its `task` is a `tasks.Own`.
    section: what the task declares.

  Raises:
    ConfigError: as `typed`.
  """
  problems = []
  task = _build(section, {"name": cfg.task.name, **cfg.task.settings},
                "config.task", problems)
  refuse(problems)
  return dataclasses.replace(cfg, task=task)


def refuse(problems: Iterable[str]) -> None:
  """Raises a ConfigError of one line if there are any problems."""
  problems = list(problems)
  if problems:
    raise errors.ConfigError(" ".join("; also ".join(problems).split()))


def flatten(tree: Mapping[str, Any], prefix="") -> Iterator[tuple[str, Any]]:
  """Yields ("section.key", value) of nested dicts."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _build(cls, values, path, problems):
  """Makes a `cls` of a mapping; adds what is wrong to `problems`."""
  if not isinstance(values, Mapping):
    problems.append(
        f"{path}: {conversion.shown(values)} is not a section of keys")
    return None
  if cls is tasks.Task:
    if imports.is_path(values.get("name")):
      settings = dict(values)
      return tasks.Own(settings.pop("name"), settings)
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
                    " or an import path, module:name"
                    f"{errors.did_you_mean(name, tasks.TASKS)}")
    return tasks.Classification


def _unknown(cls, key: Any, path: str, fields: Mapping[str, Any]) -> str:
  """Reports a key that a section does not have."""
  name = key[:200] if isinstance(key, str) else conversion.shown(key)
  if issubclass(cls, tasks.Task):
    for task, section in tasks.TASKS.items():
      if section is not cls and name in (
          f.name for f in dataclasses.fields(section)):
        return (f"{path}.{name}: is a key of the task {task}, but {path}.name "
                f"is {cls.name}")
  return f"{path}.{name}: no such key{_nearest(f'{path}.{name}', fields)}"


def _nearest(key: str, fields: Mapping[str, Any]) -> str:
  """The key of the section that is nearest, or one of another section."""
  key = key.removeprefix("config.")
  elsewhere = [f"config.{k}" for k in _of_name(key)]
  if elsewhere:
    return errors.suggest(elsewhere)
  inside = errors.suggest(errors.nearest(_name(key), sorted(fields)))
  return inside or did_you_mean(key)
