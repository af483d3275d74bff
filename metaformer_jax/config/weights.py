"""What names weights: a path, or a model of the table for its published ones.

An existing path wins over a name. "./NAME" is a path, and so is every
`pathlib.Path`.
"""

import os
import pathlib
import re

from metaformer_jax import errors, storage
from metaformer_jax.config import imagenet, own, paths, saved
from metaformer_jax.config.hub import folders
from metaformer_jax.config.model import Model
from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks import Classification
from metaformer_jax.models import registry


def model_of(value: str | pathlib.Path) -> str | None:
  """The model whose published weights are named; None if it is a path."""
  is_name = isinstance(value, str) and value in registry.list_models()
  return value if is_name and not os.path.lexists(value) else None


def located(key: str, value: str | pathlib.Path,
            kind: type[errors.UserError] = errors.ConfigError) -> pathlib.Path:
  """The path of weights that is given as a path, not as a name.

  What is on object storage is copied to this machine, but for runs.

  Args:
    key: what the user set, for the message; may be empty.
    value: the path; it need not exist.
    kind: of the error.

  Raises:
    kind: as `paths.given`, or it cannot be copied.
  """
  path = paths.given(key, value, kind)
  if not storage.is_remote(path) or saved.find_workdir(path):
    return path
  try:
    return storage.fetched(path, folders.is_part)
  except OSError as e:
    raise kind(f"{path}: cannot be read: {e.strerror or e}") from e


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
  path = paths.given("", value)
  if path.exists():
    return ""
  near = [str(p) for p in path.parent.glob("*")]
  if "/" in str(value):
    return f"does not exist{errors.did_you_mean(str(path), near)}"
  return ("does not exist, and no model has this name"
          f"{errors.did_you_mean(str(path), near + registry.list_models())}")


def published(model: str) -> Experiment:
  """The classifier of a row of the model table; its preprocessing is not set.

  Raises:
    ValueError: there is no such model.
  """
  n = registry.get_spec(model).num_classes
  names = imagenet.ids() if n == imagenet.N_CLASSES else None
  return Experiment(model=Model(name=model),
                    task=Classification(num_classes=n, class_names=names))


def named_after(path: pathlib.Path) -> str | None:
  """The model of the table that a file is named after, if any.

  Suffixes do not count, nor does what follows the first dot, as a tag of
  timm's, or the digest in torch.hub's names.
  """
  stem, known = path.name.partition(".")[0], registry.list_models()
  names = stem, re.sub(r"-[0-9a-f]{8,}$", "", stem)
  return next((name for name in names if name in known), None)


def made(value: str, allowed: own.Allowed,
         model: str | None = None) -> Experiment | None:
  """The experiment that made the weights of `config.init`, if it is known.

  Published weights, and files that record nothing but are named after a model,
  are those of a row of the model table.

  Args:
    value: of `config.init`.
    allowed: modules that a file or folder may name in import paths.
    model: as for `saved.read_weights`.

  Raises:
    ConfigError: as `saved.read_weights`.
  """
  name = model_of(value)
  if name is None:
    path = located("config.init", value)
    recorded = saved.read_weights(path, allowed, model)
    name = named_after(path) if path.is_file() else None
    if recorded or not name:
      return recorded
  return published(name)
