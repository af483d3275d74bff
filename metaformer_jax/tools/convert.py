r"""Converts weights between PyTorch's layouts and ours:

    python -m metaformer_jax.tools.convert --model=poolformer_s12 \
        --input=poolformer_s12.pth.tar --output=poolformer_s12.safetensors \
        --layout=timm

The layout of an input file is recognised by its names. The input may also be a
folder that transformers or timm wrote, or a run's workdir, its checkpoints
folder or one step in it; then the model is that of the folder or the run.

The output is safetensors, which timm and the official code load with
strict=True; or, with --layout=huggingface or --layout=timm, a folder with
config.json, weights and a model card, which the library loads by its name:

    python -m metaformer_jax.tools.convert --input=runs/s24 \
        --layout=huggingface --output=poolformer_s24

Checkpoints of mmsegmentation and mmdetection are named with their decoder, and
have the layouts mmseg and mmdet:

    python -m metaformer_jax.tools.convert --input=fpn_poolformer_s12.pth \
        --model=semantic_fpn/poolformer_s12 --layout=mmseg \
        --output=fpn_poolformer_s12.safetensors
"""

import argparse
import dataclasses
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from metaformer_jax import command, errors, imports, inference, tasks
from metaformer_jax.checkpoints import manager, pretrained
from metaformer_jax.config import paths, saved, schema, typed
from metaformer_jax.config import tasks as config_tasks
from metaformer_jax.config.hub import card, folders, timm
from metaformer_jax.convert import files, layouts
from metaformer_jax.models import registry
from metaformer_jax.tasks import base

log = logging.getLogger("metaformer_jax.tools.convert")

_FILE = ".safetensors"
_OTHER_FILES = (".bin", ".ckpt", ".pt", ".pth", ".safetensor", ".tar")


