"""Transforms of examples, for tests."""

from metaformer_jax.config import derived, schema, tasks


def made(transform, data: schema.Data, task: tasks.Classification):
  """The transform with the default model's values where the config has None."""
  cfg = derived.fill(schema.Experiment(data=data, task=task))
  return transform(cfg.data, cfg.task)
