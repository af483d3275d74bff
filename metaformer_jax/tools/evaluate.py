r"""Evaluates a run's checkpoint, or weights, and prints the measures:

    python -m metaformer_jax.tools.evaluate --workdir=runs/quickstart
    python -m metaformer_jax.tools.evaluate --weights=caformer_s18.pth \
        --weights=poolformer_s12 --config.data.path=/data/imagenet

The experiment is that of the run, or what the weights record of theirs;
--config.KEY=VALUE changes it, as --config.data.path=FOLDER for other data, and
so does --config=FILE. The model must be that of the weights. Every example of
the evaluation split is counted exactly once.

A checkpoint's measures are printed as JSON, those of --weights as a table, as
JSON (--json) or as comma-separated values (--csv). --per_class prints those of
each class instead, if the task has them. --predictions=FILE also writes what is
predicted: of detection COCO's results, [{"image_id", "category_id", "bbox",
"score"}, ...], with the data's own numbers, for pycocotools and COCO's server.
Masks are in a second file, NAME.masks.json for NAME.json, with "segmentation"
in the place of "bbox": given both, pycocotools takes areas from the boxes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from metaformer_jax import cli, errors
from metaformer_jax.config import paths, saved
from metaformer_jax.config.schema import Experiment
from metaformer_jax.tools import output

_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "last", "Which one of the workdir's: last, best, or a step.")
flags.DEFINE_multi_string(
    "weights", [], "Instead of --workdir: the name of a model with published "
    "weights, a file, or a run's folder; several by several such flags.")
flags.DEFINE_string(
    "model", None, "Name of the model, for weights that do not record it.")
_CSV = flags.DEFINE_bool("csv", False, "Print comma-separated values.")
_JSON = flags.DEFINE_bool("json", False, "Print a JSON object on each line.")
_PER_CLASS = flags.DEFINE_bool(
    "per_class", False, "Print the measures of each class; not of classifiers.")
_PREDICTIONS = flags.DEFINE_string(
    "predictions", None, "A file for what is predicted, as JSON; detection "
    "only.")

Row = dict[str, Any]


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Evaluates the checkpoint or the weights that the flags name."""
  if _CSV.value and _JSON.value:
    raise errors.ConfigError("--csv: cannot be combined with --json")
  form = "csv" if _CSV.value else "json" if _JSON.value else None
  if _PREDICTIONS.value is not None and len(_weights()) > 1:
    raise errors.ConfigError("--predictions: takes one of --weights at a time")
  if _weights():
    rows, form = _evaluate_weights(cfg), form or "table"
  else:
    rows = [_evaluate_checkpoint(cfg, workdir)]
    form = form or ("table" if _PER_CLASS.value else "json")
  if _PREDICTIONS.value is not None:
    predictions = rows[0].pop("predictions")
    _on_first_process(
        lambda: _write_file(predictions, has_masks="mask_ap" in rows[0]))
  output.write(_classes(rows) if _PER_CLASS.value else rows, form)


def _details(task: Any) -> list[str]:
  """The methods of evaluators, besides their measures, that flags ask for.

  Raises:
    ConfigError: the task's evaluators lack one, or the file for predictions
      cannot be written.
  """
  problems = {}
  if _PER_CLASS.value:
    problems["table"] = "--per_class: the task has no measures of classes"
  if _PREDICTIONS.value is not None:
    problems["predictions"] = "--predictions: the task has none for a file"
  evaluators = task.make_evaluators().values()
  for method, problem in problems.items():
    if not any(hasattr(evaluator, method) for evaluator in evaluators):
      raise errors.ConfigError(problem)
  if "predictions" in problems:
    _on_first_process(_check_file)
  return list(problems)


def _on_first_process(act: Callable[[], None]) -> None:
  """Calls it there; an error is raised on all processes."""
  import jax  # noqa: PLC0415

  from metaformer_jax.runtime import processes  # noqa: PLC0415  Imports jax.

  with processes.agreeing():
    if jax.process_index() == 0:
      act()


def _check_file() -> None:
  """Raises ConfigError before the evaluation if its file cannot be written."""
  path = paths.local("--predictions", _PREDICTIONS.value).absolute()
  if path.is_dir() or not os.access(path.parent, os.W_OK):
    raise errors.ConfigError(f"--predictions: {_PREDICTIONS.value} is not a "
                             "file in a folder that can be written")


