r"""Evaluates a checkpoint of a run and prints its measures as JSON:

    python -m metaformer_jax.tools.evaluate --workdir=runs/quickstart

The experiment is that of the run; --config.KEY=VALUE changes it, as
--config.data.path=FOLDER for other data, and so does --config=FILE. The model
must be the run's. Every example of the evaluation split is counted exactly
once.
"""

import json
import pathlib

from absl import flags

from metaformer_jax import cli, errors
from metaformer_jax.config import saved
from metaformer_jax.config.schema import Experiment

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which one: last, best, or a step.")


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Evaluates the checkpoint that the flags name."""
  checkpoint = which()
  check_model(cfg, workdir)
  cfg, task, mesh = cli.start(cfg)
  from metaformer_jax.training import evaluate  # noqa: PLC0415

  result = evaluate.evaluate_checkpoint(cfg, task, mesh, workdir, checkpoint)
  print(json.dumps(result), flush=True)


def check_model(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Raises ConfigError if the run's model computes something else."""
  if not (workdir / "config.json").is_file():
    return  # `evaluate_checkpoint` reports it.
  made = saved.read_run(workdir, None)
  different = saved.model_differences(made.model, cfg.model)
  if different:
    raise errors.ConfigError(
        f"--workdir: {workdir} is a run of another model "
        f"({'; '.join(different)}: the run's, this one)")


def which() -> str | int:
  """The value of --checkpoint: "last", "best" or a step."""
  value = _CHECKPOINT.value
  if value.isdecimal():
    return int(value)
  if value not in ("last", "best"):
    raise errors.ConfigError(
        f"--checkpoint: {value!r} is not last, best or a step")
  return value


def console() -> None:
  """The command metaformer-evaluate."""
  cli.run(main, of_run=True)


if __name__ == "__main__":
  console()
