r"""Converts weights between PyTorch's layouts and ours:

    python -m metaformer_jax.tools.convert --model=poolformer_s12 \
        --input=poolformer_s12.pth.tar --output=poolformer_s12.safetensors \
        --layout=timm

The layout of an input file is recognised by its names. The input may also be a
run's workdir, its checkpoints folder or one step in it; then the model is that
of the run. The output is safetensors, which timm and the official code load
with strict=True.
"""

import argparse
import dataclasses
import json
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from metaformer_jax import cli, errors, imports, inference
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config import saved, schema, typed
from metaformer_jax.convert import files, layouts
from metaformer_jax.models import registry

log = logging.getLogger("metaformer_jax.tools.convert")


def main(args: argparse.Namespace) -> None:
  """Converts the weights that the command line names."""
  if pathlib.Path(args.output).suffix != ".safetensors":
    raise errors.ConfigError(
        f"--output: {args.output} does not end with .safetensors")
  try:
    made, path = inference.experiment(args.input, args.model,
                                      args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--input: {e}") from e
  name, overrides = made.model.name, made.model.overrides()
  own = imports.is_path(name)
  spec = None if own else registry.get_spec(name)
  family = None if own else spec.family
  try:
    layouts.check_layout(family, args.layout)
    if args.layout != "flax":
      _check_expressible(made, args.layout)
    variables = pretrained.load_pretrained(
        name, path, num_classes=args.num_classes, in_chans=args.in_chans,
        input_size=args.input_size or made.task.input_size,
        head_21k=args.head_21k, allow_import=args.allow_import,
        **overrides)
  except ValueError as e:
    raise errors.ConfigError(f"command line: {e}") from e
  tensors = layouts.to_torch(
      family, jax.tree.map(np.asarray, variables), args.layout)
  files.write_safetensors(args.output, tensors, {
      "format": "pt", "model": name, "layout": args.layout,
      saved.METADATA: _description(made, args)})
  log.info("%s: %d tensors of %s in the %s layout", args.output, len(tensors),
           name, args.layout)
  if args.layout == "timm" and getattr(spec.settings, "head_norm_first", False):
    log.warning(
        "timm computes PoolFormer's head in another order than the paper's "
        "code, mean before norm: its outputs will differ")


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
  hidden = [
      f"{key}: {getattr(published.settings, key)}, {getattr(settings, key)}"
      for key in settings.differences(published.settings)
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


def _description(made: schema.Experiment, args: argparse.Namespace) -> str:
  """What a file records of its model, as JSON: for `inference.load`."""
  task = made.task
  if args.num_classes or args.head_21k:
    n = args.num_classes or 1000
    task = dataclasses.replace(task, num_classes=n, class_names=(
        task.class_names if n == task.num_classes else None))
  if args.input_size:
    task = dataclasses.replace(task, image_size=args.input_size)
  tree = typed.as_dict(dataclasses.replace(made, task=task))
  data = {key: tree["data"][key] for key in ("mean", "std")}
  return json.dumps({"task": tree["task"], "model": tree["model"],
                     "data": data})


def parse() -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(__doc__, "convert")
  parser.add_argument("--model", help="a name of metaformer_jax.list_models(), "
                      "for an input that does not record it")
  parser.add_argument("--allow_import", default="", help="modules of your own "
                      "that the input may name, separated by commas")
  parser.add_argument("--input", required=True,
                      help="safetensors, .pth, or a run's folder")
  parser.add_argument("--output", required=True, help="a .safetensors file")
  parser.add_argument(
      "--layout", default="official", help="of the output: official, timm, "
      "huggingface, or flax for our own names; not every model has each")
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
  return parser.parse_args()


if __name__ == "__main__":
  cli.start_logging()
  with cli.one_line_errors():
    main(parse())
