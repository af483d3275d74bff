"""Small runs in this process: their experiments, and what they leave."""

import contextlib
import dataclasses
import pathlib

import line_task

from metaformer_jax.checkpoints import manager
from metaformer_jax.config import schema
from metaformer_jax.runtime import devices, sharding, writers
from metaformer_jax.training import loop, step


def changed(cfg: schema.Experiment, **sections) -> schema.Experiment:
  """The experiment with some keys of its sections changed."""
  return dataclasses.replace(cfg, **{
      name: dataclasses.replace(getattr(cfg, name), **keys)
      for name, keys in sections.items()})


def line(**sections) -> schema.Experiment:
  """Thirty steps of the line task, an evaluation every ten epochs."""
  return changed(schema.Experiment(
      task=line_task.Section(),
      optim=schema.Optim(base_lr=25.6, warmup_epochs=0.0, min_lr=0.0),
      train=schema.Train(batch_size=8, steps=30, ema_decay=0.5),
      eval=schema.Eval(every_epochs=10.0),
      checkpoint=schema.Checkpoint(every_steps=5),
      log=schema.Log(every_steps=1, tensorboard=False)), **sections)


def run(cfg: schema.Experiment, task, workdir: pathlib.Path):
  """Trains to the end; returns the summary."""
  return loop.train_and_evaluate(cfg, task, devices.make_mesh(cfg), workdir)


def records(workdir: pathlib.Path, split="train") -> list[writers.Record]:
  """The records of a split in a run's metrics."""
  return [r for r in writers.read(workdir / "metrics.jsonl")
          if r["split"] == split]


def restore(cfg: schema.Experiment, task, workdir: pathlib.Path, i: int):
  """The (state, record) that a run saved after step i."""
  program = step.build(cfg, task, devices.make_mesh(cfg), n_examples=1500)
  checkpoints = manager.Checkpoints(workdir, cfg.checkpoint, cfg.best_measure)
  with contextlib.closing(checkpoints):
    abstract = sharding.abstract(program.shapes, program.shardings)
    trees, record = checkpoints.restore(i, abstract.trees())
  return abstract.with_trees(i, trees), record
