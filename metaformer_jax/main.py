"""Trains and evaluates an experiment:

    python -m metaformer_jax.main --config=configs/quickstart.py

The same command with the same workdir resumes the run.
"""

import pathlib

from metaformer_jax import cli
from metaformer_jax.config.schema import Experiment


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Runs a checked experiment."""
  cfg, task, mesh = cli.start(cfg, workdir=workdir)
  # Imported late, so that a mistake is reported at once.
  from metaformer_jax.training import loop  # noqa: PLC0415

  loop.train_and_evaluate(cfg, task, mesh, workdir)


def console() -> None:
  """The command metaformer-train."""
  cli.run(main)


if __name__ == "__main__":
  console()
