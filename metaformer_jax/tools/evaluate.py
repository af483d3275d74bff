r"""Evaluates a checkpoint of a run and prints its measures as JSON:

    python -m metaformer_jax.tools.evaluate --config=configs/quickstart.py \
        --workdir=runs/quickstart

Every example of the evaluation split is counted exactly once.
"""

import json
import pathlib

from absl import flags

from metaformer_jax import cli, errors
from metaformer_jax.config.schema import Experiment

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which one: last, best, or a step.")


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Evaluates the checkpoint that the flags name."""
  checkpoint = which()
  mesh = cli.start_jax(cfg)
  from metaformer_jax import tasks  # noqa: PLC0415
  from metaformer_jax.training import evaluate  # noqa: PLC0415

  result = evaluate.evaluate_checkpoint(cfg, tasks.create(cfg), mesh, workdir,
                                        checkpoint)
  print(json.dumps(result), flush=True)


def which() -> str | int:
  """The value of --checkpoint: "last", "best" or a step."""
  value = _CHECKPOINT.value
  if value.isdecimal():
    return int(value)
  if value not in ("last", "best"):
    raise errors.ConfigError(
        f"--checkpoint: {value!r} is not last, best or a step")
  return value


if __name__ == "__main__":
  cli.run(main)
