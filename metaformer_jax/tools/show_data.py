r"""Draws what training makes of images, or predictions beside the truth:

    python -m metaformer_jax.tools.show_data --config=configs/quickstart.py \
        --output=augmented.png
    python -m metaformer_jax.tools.show_data --weights=runs/scenes \
        --output=predicted.png

Of an experiment (--config, --config_json and --config.KEY=VALUE, as for
training), each row is an image of the training split: as it is, then as the
transform gives it in the first epochs, with the draws of the experiment's seed.
If the step changes it on the device (RandAugment, mixup, cutmix, erasing), the
same draws follow after that, each column with the keys of one step and the
column as its batch. Boxes, masks and label maps follow the image.

With --weights, each row is an image of the evaluation split: as it is, with its
ground truth, then with what the weights predict. The data is that of the first
weights' run, unless --config.KEY=VALUE changes it. Of a classifier, classes are
written above the images.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from metaformer_jax import cli, command, errors
from metaformer_jax.config.schema import Experiment
from metaformer_jax.tools import panels

# What the larger side of small images is enlarged to, so that text is legible.
_LEGIBLE = 200

# Classes with less than this are not written above an image.
_SHOWN = 0.05

Example = tuple[np.ndarray, Mapping[str, Any]]


def augmented(cfg: Experiment, args: argparse.Namespace,
              ) -> list[list[panels.Panel]]:
  """Rows of training images: themselves, by the transform, after the step."""
  cfg, task, _ = cli.start(cfg)
  _require(task, "truth", "training_examples")
  data = task.make_data("train")
  chosen = _chosen(data, args)
  sources = [_with_truth(task, cfg, data, index) for index in chosen]
  by_transform, by_step = [], []
  for column in range(args.columns):
    batch = [data.training_example(index, column) for index in chosen]
    by_transform.append(_examples(task, batch))
    by_step.append(_examples(task, batch, _keys(cfg, task, column)))
  changed = any(abs(one[0].astype(int) - two[0]).max() > 1
                for before, after in zip(by_transform, by_step)
                for one, two in zip(before, after))
  titled = {**{f"epoch {i}": found for i, found in enumerate(by_transform)},
            **({f"step {i}": found for i, found in enumerate(by_step)}
               if changed else {})}
  rows = []
  for row, (index, source) in enumerate(zip(chosen, sources)):
    drawn = [_panel(task, found[row], title) for title, found in titled.items()]
    rows.append([_within(_panel(task, source, f"example {index}", legend=True),
                         max(panel.picture.height for panel in drawn)), *drawn])
  return rows


def predicted(cfg: Experiment, args: argparse.Namespace,
              ) -> list[list[panels.Panel]]:
  """Rows of evaluation images: themselves, the truth, each of the weights."""
  from metaformer_jax import inference  # noqa: PLC0415  Imports jax.

  cfg, task, _ = cli.start(cfg)
  _require(task, "truth")
  data = task.make_data("eval")
  chosen = _chosen(data, args)
  truths = [_with_truth(task, cfg, data, index) for index in chosen]
  rows = [[panels.Panel(_enlarged(image), f"example {index}"),
           _panel(task, (image, found), "ground truth", legend=True)]
          for index, (image, found) in zip(chosen, truths)]
  for weights, model in panels.models_of(args.weights, args.model):
    try:
      loaded = inference.load(weights, model=model,
                              allow_import=args.allow_import)
    except errors.ConfigError as e:
      raise errors.ConfigError(f"--weights: {e}") from e
    if loaded.cfg.task.name != cfg.task.name:
      raise errors.ConfigError(
          f"--weights: {weights} is of the task {loaded.cfg.task.name}, not "
          f"{cfg.task.name}")
    found = loaded.predict([image for image, _ in truths], len(truths))
    for row, (image, _), one in zip(rows, truths, found):
      row.append(_panel(loaded.task, (image, one), panels.short(weights),
                        legend=True))
  return rows


def _require(task: Any, *methods: str) -> None:
  """Raises ConfigError if a task of the user's own lacks a method."""
  missing = [name for name in methods if not hasattr(task, name)]
  if missing:
    raise errors.ConfigError(
        f"config.task.name: the task has no {', no '.join(missing)}, by which "
        "this tool shows examples; see metaformer_jax.tasks.base.Task")


