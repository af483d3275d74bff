"""Objects of a user's own modules, named by import path: "my_mixers:Shift".

Configs accept a path wherever they name an entry of a table. Importing a module
executes it: a path that was read from a file of data must be permitted first
(`config.own`).
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from metaformer_jax import errors

_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_PATH = re.compile(f"{_NAME}:{_NAME}")


def is_path(name: Any) -> bool:
  """Whether the name is an import path, by its form; nothing is imported."""
  return isinstance(name, str) and bool(_PATH.fullmatch(name))


def module_of(path: str) -> str:
  """ "my_mixers:Shift" -> "my_mixers"."""
  return path.partition(":")[0]


def load(path: str) -> Callable[..., Any]:
  """Imports the module and returns what the path names, something callable.

  The working directory is on the path, as for `python -m`.

  Raises:
    ConfigError: the module is not found or fails, or has no such attribute.
  """
  module_name, _, attribute = path.partition(":")
  if not {"", os.getcwd()} & set(sys.path):
    sys.path.insert(0, os.getcwd())
  if module_name not in sys.modules:
    importlib.invalidate_caches()  # The file may be newer than the process.
  try:
    found = module = importlib.import_module(module_name)
  except (Exception, SystemExit) as e:  # The module is a program.
    if isinstance(e, ModuleNotFoundError) and (
        f"{module_name}.".startswith(f"{e.name}.")):
      raise errors.ConfigError(
          f"{path}: there is no module {e.name!r}; it must be in the working "
          f"directory, {os.getcwd()}, or installed") from e
    raise errors.ConfigError(
        f"{path}: {module_name} cannot be imported: "
        f"{type(e).__name__}: {e}") from e
  for name in attribute.split("."):
    if not hasattr(found, name):
      public = [n for n in vars(module) if not n.startswith("_")]
      raise errors.ConfigError(
          f"{path}: {module_name} has no {attribute!r}"
          f"{errors.did_you_mean(attribute, public)}")
    found = getattr(found, name)
  if not callable(found):
    raise errors.ConfigError(f"{path}: is a {type(found).__name__}, which "
                             "cannot be called")
  return found


def call(path: str, what: str, *args: Any, **kwargs: Any) -> Any:
  """Calls the object of a path.

  Args:
    path: of the object.
    what: how it must be callable, for the message.
    *args, **kwargs: the arguments.

  Raises:
    ConfigError: as `load`; or it does not take these arguments.
  """
  found = load(path)
  try:
    inspect.signature(found).bind(*args, **kwargs)
  except (TypeError, ValueError) as e:
    raise errors.ConfigError(
        f"{path}: cannot be called as {what}: {e}") from e
  return found(*args, **kwargs)
