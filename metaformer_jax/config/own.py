"""The import paths of an experiment, and which of them data may name.

A config file and the command line are the user's own. A workdir or a file of
weights is data: it may name only modules that `--allow_import` permits, unless
the same user ran the same experiment in the same folder on this machine.
"""

import hashlib
import os
import pathlib
import sys
from collections.abc import Collection, Mapping
from typing import Any

from metaformer_jax import imports
from metaformer_jax.config import typed
from metaformer_jax.config.schema import Experiment

# Names of modules that data may name, with their submodules; text has commas
# between them. None: the caller imports nothing.
Allowed = str | Collection[str] | None

# A file for each run that used modules of the user's own.
_REMEMBERED = "~/.cache/metaformer_jax/own_runs"


def paths(cfg: Experiment) -> dict[str, list[str]]:
  """The import paths of an experiment, by their keys."""
  named = {"config.model.name": [cfg.model.name],
           "config.model.token_mixers": cfg.model.token_mixers or (),
           "config.model.norm": [cfg.model.norm],
           "config.model.activation": [cfg.model.activation],
           "config.data.source": [cfg.data.source],
           "config.task.name": [cfg.task.name]}
  found = {key: [name for name in names if imports.is_path(name)]
           for key, names in named.items()}
  return {key: names for key, names in found.items() if names}


def modules(cfg: Experiment) -> list[str]:
  """The names of the modules in an experiment's import paths."""
  return sorted({imports.module_of(path) for names in paths(cfg).values()
                 for path in names})


def digest(module: str) -> str:
  """Of the source of an imported module; empty if it has no file."""
  path = getattr(sys.modules.get(module), "__file__", None)
  try:
    return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()[:16]
  except (OSError, TypeError):
    return ""


def digests(cfg: Experiment) -> dict[str, str]:
  """Digests of the imported modules that the user may have written, by name.

  These are the modules of the import paths, and what was imported from the
  folders that they are in.
  """
  named = modules(cfg)
  folders = {os.path.dirname(found) for name in named
             if (found := getattr(sys.modules.get(name), "__file__", None))}
  files = {name: getattr(module, "__file__", None) or ""
           for name, module in list(sys.modules.items())}
  near = [name for name, file in files.items()
          if os.path.dirname(file) in folders]
  return {name: digest(name) for name in sorted({*named, *near})}


def has_own_task(tree: Mapping[str, Any]) -> bool:
  """Whether nested dicts are an experiment with a task of the user's own."""
  task = tree.get("task")
  return isinstance(task, Mapping) and imports.is_path(task.get("name"))


def require_allowed(cfg: Experiment, allowed: Allowed, where: str) -> None:
  """Checks that data names allowed modules only.

  Args:
    cfg: an experiment that was read from data.
    allowed: see `Allowed`.
    where: it was read from, for the message.

  Raises:
    ConfigError: it names another module.
  """
  if allowed is None:
    return
  if isinstance(allowed, str):
    allowed = allowed.split(",")
  problems = [
      f"{where}: {key} names {name}, which is not imported because a file says "
      f"so; if you trust it, add --allow_import={imports.module_of(name)} (in "
      f"Python, allow_import={imports.module_of(name)!r})"
      for key, names in paths(cfg).items() for name in dict.fromkeys(names)
      if not any(f"{imports.module_of(name)}.".startswith(f"{module}.")
                 for module in allowed)]
  typed.refuse(problems)


def remember(workdir: pathlib.Path) -> None:
  """Notes that this user has run the experiment of a workdir in it."""
  path = _note(workdir)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
  except OSError:  # Then --allow_import is needed.
    pass


def is_remembered(workdir: pathlib.Path) -> bool:
  """Whether `remember` was called for this folder and experiment."""
  return _note(workdir).is_file()


def _note(workdir: pathlib.Path) -> pathlib.Path:
  digest = hashlib.sha256(os.fsencode(workdir.resolve()) + b"\0")
  digest.update((workdir / "config.json").read_bytes())
  return pathlib.Path(_REMEMBERED).expanduser() / digest.hexdigest()
