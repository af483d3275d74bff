"""The classes of an experiment, counted in its training data."""

import dataclasses

from metaformer_jax import errors
from metaformer_jax.config.schema import Experiment
from metaformer_jax.data import sources


def fill(cfg: Experiment, files: bool) -> Experiment:
  """Fills in the number of the classes, and their names, if they are None.

  Names that are given set the number, which the data must have.

  Args:
    cfg: an experiment whose task has `num_classes` and `class_names`.
    files: whether the data must be on this machine.

  Raises:
    ConfigError: the number is None, and the classes cannot be counted.
  """
  n, names = cfg.task.num_classes, cfg.task.class_names
  if n is None and names is not None:
    n = len(names)
  if n is None or (names is None and files):
    n, names = _count(cfg, n)
  return dataclasses.replace(cfg, task=dataclasses.replace(
      cfg.task, num_classes=n, class_names=names))


def _count(cfg: Experiment,
           outputs: int | None) -> tuple[int, tuple[str, ...] | None]:
  """Number and names of the classes, from the training data."""
  try:
    n, names = sources.classes(cfg.data, cfg.task)
  except errors.ConfigError as e:
    if outputs is not None:  # `make_data` reports it, where data is needed.
      return outputs, None
    raise errors.ConfigError(
        f"config.task.num_classes: None, and the classes cannot be counted: {e}"
        ) from e
  if outputs is None and n is None:
    raise errors.ConfigError(
        "config.task.num_classes: None, and config.data.source = "
        f"{cfg.data.source} does not know the number of its classes; set it")
  if outputs is None:
    outputs = n
  return outputs, tuple(names) if names and len(names) == outputs else None


def check_number(n: int | None, cfg: Experiment, split: str) -> None:
  """Raises ConfigError if a split's classes do not fit the model's outputs.

  Args:
    n: of the data; None if it does not know.
    cfg: the experiment.
    split: "train" or "eval", which may lack some of the classes.
  """
  outputs = cfg.task.num_classes
  if n is not None and (n > outputs or (split == "train" and n < outputs)):
    raise errors.ConfigError(
        f"config.task.num_classes: {outputs}, but the {split} data has "
        f"labels of {n} classes; None is the training data's number")
