"""What is learned: one file a task, all behind the protocol in `base`."""

import importlib

from metaformer_jax.config.schema import Experiment


def create(cfg: Experiment):
  """The task that the config names, as a `base.Task`."""
  return importlib.import_module(f"{__name__}.{cfg.task}").create(cfg)