def _chosen(data: Any, args: argparse.Namespace) -> list[int]:
  """The indices of the rows' examples.

  Raises:
    ConfigError: the split is not a `Loader`'s, or has no such example.
  """
  if not hasattr(data, "indices"):
    raise errors.ConfigError("config.task.name: the task's data is not read by "
                             "index, which this tool needs")
  indices = data.indices[args.first:args.first + args.rows]
  if not len(indices):
    raise errors.ConfigError(
        f"--first: {args.first}, but the split has {data.n_examples} examples, "
        "from 0")
  return indices.tolist()


def _with_truth(task: Any, cfg: Experiment, data: Any, index: int) -> Example:
  """The image of a record, and what the record says of it.

  Raises:
    DataError: it cannot be used.
  """
  from metaformer_jax.data import images, streams  # noqa: PLC0415

  def read(record, rng):
    del rng
    picture = images.decode(record["image"], cfg.data.max_pixels)
    return np.asarray(picture), task.truth(record)

  example, reason = streams.attempt(data.source, read, index, None)
  if reason:
    raise errors.DataError(reason)
  return example


def _keys(cfg: Experiment, task: Any, step: int) -> dict[str, Any]:
  """The keys of a training step, as the loop has them."""
  from metaformer_jax.training import rng  # noqa: PLC0415

  return rng.for_step(cfg.seed, step, task.rng_names)


def _examples(task: Any, batch: Sequence[Mapping[str, np.ndarray]],
              rngs: Mapping[str, Any] | None = None) -> list[Example]:
  """A batch as the task shows it; one by one if they differ in shape."""
  from metaformer_jax.data import streams  # noqa: PLC0415
  from metaformer_jax.tasks import base  # noqa: PLC0415

  together = len({base.signature(example) for example in batch}) == 1
  parts = [batch] if together else [[example] for example in batch]
  return [example for part in parts
          for example in task.training_examples(streams.stacked(part), rngs)]


def _panel(task: Any, example: Example, title: str,
           legend: bool = False) -> panels.Panel:
  """An example with what was found on it: drawn, or in words above it."""
  image, found = example
  if hasattr(task, "drawn"):
    return panels.Panel(
        task.drawn(found, image, _factor(image.shape), legend), title)
  words = ", ".join(
      f"{row['name']} {row['probability']:.2f}".removesuffix(" 1.00")
      for row in task.describe(found, 2) if row["probability"] >= _SHOWN)
  return panels.Panel(_enlarged(image), f"{title}\n{words}")


def _within(panel: panels.Panel, height: int) -> panels.Panel:
  """A panel whose picture is reduced to a height, if it is higher."""
  width = max(1, round(panel.picture.width * height / panel.picture.height))
  if panel.picture.height <= height:
    return panel
  return panel._replace(picture=panel.picture.resize(
      (width, height), Image.Resampling.LANCZOS))


def _enlarged(image: np.ndarray) -> Image.Image:
  factor = _factor(image.shape)
  return Image.fromarray(image.repeat(factor, 0).repeat(factor, 1))


def _factor(shape: Sequence[int]) -> int:
  return max(1, round(_LEGIBLE / max(shape[:2])))


def main(args: argparse.Namespace) -> None:
  """Draws what the command line asks for."""
  panels.check(args.output)
  cfg, _ = cli.parse(otherwise=lambda: _experiment(args),
                     train=not args.weights)
  command.start_logging()
  rows = (predicted if args.weights else augmented)(cfg, args)
  panels.save(panels.grid(rows), args.output)
  print(args.output)


def _experiment(args: argparse.Namespace) -> Experiment | None:
  """The experiment of a command line that names none."""
  if not args.weights:
    return None
  from metaformer_jax import inference  # noqa: PLC0415  Imports jax.

  weights, model = panels.models_of(args.weights, args.model)[0]
  try:
    cfg, _ = inference.experiment(weights, model, args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--weights: {e}") from e
  return dataclasses.replace(cfg, init=None)


def parse() -> argparse.Namespace:
  """The tool's own part of the command line; the rest is the experiment's."""
  parser = command.Parser(__doc__, "show_data", allow_abbrev=False)
  panels.add_weights(parser, required=False)
  parser.add_argument("--output", required=True, help="a .png file")
  parser.add_argument("--rows", type=command.positive, default=4,
                      help="images, 4 by default")
  parser.add_argument("--columns", type=command.positive, default=4,
                      help="draws of each, 4 by default")
  parser.add_argument("--first", type=int, default=0,
                      help="index of the first image, 0 by default")
  return command.own_arguments(parser)


def console() -> None:
  """The command metaformer-show-data."""
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
