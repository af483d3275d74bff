"""JSON that others may have written: standard, and within limits."""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from metaformer_jax import storage
from metaformer_jax.config import conversion

# An experiment takes a few kilobytes, and the values of `mesh.rules` are nested
# four deep. ImageNet-21K's class names need the rest.
MAX_BYTES, _MAX_DEPTH = 2**22, 8

_SPACE = re.compile(r"[ \t\n\r]*")


def read(path: pathlib.Path, limit: int = MAX_BYTES) -> Any:
  """Parses a JSON file; OSError or ValueError says why it cannot be.

  It cannot be if it has more than `limit` bytes.
  """
  return parse(read_text(path, limit))


def read_text(path: pathlib.Path, limit: int) -> str:
  """The text of a file; OSError or ValueError as for `read`."""
  if storage.is_remote(path):
    data = path.read_bytes(limit + 1)
    if len(data) > limit:
      raise ValueError(f"is larger than {limit} bytes")
    return data.decode()
  if not path.is_file():  # Opening a pipe would block.
    raise ValueError("is not a file")
  with open(path, "rb") as file:
    # Memory is allocated for what is asked for.
    data = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
  if len(data) > limit:
    raise ValueError(f"is larger than {limit} bytes")
  return data.decode()


def parse(text: str) -> Any:
  """Parses standard JSON; ValueError says what is wrong with it."""
  too_deep = ValueError(f"is nested more than {_MAX_DEPTH} deep")
  try:
    tree = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
  except RecursionError as e:
    raise too_deep from e
  level = [tree]
  for _ in range(_MAX_DEPTH):
    level = [child for node in level if isinstance(node, (dict, list))
             for child in (node.values() if isinstance(node, dict) else node)]
  if any(isinstance(node, (dict, list)) for node in level):
    raise too_deep
  return tree


def members(text: str) -> Iterator[tuple[str, int | None, Any]]:
  """Parses an object, of which lists come item by item.

  A large file takes little more memory than its text, if each item is made
  smaller before the next one is parsed.

  Yields:
    (key, None, value) for a member that is not a list; for a list
    (key, None, []), then (key, index, item) for each of its items.

  Raises:
    ValueError: the text is not standard JSON, or not an object; says where.
  """
  cursor = _Cursor(text)
  cursor.take("{")
  keys = set()
  for _ in cursor.items("}"):
    key = cursor.value() if cursor.peek() == '"' else cursor.take('"')
    if key in keys:
      raise ValueError(f"has the key {conversion.shown(key)} twice")
    keys.add(key)
    cursor.take(":")
    if cursor.peek() != "[":
      yield key, None, cursor.value()
      continue
    yield key, None, []
    cursor.take("[")
    for index, _ in enumerate(cursor.items("]")):
      yield key, index, cursor.value()
  cursor.take("")


class _Cursor:
  """A place in a JSON text."""

  def __init__(self, text: str):
    self._text, self._at = text, 0
    self._decoder = json.JSONDecoder(object_pairs_hook=_unique,
                                     parse_constant=_refuse)

  def peek(self) -> str:
    """The next character that is no space; empty at the end."""
    self._at = _SPACE.match(self._text, self._at).end()
    return self._text[self._at:self._at + 1]

  def take(self, *valid: str) -> str:
    """Goes on behind one of these characters; "" is the end."""
    found = self.peek()
    if found not in valid:
      names = " or ".join(repr(v) if v else "the end" for v in valid)
      raise json.JSONDecodeError(f"Expecting {names}", self._text, self._at)
    self._at += len(found)
    return found

  def value(self) -> Any:
    """The value that begins here."""
    self.peek()
    try:
      found, self._at = self._decoder.raw_decode(self._text, self._at)
    except RecursionError as e:
      raise ValueError("is nested too deeply") from e
    return found

  def items(self, end: str) -> Iterator[None]:
    """Stops before each item up to a closing bracket, which it takes."""
    if self.peek() == end:
      self.take(end)
      return
    yield
    while self.take(",", end) != end:
      yield


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  made = dict(pairs)
  if len(made) < len(pairs):
    keys = sorted(key for key, _ in pairs)
    twice = next(a for a, b in itertools.pairwise(keys) if a == b)
    raise ValueError(f"has the key {conversion.shown(twice)} twice")
  return made


def _refuse(constant: str) -> None:
  raise ValueError(f"holds {constant}, which is not JSON")
