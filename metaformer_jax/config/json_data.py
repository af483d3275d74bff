"""JSON that others may have written: standard, and within limits."""

import itertools
import json
import pathlib
from typing import Any

from metaformer_jax.config import conversion

# An experiment takes a few kilobytes, and the values of `mesh.rules` are nested
# four deep. ImageNet-21K's class names need the rest.
_MAX_BYTES, _MAX_DEPTH = 2**22, 8


def read(path: pathlib.Path, limit: int = _MAX_BYTES) -> Any:
  """Parses a JSON file; OSError or ValueError says why it cannot be.

  It cannot be if it has more than `limit` bytes.
  """
  if not path.is_file():  # Opening a pipe would block.
    raise ValueError("is not a file")
  with open(path, "rb") as file:
    data = file.read(limit + 1)
  if len(data) > limit:
    raise ValueError(f"is larger than {limit} bytes")
  return parse(data.decode())


def parse(text: str) -> Any:
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

  too_deep = ValueError(f"is nested more than {_MAX_DEPTH} deep")
  try:
    tree = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
  except RecursionError as e:
    raise too_deep from e
  level = [tree]
  for _ in range(_MAX_DEPTH):
    level = [child for node in level if isinstance(node, (dict, list))
             for child in (node.values() if isinstance(node, dict) else node)]
  if any(isinstance(node, (dict, list)) for node in level):
    raise too_deep
  return tree
