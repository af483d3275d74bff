"""Tasks: one file each, all behind the protocol in `base`."""

import importlib

from metaformer_jax import errors, imports
from metaformer_jax.config import checks, derived, own, typed
from metaformer_jax.config import tasks as sections
from metaformer_jax.config.schema import Experiment
from metaformer_jax.tasks import base


def create(cfg: Experiment, files: bool = True) -> tuple[Experiment, base.Task]:
  """The experiment with all derived values, and its task.

  Modules of the user's own are imported here. Every process of a run must come
  to the same result.

  Args:
    cfg: an experiment, as `config.resolve` returns it.
    files: whether the data must be on this machine.

  Raises:
    ConfigError: a module of the user's own cannot be imported or does not keep
      its contract; or a derived value cannot be found in the data.
  """
  _import_all(cfg)
  name = cfg.task.name
  if imports.is_path(name):
    return _create_own(cfg, files)
  return importlib.import_module(f"{__name__}.{name}").create(cfg, files)


def _import_all(cfg: Experiment) -> None:
  """Imports the modules of the user's own; all that fails is in one line."""
  problems = []
  for key, names in own.paths(cfg).items():
    for name in dict.fromkeys(names):
      try:
        imports.load(name)
      except errors.ConfigError as e:
        problems.append(f"{key}: {e}")
  typed.refuse(problems)


def _create_own(cfg: Experiment,
                files: bool) -> tuple[Experiment, base.Task]:
  """A task of the user's own: `task(cfg)`, with a dataclass `task.Section`."""
  cfg, name = derived.fill(cfg), cfg.task.name
  section = getattr(imports.load(name), "Section", None)
  if not (isinstance(section, type) and issubclass(section, sections.Task)
          and section.__dict__.get("MEASURES")):
    raise errors.ConfigError(
        f"config.task.name: {name} has no Section, a dataclass of "
        "metaformer_jax.config.tasks.Task with MEASURES")
  if isinstance(cfg.task, sections.Own):
    cfg = typed.with_task(cfg, section)
    typed.refuse(checks.check_task(cfg, files))
  task = imports.call(name, "a task, task(cfg)", cfg)
  missing = [attribute for attribute in base.REQUIRED
             if not hasattr(task, attribute)]
  if missing:
    raise errors.ConfigError(
        f"config.task.name: {name} has no {', no '.join(missing)}; see "
        "metaformer_jax.tasks.base.Task")
  return cfg, task
