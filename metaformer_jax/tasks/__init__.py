"""Tasks: one file each, all behind the protocol in `base`."""

import importlib

from metaformer_jax.config.schema import Experiment


def create(cfg: Experiment):
  """The task of an experiment, as a `base.Task`."""
  module = importlib.import_module(f"{__name__}.{cfg.task.name}")
  return module.create(cfg)
