"""ConfigDict in, a checked `Experiment` out.

A config file builds a `ConfigDict` from `default()` and sets what differs;
`resolve` turns it, with the command line's overrides, into an `Experiment`.
Everything that can be wrong is found here, before jax is imported, and told in
one line.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from metaformer_jax import errors
from metaformer_jax.config import checks
from metaformer_jax.config.schema import Experiment

# What may differ when a run is resumed: it changes no number beyond the order
# of a sum, or, as the weights to start from, has done its work.
RESUMABLE = ("mesh", "log", "checkpoint", "eval", "init")

# Of a config that is data: an experiment takes some kilobytes, and
# `mesh.rules` is the fourth container from outside.
_MAX_JSON_BYTES, _MAX_JSON_DEPTH = 2**20, 8

# The largest of int32, in which steps are counted; float32, in which a run
# computes.
_MAX_INT, _MIN_FLOAT, _MAX_FLOAT = 2**31 - 1, 2.0**-126, 2.0**128
_MAX_LENGTH = 2**13  # Of a string or tuple; twice that of a path.


def default() -> ml_collections.ConfigDict:
  """Every key of an experiment at its default, for a config file to change."""
  return _as_config(Experiment())


def read_json(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Reads an experiment that is data, as runs write it to config.json.

  Nothing in it is run, whoever it is from. Absent keys take their defaults.

  Raises:
    ConfigError: the file cannot be read, is no JSON in UTF-8, too large or too
      deep, names a key twice, or holds what no key can be set to.
  """
  try:
    if not path.is_file():  # A pipe would be waited for.
      raise ValueError("is not a file")
    with open(path, "rb") as file:
      data = file.read(_MAX_JSON_BYTES + 1)
    if len(data) > _MAX_JSON_BYTES:
      raise ValueError(f"is larger than {_MAX_JSON_BYTES} bytes")
    tree = _parse_json(data.decode())
  except (OSError, ValueError) as e:
    raise errors.ConfigError(f"--config_json: {path}: {e}") from e
  return _as_config(_typed(tree))


def _as_config(cfg: Any) -> ml_collections.ConfigDict:
  """A dataclass as a ConfigDict that knows the types of what is None."""
  config = ml_collections.ConfigDict()
  for f in dataclasses.fields(cfg):
    value = getattr(cfg, f.name)
    if dataclasses.is_dataclass(f.type):
      value = _as_config(value)
    elif value is None:
      value = config_dict.placeholder(_base_type(f.type))
    config[f.name] = value
  return config


