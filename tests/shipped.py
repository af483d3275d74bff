"""The experiments of configs/: every value that --config can take."""

import functools
import pathlib
import runpy
from collections.abc import Iterator
from typing import Any

import ml_collections

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").rglob("*.py"))


@functools.cache
def names_of(path: pathlib.Path) -> dict[str, Any]:
  """What a config file defines."""
  return runpy.run_path(str(path))


def _arguments() -> Iterator[str]:
  for path in FILES:
    name = path.relative_to(ROOT).as_posix()
    found = names_of(path)
    if "VARIANTS" in found:
      yield from (f"{name}:{variant}" for variant in found["VARIANTS"])
    else:
      yield name


CONFIGS = list(_arguments())  # "configs/x.py" or "configs/x.py:variant".


def load(argument: str) -> ml_collections.ConfigDict:
  """The config that --config=ARGUMENT loads."""
  path, _, variant = argument.partition(":")
  get_config = names_of(ROOT / path)["get_config"]
  return get_config(variant) if variant else get_config()
