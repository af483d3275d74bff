"""Checks across several keys of an experiment, or on disk.

Each function yields a line per mistake; `resolve` has checked each value alone
before. Task sections, model families and data sources check themselves.
"""

import os
from collections.abc import Iterator, Sequence

from metaformer_jax import errors, imports
from metaformer_jax.config import paths, tasks, weights
from metaformer_jax.config.schema import Experiment, Log
from metaformer_jax.models import registry

# Larger values would take for ever to start.
_MAX_EPOCHS = 1e6
_MAX_NDIM = 64  # Of an array: NumPy's.
_MAX_PATTERNS = 1000


def check(cfg: Experiment, files: bool = True) -> Iterator[str]:
  """All checks of this file and of the task section.

  Args:
    cfg: an experiment of which each value was checked alone.
    files: whether the files that it names must be on this machine; False if it
      is for another one.
  """
  if not isinstance(cfg.task, tasks.Own):  # It may have a model of its own.
    yield from _check_model(cfg)
  yield from check_task(cfg, files)
  yield from _check_train(cfg)
  yield from _check_mesh(cfg)
  if files:
    yield from _check_init(cfg)
    yield from _check_cache(cfg)


def _check_train(cfg: Experiment) -> Iterator[str]:
  train, optim = cfg.train, cfg.optim
  if train.batch_size % train.accumulate:
    yield (f"config.train.batch_size: {train.batch_size} is not divisible by "
           f"config.train.accumulate = {train.accumulate}; nearest: "
           f"{nearest_multiple(train.batch_size, train.accumulate)}")
  if train.steps is None and optim.warmup_epochs >= train.epochs:
    yield (f"config.optim.warmup_epochs: {optim.warmup_epochs} is not below "
           f"config.train.epochs = {train.epochs}")
  yield from _check_number(train.freeze, "config.train.freeze")
  for section, key in (("train", "epochs"), ("optim", "cooldown_epochs")):
    n = getattr(getattr(cfg, section), key)
    if n > _MAX_EPOCHS:
      yield f"config.{section}.{key}: {n} is above the largest, {_MAX_EPOCHS}"


def check_task(cfg: Experiment, files: bool) -> Iterator[str]:
  """The task section's checks; an own task's only after it was imported."""
  yield from cfg.task.check(cfg, files)
  if isinstance(cfg.task, tasks.Own):
    return
  if cfg.data.augment_on not in cfg.task.AUGMENTS_ON:
    yield (f"config.data.augment_on: {cfg.data.augment_on} is not for "
           f"config.task.name={cfg.task.name}, which augments on the "
           + " or ".join(cfg.task.AUGMENTS_ON))
  try:
    _ = cfg.best_measure
  except errors.ConfigError as e:
    yield str(e)


def check_batch(cfg: Experiment, n_devices: int) -> Iterator[str]:
  """Whether each device gets the same number of images in a micro-batch."""
  divisor = n_devices * cfg.train.accumulate
  if cfg.train.batch_size % divisor:
    yield (f"config.train.batch_size: {cfg.train.batch_size} is not divisible "
           f"by {n_devices} devices x {cfg.train.accumulate} micro-batches; "
           f"nearest: {nearest_multiple(cfg.train.batch_size, divisor)}")


def nearest_multiple(value: int, divisor: int) -> int:
  """The multiple of `divisor` nearest to `value`, at least `divisor`."""
  return max(divisor, (value + divisor // 2) // divisor * divisor)


def _check_model(cfg: Experiment) -> Iterator[str]:
  name = cfg.model.name
  if name is None:
    yield ("config.model.name: is missing; name a model of "
           "metaformer_jax.list_models(), or give weights in config.init")
    return
  if imports.is_path(name):
    for line in cfg.compile.check(name, None):
      yield f"config.compile.{line}"
    return
  try:
    spec = registry.get_spec(name)
  except ValueError as e:
    yield f"config.model.name: {e}"
    return
  overrides = cfg.model.overrides()
  for key in overrides:
    if not spec.has(key):
      yield (f"config.model.{key}: {spec.name} has no such hyper-parameter"
             f"{spec.suggest(key)}")
  settings = spec.override(**{k: v for k, v in overrides.items()
                              if spec.has(k)})
  size = cfg.task.input_size
  problems = (settings.check_structure() if size is None else
              settings.check(*size, cfg.task.num_classes or 0))
  yield from cfg.task.check_model(settings)
  for line in cfg.compile.check(spec.name, settings):
    yield f"config.compile.{line}"
  for line in problems:
    key = line.partition(":")[0]
    section = "task" if key in ("image_size", "num_classes") else "model"
    yield f"config.{section}.{line}"


def _check_init(cfg: Experiment) -> Iterator[str]:
  if cfg.init is None:
    return
  if not cfg.init:
    yield "config.init: '' is not a path; None starts from scratch"
    return
  try:
    problem = weights.problem(cfg.init)
  except errors.ConfigError as e:
    yield f"config.init: {e}"
    return
  if problem:
    yield f"config.init: {cfg.init!r} {problem}"


def _check_mesh(cfg: Experiment) -> Iterator[str]:
  mesh = cfg.mesh
  if mesh.data == -1 and mesh.fsdp == -1:
    yield "config.mesh: data and fsdp are both -1; give one of them a size"
  for axis in ("data", "fsdp"):
    if getattr(mesh, axis) == 0:
      yield f"config.mesh.{axis}: 0 is not a valid size; -1 takes the rest"
  if mesh.data > 0 and mesh.fsdp > 0:
    yield from check_batch(cfg, mesh.data * mesh.fsdp)
  for rule in mesh.rules:
    if (len(rule) != 2 or not isinstance(rule[0], str)
        or type(rule[1]) is not int or not -1 <= rule[1] < _MAX_NDIM):
      yield (f"config.mesh.rules: {rule!r:.200} is not (pattern of parameter "
             "paths, axis to split or -1)")
  yield from _check_number(mesh.rules, "config.mesh.rules")


def _check_number(patterns: Sequence, key: str) -> Iterator[str]:
  """Each is compared with all parameters."""
  if len(patterns) > _MAX_PATTERNS:
    yield f"{key}: has {len(patterns)} patterns, more than {_MAX_PATTERNS}"


def _check_cache(cfg: Experiment) -> Iterator[str]:
  """jax itself would warn of an unusable folder at each compilation."""
  folder = cfg.log.compilation_cache
  # No user asked for the default, so it may be impossible to make.
  if not folder or folder == Log().compilation_cache or "://" in folder:
    return
  key = "config.log.compilation_cache"
  try:
    parent = paths.existing_parent(paths.local(key, folder))
  except errors.ConfigError as e:
    yield str(e)
    return
  if not parent.is_dir():
    yield f"{key}: {parent} is a file, not a folder"
  elif not os.access(parent, os.W_OK):
    yield f"{key}: {parent} is not writable"