def main(args: argparse.Namespace) -> None:
  """Converts the weights that the command line names."""
  output = _output(args)
  try:
    made, path = inference.experiment(args.input, args.model,
                                      args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--input: {e}") from e
  name, written = made.model.name, _written(made, args)
  own, texts = imports.is_path(name), None
  task = _other_task(made, args)
  if task is not None:
    family = inference.family_of(task)
  else:
    family = None if own else registry.get_spec(name).family
  try:
    layouts.check_layout(family, args.layout)
    if output.suffix != _FILE:
      texts = _texts(made, written, path, args)
    elif args.layout != "flax":
      _check_expressible(made, args.layout)
    if task is not None:
      variables = inference.read(task, path)
    else:
      variables = pretrained.load_pretrained(
          name, path, num_classes=args.num_classes, in_chans=args.in_chans,
          input_size=written.task.input_size, head_21k=args.head_21k,
          allow_import=args.allow_import, **made.model.overrides())
  except ValueError as e:
    raise errors.ConfigError(f"command line: {e}") from e
  tensors = layouts.to_torch(
      family, jax.tree.map(np.asarray, variables), args.layout)
  metadata = {"format": "pt", "model": name, "layout": args.layout}
  if written.task.num_classes != 0:  # An experiment has classes.
    metadata[saved.METADATA] = _description(written)
  if texts is None:
    files.write_safetensors(output, tensors, metadata)
  else:
    files.write_folder(output, folders.WEIGHTS, tensors, metadata, texts)
  log.info("%s: %d tensors of %s in the %s layout", output, len(tensors),
           name, args.layout)
  note = None if own else card.note(made, args.layout)
  if note:
    log.warning("%s", note)


def _other_task(made: schema.Experiment,
                args: argparse.Namespace) -> base.Task | None:
  """The task of weights that are not a classifier's.

  Raises:
    ConfigError: the command line has what only classifiers can be changed by.
  """
  if isinstance(made.task, config_tasks.Classification):
    return None
  for key, default in (("num_classes", None), ("in_chans", 3),
                       ("input_size", None), ("head_21k", False)):
    if getattr(args, key) != default:
      raise errors.ConfigError(f"--{key}: is for classifiers, but {args.input} "
                               f"is of the task {made.task.name}")
  return tasks.create(made, files=False)[1]


def _output(args: argparse.Namespace) -> pathlib.Path:
  """Where to write: a file, or a folder in the layouts that have one.

  Raises:
    ConfigError: it is neither, or the folder exists.
  """
  output = paths.local("--output", args.output)
  if output.suffix == _FILE:
    return output
  if args.layout not in folders.LAYOUTS or output.suffix in _OTHER_FILES:
    raise errors.ConfigError(
        f"--output: {args.output} does not end with {_FILE}; folders are "
        f"written with --layout={' or '.join(folders.LAYOUTS)}")
  try:
    files.check_new(output)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--output: {e}") from e
  return output


def _texts(made: schema.Experiment, written: schema.Experiment,
           path: pathlib.Path, args: argparse.Namespace) -> dict[str, str]:
  """The files of a folder beside the weights.

  They have the measures of a run, unless the arguments change its model.
  """
  is_run = saved.find_workdir(path) and written == made and args.in_chans == 3
  measures = manager.read_metrics(path) if is_run else {}
  try:
    return folders.describe(written, args.layout, args.in_chans, measures)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--layout: {e}") from e


def _written(made: schema.Experiment,
             args: argparse.Namespace) -> schema.Experiment:
  """The experiment of the output: that of the input, with the arguments."""
  task, n = made.task, args.num_classes
  if args.head_21k and n is None:
    n = 1000
  if n not in (None, task.num_classes):
    task = dataclasses.replace(task, num_classes=n, class_names=None)
  if args.input_size:
    task = dataclasses.replace(task, image_size=args.input_size)
  return dataclasses.replace(made, task=task)


def _check_expressible(made: schema.Experiment, layout: str) -> None:
  """Checks that the names and shapes of the weights determine the model.

  Raises:
    ConfigError: a hyper-parameter differs from the published model's, but the
      names and shapes of the weights would be the same with the published one.
  """
  name, overrides = made.model.name, made.model.overrides()
  published = registry.get_spec(name)
  settings = published.override(**overrides)
  image = jax.ShapeDtypeStruct((1, *made.task.input_size, 3), np.float32)

  def shapes(**changed):
    model = registry.create_model(name, **overrides | changed)
    return jax.tree.map(lambda x: x.shape, jax.eval_shape(
        model.init, jax.random.key(0), image))

  own = shapes()
  differences = [key for key in settings.differences(published.settings)
                 if (layout, published.family, key) != (
                     "timm", *timm.APPROXIMATE)]
  hidden = [
      f"{key}: {getattr(published.settings, key)}, {getattr(settings, key)}"
      for key in differences
      if any(shapes(**{key: value}) == own for value in _instead(
          key, getattr(settings, key), getattr(published.settings, key)))]
  if hidden:
    raise errors.ConfigError(
        f"--layout: {layout} cannot express how this model differs from "
        f"{name}, and its code would compute something else without an error "
        f"({'; '.join(hidden)}: published, this one); --layout=flax can")


def _instead(key: str, value: Any, published: Any) -> list[Any]:
  """What the original code may use instead; of mixers, one at a time."""
  if key != "token_mixers":
    return [published]
  published = (*published, *["identity"] * len(value))
  return [(*value[:i], published[i], *value[i + 1:])
          for i in range(len(value)) if value[i] != published[i]]


def _description(cfg: schema.Experiment) -> str:
  """What a file records of its model, as JSON: for `inference.load`."""
  tree = typed.as_dict(cfg)
  data = {key: tree["data"][key] for key in ("mean", "std")}
  return json.dumps({"task": tree["task"], "model": tree["model"],
                     "data": data})


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "convert")
  parser.add_argument("--model", help="a name of metaformer_jax.list_models(), "
                      "for an input that does not record it; with a decoder, "
                      "semantic_fpn/NAME, upernet/NAME, retinanet/NAME, "
                      "faster_rcnn/NAME or mask_rcnn/NAME")
  parser.add_argument("--allow_import", default="", help="modules of your own "
                      "that the input may name, separated by commas")
  parser.add_argument("--input", required=True,
                      help="safetensors, .pth, a folder of transformers or "
                      "timm, or a run's")
  parser.add_argument("--output", required=True, help="a .safetensors file, or "
                      "a new folder")
  parser.add_argument(
      "--layout", default="official", help="of the output: official, timm, "
      "huggingface, mmseg, mmdet, or flax for our own names; not every model "
      "has each")
  parser.add_argument(
      "--num_classes", type=int, help="if the input has another number, the "
      "last layer is re-initialised")
  parser.add_argument(
      "--head_21k", action="store_true", help="reduce a head of ImageNet-21K's "
      "21,841 classes to those of ImageNet-1K")
  parser.add_argument("--in_chans", type=int, default=3,
                      help="channels of the images")
  parser.add_argument("--input_size", type=int, help="side of the images, to "
                      "which position embeddings are resized")
  return parser.parse_args(argv)


def console() -> None:
  """The command metaformer-convert."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
