"""What names weights: a path, or a model of the table for its published ones.

An existing path wins over a name. "./NAME" is a path, and so is every
`pathlib.Path`.
"""

import os
import pathlib

from metaformer_jax import errors
from metaformer_jax.config import own, paths, saved
from metaformer_jax.config.model import Model
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry


def model_of(value: str | pathlib.Path) -> str | None:
  """The model whose published weights are named; None if it is a path."""
  is_name = isinstance(value, str) and value in registry.list_models()
  return value if is_name and not os.path.lexists(value) else None


def problem(value: str | pathlib.Path) -> str:
  """Why there are no such weights, "does not exist; ..."; empty if there are.

  Published ones need not be on this machine.

  Raises:
    ConfigError: a path is too long, its user is unknown, or access is denied.
  """
  name = model_of(value)
  if name is not None:
    published = registry.get_spec(name).checkpoint
    return "" if published else "has no published weights; name a file of them"
  path = paths.local("", value)
  if path.exists():
    return ""
  near = [str(p) for p in path.parent.glob("*")]
  if "/" in str(value):
    return f"does not exist{errors.did_you_mean(str(path), near)}"
  return ("does not exist, and no model has this name"
          f"{errors.did_you_mean(str(path), near + registry.list_models())}")


def made(value: str, allowed: own.Allowed) -> Experiment | None:
  """The experiment that made the weights of `config.init`, if it is known.

  Of published weights, it has the name of the model only.

  Args:
    value: of `config.init`.
    allowed: modules that a file or folder may name in import paths.

  Raises:
    ConfigError: as `saved.read_weights`.
  """
  name = model_of(value)
  if name is not None:
    return Experiment(model=Model(name=name))
  return saved.read_weights(paths.local("config.init", value), allowed)
