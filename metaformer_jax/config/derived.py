"""Values of an experiment that follow from others: those left at None."""

import dataclasses
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import own, weights
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry, spec

# Of the data section and the task section, by their names in `ModelSpec`.
_DATA = ("mean", "std")
_TASK = {"image_size": "input_size", "crop_pct": "crop_pct",
         "interpolation": "interpolation"}
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(spec.ModelSpec)}


def fill(cfg: Experiment, allowed: own.Allowed = ()) -> Experiment:
  """Fills in what follows from `config.init` and from the model.

  A model without a name is that of `config.init`, with its hyper-parameters
  and its preprocessing. The rest of the preprocessing is the published model's.
  The number of classes is counted in the data, by `tasks.create`.

  Args:
    cfg: an experiment; each of its values was checked alone.
    allowed: modules that `config.init` may name in import paths.

  Raises:
    ConfigError: the model has no name, and `config.init` does not record it.
  """
  if cfg.model.name is None:
    cfg = _from_init(cfg, allowed)
  try:
    row = vars(registry.get_spec(cfg.model.name))
  except ValueError:  # None, a user's own, or unknown, which `checks` reports.
    row = _DEFAULTS
  return _preprocessed(cfg, {key: row[key] for key in _DATA},
                       {key: row[name] for key, name in _TASK.items()})


def _from_init(cfg: Experiment, allowed: own.Allowed) -> Experiment:
  if cfg.init is None:
    return cfg  # `checks` reports it.
  made = weights.made(cfg.init, allowed)
  if made is None:
    raise errors.ConfigError(
        f"config.model.name: is missing, and config.init = {cfg.init!r} "
        + (weights.problem(cfg.init) or "neither records it, as workdirs, "
           "files of tools.convert and folders of transformers and timm do, "
           "nor is named after a model"))
  keep = {k: v for k, v in vars(cfg.model).items() if v is not None}
  model = dataclasses.replace(made.model, **keep)
  cfg = dataclasses.replace(cfg, model=model)
  return _preprocessed(cfg, {key: getattr(made.data, key) for key in _DATA},
                       {key: getattr(made.task, key, None) for key in _TASK})


def _preprocessed(cfg: Experiment, data: dict[str, Any],
                  task: dict[str, Any]) -> Experiment:
  """Fills in the values of the two sections that are None."""
  return dataclasses.replace(cfg, data=_filled(cfg.data, data),
                             task=_filled(cfg.task, task).filled())


def _filled(section: Any, values: dict[str, Any]) -> Any:
  missing = {key: value for key, value in values.items()
             if getattr(section, key, ...) is None}
  return dataclasses.replace(section, **missing) if missing else section