def _write_file(predictions: list[Row], has_masks: bool) -> None:
  """Writes boxes, and masks if the model has them, into files of their own."""
  path = paths.local("--predictions", _PREDICTIONS.value)
  files = {path: "segmentation"}
  if has_masks:
    files[path.with_suffix(f".masks{path.suffix}")] = "bbox"
  for path, other in files.items():
    rows = [{key: value for key, value in row.items() if key != other}
            for row in predictions]
    try:
      output.write_json(path, rows)
    except OSError as e:
      raise errors.StorageError(
          f"--predictions: {path} cannot be written: {e}") from e


def _classes(rows: list[Row]) -> list[Row]:
  """The rows of the classes; with several weights, each with their name."""
  return [({"weights": row["weights"]} if len(rows) > 1 else {}) | of_class
          for row in rows for of_class in row["table"]]


def _weights() -> list[str]:
  """The values of --weights, which --workdir and --checkpoint exclude."""
  weights = cli.given("weights")
  for flag in ("workdir", "checkpoint"):
    if weights and cli.given(flag):
      raise errors.ConfigError(
          f"--weights: cannot be combined with --{flag}; name the folder of a "
          "run, or of a step, as --weights")
  return weights


def _evaluate_checkpoint(cfg: Experiment, workdir: pathlib.Path) -> Row:
  checkpoint = which()
  if (workdir / "config.json").is_file():  # Else it is reported below.
    check_model(cfg, saved.read_run(workdir, None), workdir, "--workdir")
  cfg, task, mesh = cli.start(cfg, workdir=workdir)
  from metaformer_jax.training import evaluate  # noqa: PLC0415

  return evaluate.evaluate_checkpoint(cfg, task, mesh, workdir, checkpoint,
                                      _details(task))


def _evaluate_weights(cfg: Experiment) -> list[Row]:
  """The measures of each of --weights, and how they were taken."""
  import jax  # noqa: PLC0415

  from metaformer_jax import inference  # noqa: PLC0415
  from metaformer_jax.runtime import agreement, processes  # noqa: PLC0415
  from metaformer_jax.training import evaluate  # noqa: PLC0415

  named = cli.given("config") or cli.given("config_json")
  rows, mesh = [], None
  for weights in _weights():
    made, path = _made(weights, cfg.model.name if named else None)
    if not named:
      cfg = cli.overridden(made, train=False)
    mesh = mesh or cli.start_jax(cfg)
    with processes.agreeing():
      # A config may say what the weights do not record.
      if not named or saved.read_weights(path, None):
        check_model(cfg, made, path, "--weights")
    filled, task, _ = cli.start(cfg, mesh)
    details = _details(task)
    with processes.agreeing():
      variables = inference.read(task, path)
    processes.require_same(
        lambda found=variables: {"weights": agreement.of_arrays(found)})
    result = evaluate.evaluate_variables(filled, task, mesh, variables,
                                         details)
    rows.append({"weights": weights, "model": filled.model.name, **result,
                 "params": sum(map(np.size, jax.tree.leaves(
                     variables["params"]))),
                 "image": "x".join(map(str, filled.task.input_size or ()))})
  return rows


def _experiment() -> Experiment | None:
  """The experiment of a command line that names none."""
  if weights := _weights():
    return _made(weights[0])[0]
  if workdir := cli.given("workdir"):
    cfg = saved.read_run(paths.given("--workdir", workdir[0]), cli.allowed())
    return dataclasses.replace(cfg, init=None)  # The run has read it.
  return None


@functools.cache
def _made(weights: str, model: str | None = None,
          ) -> tuple[Experiment, pathlib.Path]:
  """The experiment that made weights, and where they are.

  `model` is that of weights which do not record it, unless --model names it.
  """
  from metaformer_jax import inference  # noqa: PLC0415  Imports jax.

  model = next(iter(cli.given("model")), model)
  try:
    cfg, path = inference.experiment(weights, model, cli.allowed())
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--weights: {e}") from e
  return dataclasses.replace(cfg, init=None), path


def check_model(cfg: Experiment, made: Experiment, path: pathlib.Path,
                flag: str) -> None:
  """Raises ConfigError if the weights' model computes something else."""
  different = saved.model_differences(made.model, cfg.model)
  if different:
    raise errors.ConfigError(
        f"{flag}: {path} is of another model ({'; '.join(different)}: made "
        "with, this one)")


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
  cli.run(main, otherwise=_experiment, train=False)


if __name__ == "__main__":
  console()
