"""Small programs and reports for the tests of the preflight."""

import line_task

from metaformer_jax.config import typed
from metaformer_jax.config.schema import Data, Experiment, Train
from metaformer_jax.preflight import compilation, hlo, report, topologies
from metaformer_jax.runtime import devices

GIB = 2**30


def line_on(name, *, values=1, **train):
  """The toy task of tests/line_task.py on a slice, lowered.

  An example has this many values of x.
  """
  class Task(line_task.LineTask):
    def train_batches(self, batch_size):
      return super().train_batches(batch_size * values)

  cfg = Experiment(task=line_task.Section(), data=Data(source="digits"),
                   train=Train(steps=3, **train))
  chips = topologies.devices(topologies.parse(name))
  (lowered,) = compilation.lower_steps(
      cfg, Task(), devices.make_mesh(cfg, chips), n_examples=10)
  return lowered


def small_experiment():
  """A PoolFormer with four blocks on 32x32 images; compiles in seconds."""
  config = typed.default()
  config.model.name = "poolformer_s12"
  config.task.num_classes = 10
  config.model.depths = (1, 1, 1, 1)
  config.model.dims = (16, 32, 32, 64)
  config.data.source = "digits"
  config.task.image_size = 32
  config.train.batch_size = 8 * 128
  config.train.ema_decay = 0.9
  return config


def subject_of(**changes):
  cfg = Experiment(data=Data(source="digits"),
                   train=Train(batch_size=2048, accumulate=2))
  known = {
      "cfg": cfg, "target": topologies.parse("v5e-8"), "n_params": 10**7,
      "n_devices": 8, "n_hosts": 1, "mesh": {"data": 8, "fsdp": 1},
      "n_steps": 1000, "n_examples": 1_281_167, "examples_are": "as given",
      "batch_bytes": 3 * 10**8, "versions": {"jax": "1"}}
  return report.Subject(**known | changes)


def compiled_of(**changes):
  known = {
      "fits": True, "needed": 4 * GIB, "available": 16 * GIB, "seconds": 1.0,
      "flops": 197e12 * 0.05, "state": 10**8, "checkpoint": 10**8,
      "code": 10**8, "accessed": 819e9 * 0.2, "collectives": (
          hlo.Collective("all-reduce", "f32", 1, 4 * 10**7, 8),)}
  return compilation.Compiled(**known | changes)
