"""Conversion of single values to the types and limits of their fields."""

import dataclasses
import itertools
import math
import os
import types
import typing
from typing import Any

from metaformer_jax import errors, imports

# Of a field that a task of the user's own declares without `option`.
_NO_LIMITS = dict.fromkeys(("low", "high", "above", "choices", "own", "each"))

# Steps are counted in int32, and runs compute in float32.
_MAX_INT, _MIN_FLOAT, _MAX_FLOAT = 2**31 - 1, 2.0**-126, 2.0**128
_MAX_LENGTH = 2**13  # Of a string or tuple; twice the longest path.
_MAX_NAMES = 2**16  # Of a tuple of strings; ImageNet-21K has 21,841 classes.


def shown(value: Any) -> str:
  """The value as Python writes it, shortened if long."""
  try:
    text = repr(value)
  except (ValueError, RecursionError):  # Too many digits; nested too deeply.
    text = f"<{type(value).__name__} that is too large to print>"
  return text if len(text) <= 200 else f"{text[:200]}..."


def is_optional(field: dataclasses.Field) -> bool:
  return isinstance(field.type, types.UnionType)


def base_type(annotation):
  """float for `float | None`, tuple for `tuple[int, ...]`, or object."""
  kind, *others = _kinds(annotation)
  return object if others else typing.get_origin(kind) or kind


def _kinds(annotation) -> list:
  """[float, tuple[float, ...]] for `float | tuple[float, ...] | None`."""
  if not isinstance(annotation, types.UnionType):
    return [annotation]
  return [a for a in typing.get_args(annotation) if a is not types.NoneType]


def _kind_for(value, annotation):
  """The alternative of the annotation that is a tuple if the value is one."""
  kinds = _kinds(annotation)
  is_tuple = isinstance(value, (tuple, list))
  return next((k for k in kinds
               if (typing.get_origin(k) is tuple) == is_tuple), kinds[0])


def convert(value, field):
  """Returns the value in the field's type; ValueError says why it cannot be."""
  kind = _kind_for(value, field.type)
  base = typing.get_origin(kind) or kind
  if value is None:
    if is_optional(field):
      return None
    raise ValueError(f"is not {'an' if base is int else 'a'} {base.__name__}")
  if base is not tuple:
    return _convert_one(value, base, field.metadata)
  if isinstance(value, str) or not isinstance(value, (tuple, list)):
    raise ValueError("is not a tuple")
  item = typing.get_args(kind)[0]
  most = _MAX_NAMES if item is str else _MAX_LENGTH
  if len(value) > most:
    raise ValueError(f"has more than {most} items")
  length = field.metadata.get("length")
  if length is not None and len(value) != length:
    raise ValueError(f"has {len(value)} items, not {length}")
  if typing.get_origin(item) is tuple:
    if not all(isinstance(v, (tuple, list)) for v in value):
      raise ValueError("is not a tuple of tuples")
    for leaf in itertools.chain(*value):  # `checks` knows what they must be.
      if isinstance(leaf, str):
        check_text(leaf)
      elif isinstance(leaf, int) and abs(leaf) > _MAX_INT:
        raise ValueError(f"holds {shown(leaf)}, which is too large")
    return tuple(tuple(v) for v in value)
  made = []
  for v in value:
    try:
      made.append(_convert_one(v, item, field.metadata))
    except ValueError as e:
      raise ValueError(f"holds {shown(v)}, which {e}") from None
  return tuple(made)


def _convert_one(value, kind, limits):
  """One value of `kind` within its limits."""
  limits = {**_NO_LIMITS, **limits}
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
    check_text(value)
  if limits["each"] == "odd" and value % 2 == 0:
    raise ValueError(f"is even; nearest: {value + 1}")
  if limits["choices"] and value not in limits["choices"] and not (
      limits["own"] and imports.is_path(value)):
    own = " or an import path, module:name" if limits["own"] else ""
    raise ValueError(
        f"is not a choice{own}{errors.did_you_mean(value, limits['choices'])}")
  return value


def check_text(value: str) -> None:
  """ValueError if the text cannot be a file's name."""
  if len(value) > _MAX_LENGTH:
    raise ValueError(f"is longer than {_MAX_LENGTH} characters")
  try:
    encoded = os.fsencode(value)
  except UnicodeEncodeError:
    raise ValueError("is not valid Unicode") from None
  if b"\0" in encoded:
    raise ValueError("holds a NUL character")