def _parse_json(text: str) -> Any:
  """Parses JSON as the standard has it; ValueError says why it is none."""

  def unique(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
      keys = sorted(key for key, _ in pairs)
      twice = next(a for a, b in itertools.pairwise(keys) if a == b)
      raise ValueError(f"names the key {_shown(twice)} twice")
    return made

  def refuse(constant):
    raise ValueError(f"holds {constant}, which is no JSON")

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
  """Every "section.key" of an experiment."""
  return [key for key, _ in _fields(Experiment)]


def optional_keys() -> list[str]:
  """Those of `keys` that may be None."""
  return [key for key, f in _fields(Experiment) if _is_optional(f)]


def describe() -> list[str]:
  """A line for each key: "section.key=default  meaning"."""
  return [f"{key}={f.default!r}  {f.metadata['help']}"
          for key, f in _fields(Experiment)]


def _fields(cls: type, prefix: str = "",
            ) -> Iterator[tuple[str, dataclasses.Field]]:
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      yield from _fields(f.type, f"{prefix}{f.name}.")
    else:
      yield prefix + f.name, f


def _is_optional(field: dataclasses.Field) -> bool:
  return isinstance(field.type, types.UnionType)


def to_json(cfg: Experiment) -> str:
  """The experiment as JSON, as it is written to the workdir."""
  return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def differences(cfg: Experiment, saved_json: str) -> list[str]:
  """What `cfg` changes, "key: old -> new", beyond what a resume may change.

  A key that the saved experiment lacks is newer than it, and had its default.

  Raises:
    ValueError: what is saved is no experiment.
  """
  saved = _parse_json(saved_json)
  if not isinstance(saved, dict):
    raise ValueError(f"{_shown(saved)} is not a section of keys")
  defaults, new = (dict(_flatten(json.loads(to_json(c))))
                   for c in (Experiment(), cfg))
  old = defaults | dict(_flatten(saved))
  none = "no such key"
  return [
      f"{key}: {old[key]} -> {new.get(key, none)}"
      for key in sorted(old)
      if old[key] != new.get(key, none)
      and key.split(".")[0] not in RESUMABLE
      and key not in ("data.workers", "data.threads", "data.path",
                      "data.max_bad_fraction", "train.max_skipped")]


def resolve(config: Mapping[str, Any], files: bool = True) -> Experiment:
  """Checks a config and returns it as dataclasses.

  Args:
    config: a ConfigDict, or a dict of the same shape; absent keys take their
      defaults.
    files: whether the data, the weights and the folders that it names must be
      on this machine.

  Raises:
    ConfigError: one line that names every key that is wrong, its value, the
      reason and the nearest valid choice.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  cfg = _typed(config)
  _refuse(list(checks.check(cfg, files)))
  return cfg


def _typed(config: Any) -> Experiment:
  """The experiment, each value checked by itself; ConfigError as `resolve`."""
  problems = []
  cfg = _build(Experiment, config, "config", problems)
  _refuse(problems)
  return cfg


def _refuse(problems: list[str]) -> None:
  if problems:
    raise errors.ConfigError(" ".join("; also ".join(problems).split()))


def _shown(value: Any) -> str:
  """The value as Python writes it, cut where it is long."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # More digits than Python prints; deep.
    text = f"<{type(value).__name__} that is too large to print>"
  return text if len(text) <= 200 else f"{text[:200]}..."


def _flatten(tree: Mapping[str, Any], prefix="") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield prefix + key, value


def _base_type(annotation):
  """tuple for `tuple[int, ...] | None`, float for `float | None`, ..."""
  if isinstance(annotation, types.UnionType):
    annotation, = (a for a in typing.get_args(annotation)
                   if a is not types.NoneType)
  return typing.get_origin(annotation) or annotation


def _build(cls, values, path, problems):
  """Makes `cls` of a mapping; adds what is wrong to `problems`."""
  if not isinstance(values, Mapping):
    problems.append(f"{path}: {_shown(values)} is not a section of keys")
    return None
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      name = key[:200] if isinstance(key, str) else _shown(key)
      problems.append(f"{path}.{name}: no such key"
                      f"{errors.did_you_mean(name, fields)}")
  made = {}
  for name, f in fields.items():
    if name not in values:
      continue
    key, value = f"{path}.{name}", values[name]
    if dataclasses.is_dataclass(f.type):
      made[name] = _build(f.type, value, key, problems)
      continue
    try:
      made[name] = _convert(value, f)
    except ValueError as e:
      problems.append(f"{key}: {_shown(value)} {e}")
  return None if problems else cls(**made)


def _convert(value, field):
  """Returns the value in the field's type; ValueError says why it has none."""
  base = _base_type(field.type)
  if value is None:
    if _is_optional(field):
      return None
    raise ValueError(f"is not {'an' if base is int else 'a'} {base.__name__}")
  if base is not tuple:
    return _convert_one(value, base, field.metadata)
  if isinstance(value, str) or not isinstance(value, (tuple, list)):
    raise ValueError("is not a tuple")
  if len(value) > _MAX_LENGTH:
    raise ValueError(f"has more than {_MAX_LENGTH} items")
  length = field.metadata["length"]
  if length is not None and len(value) != length:
    raise ValueError(f"has {len(value)} items, not {length}")
  annotation = field.type
  if _is_optional(field):
    annotation = typing.get_args(annotation)[0]
  item = typing.get_args(annotation)[0]
  if typing.get_origin(item) is tuple:
    if not all(isinstance(v, (tuple, list)) for v in value):
      raise ValueError("is not a tuple of tuples")
    for leaf in itertools.chain(*value):  # What they are, `checks` tells.
      if isinstance(leaf, str):
        _check_text(leaf)
      elif isinstance(leaf, int) and abs(leaf) > _MAX_INT:
        raise ValueError(f"holds {_shown(leaf)}, which is too large")
    return tuple(tuple(v) for v in value)
  made = []
  for v in value:
    try:
      made.append(_convert_one(v, item, field.metadata))
    except ValueError as e:
      raise ValueError(f"holds {_shown(v)}, which {e}") from None
  return tuple(made)


def _convert_one(value, kind, limits):
  """One value of `kind` within its limits."""
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      value = float(value)
    except OverflowError:
      raise ValueError("is too large") from None
  if not isinstance(value, kind) or (
      isinstance(value, bool) and kind is not bool):
    raise ValueError(f"is not {'an' if kind is int else 'a'} {kind.__name__}")
  if kind is float and not math.isfinite(value):
    raise ValueError("is not a finite number")
  if limits["low"] is not None and value < limits["low"]:
    raise ValueError(f"is below the least, {limits['low']}")
  if limits["high"] is not None and value > limits["high"]:
    raise ValueError(f"is above the largest, {limits['high']}")
  if limits["above"] is not None and value <= limits["above"]:
    raise ValueError(f"is not above {limits['above']}")
  if (kind is int and abs(value) > _MAX_INT) or (
      kind is float and abs(value) >= _MAX_FLOAT):
    raise ValueError("is too large")
  if kind is float and 0 < abs(value) < _MIN_FLOAT:
    raise ValueError("is too small: 0 in float32")
  if kind is str:
    _check_text(value)
  if limits["each"] == "odd" and value % 2 == 0:
    raise ValueError(f"is even; nearest: {value + 1}")
  if limits["choices"] and value not in limits["choices"]:
    raise ValueError(
        f"is not a choice{errors.did_you_mean(value, limits['choices'])}")
  return value


def _check_text(value: str) -> None:
  """ValueError: no file can have such a name."""
  if len(value) > _MAX_LENGTH:
    raise ValueError(f"is longer than {_MAX_LENGTH} characters")
  try:
    encoded = os.fsencode(value)
  except UnicodeEncodeError:
    raise ValueError("is not valid Unicode") from None
  if b"\0" in encoded:
    raise ValueError("holds a NUL character")
