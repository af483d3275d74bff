"""What the chips of a slice send each other in a training step.

The recipe of PoolFormer-S12, mixup and cutmix included, with one block in each
stage and images of 64 pixels; compiled for TPUs that are not here.
"""

import jax
import pytest

from metaformer_jax import tasks
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.preflight import compilation, topologies
from metaformer_jax.recipes import classification
from metaformer_jax.runtime import devices

pytestmark = pytest.mark.slow


def compiled(monkeypatch, name, kernels):
  """The compiled step, and the program of which it is."""
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  chips = topologies.devices(topologies.parse(name))
  config = classification.poolformer("poolformer_s12")
  config.model.depths = (1, 1, 1, 1)
  config.model.dtype = "bfloat16"
  config.compile.kernels = kernels
  config.task.num_classes = 1000
  config.task.image_size = 64
  config.data.path = "/imagenet"
  config.train.batch_size = 128 * len(chips)
  cfg, task = tasks.create(config_lib.resolve(config), files=False)
  lowered, = compilation.lower_steps(
      cfg, task, devices.make_mesh(cfg, chips), n_examples=1_281_167)
  return compilation.compile_step(lowered), lowered.program


@pytest.mark.parametrize(("name", "kernels"), [
    ("v5e-8", "xla"), ("v5e-256", "xla"), ("v5e-8", "pallas")])
def test_gradients_are_summed_once_and_little_else_is_sent(
    monkeypatch, name, kernels):
  found, program = compiled(monkeypatch, name, kernels)
  n_params = sum(x.size for x in jax.tree.leaves(program.shapes.params))
  assert {c.kind for c in found.collectives} == {"all-reduce"}
  by_dtype = {}
  for c in found.collectives:
    by_dtype.setdefault(c.dtype, []).append(c)
  largest, = by_dtype.pop("bf16")
  assert largest.count == 1
  # Matrices; vectors are summed in float32.
  assert 0.99 < largest.n_bytes / (2 * n_params) <= 1
  rest = sum(c.count * c.n_bytes for cs in by_dtype.values() for c in cs)
  assert rest < 0.01 * largest.n_bytes
