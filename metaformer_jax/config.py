"""ConfigDict in, a checked `Experiment` out.

A config file builds a `ConfigDict` from `default()` and sets what differs;
`resolve` turns it, with the command line's overrides, into an `Experiment`.
Everything that can be wrong is found here, before jax is imported, and told in
one line.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from metaformer_jax import checks, errors
from metaformer_jax.experiment import Experiment

# What may differ when a run is resumed: it changes no number beyond the order
# of a sum, or, as the weights to start from, has done its work.
RESUMABLE = ("mesh", "log", "checkpoint", "eval", "init")


def default() -> ml_collections.ConfigDict:
  """Every key of an experiment at its default, for a config file to change."""

  def build(cls):
    config = ml_collections.ConfigDict()
    for f in dataclasses.fields(cls):
      if dataclasses.is_dataclass(f.type):
        config[f.name] = build(f.type)
      elif f.default is None:
        config[f.name] = config_dict.placeholder(_base_type(f.type))
      else:
        config[f.name] = f.default
    return config

  return build(Experiment)


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
  """What `cfg` changes, "key: old -> new", beyond what a resume may change."""
  new = dict(_flatten(json.loads(to_json(cfg))))
  old = dict(_flatten(json.loads(saved_json)))
  return [
      f"{key}: {old.get(key)} -> {new.get(key)}"
      for key in sorted(new.keys() | old.keys())
      if old.get(key) != new.get(key)
      and key.split(".")[0] not in RESUMABLE
      and key not in ("data.workers", "data.threads", "data.path",
                      "data.max_bad_fraction", "train.max_skipped")]


def resolve(config: Mapping[str, Any]) -> Experiment:
  """Checks a config and returns it as dataclasses.

  Args:
    config: a ConfigDict, or a dict of the same shape; absent keys take their
      defaults.

  Raises:
    ConfigError: one line that names every key that is wrong, its value, the
      reason and the nearest valid choice.
  """
  problems = []
  if isinstance(config, ml_collections.ConfigDict):
    config = config.to_dict()
  cfg = _build(Experiment, config, "config", problems)
  if not problems:
    problems = list(checks.check(cfg))
  if problems:
    raise errors.ConfigError(" ".join("; also ".join(problems).split()))
  return cfg


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
    problems.append(f"{path}: {values!r} is not a section of keys")
    return None
  fields = {f.name: f for f in dataclasses.fields(cls)}
  for key in values:
    if key not in fields:
      problems.append(f"{path}.{key}: no such key"
                      f"{errors.did_you_mean(key, fields)}")
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
      problems.append(f"{key}: {value!r} {e}")
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
    return tuple(tuple(v) for v in value)
  made = []
  for v in value:
    try:
      made.append(_convert_one(v, item, field.metadata))
    except ValueError as e:
      raise ValueError(f"holds {v!r}, which {e}") from None
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
  if limits["each"] == "odd" and value % 2 == 0:
    raise ValueError(f"is even; nearest: {value + 1}")
  if limits["choices"] and value not in limits["choices"]:
    raise ValueError(
        f"is not a choice{errors.did_you_mean(value, limits['choices'])}")
  return value
