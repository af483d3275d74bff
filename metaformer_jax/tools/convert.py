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
import logging
import pathlib
from typing import Any

import jax
import numpy as np

from metaformer_jax import cli, errors
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config import paths
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.convert import files, layouts
from metaformer_jax.models import registry

log = logging.getLogger("metaformer_jax.tools.convert")


def main(args: argparse.Namespace) -> None:
  """Converts the weights that the command line names."""
  if pathlib.Path(args.output).suffix != ".safetensors":
    raise errors.ConfigError(
        f"--output: {args.output} does not end with .safetensors")
  name, settings = _model(args)
  try:
    spec = registry.get_spec(name)
    layouts.check_layout(spec.family, args.layout)
    variables = pretrained.load_pretrained(
        name, args.input, in_chans=args.in_chans, head_21k=args.head_21k,
        **settings)
  except ValueError as e:
    raise errors.ConfigError(f"command line: {e}") from e
  family = spec.family
  tensors = layouts.to_torch(
      family, jax.tree.map(np.asarray, variables), args.layout)
  files.write_safetensors(args.output, tensors, {
      "format": "pt", "model": name, "layout": args.layout})
  log.info("%s: %d tensors of %s in the %s layout", args.output, len(tensors),
           name, args.layout)
  settings = {**vars(spec.settings), **settings}
  if args.layout == "timm" and settings.get("head_norm_first"):
    log.warning(
        "timm computes PoolFormer's head in another order than the paper's "
        "code, mean before norm: its outputs will differ")


def _model(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
  """The model's name, and keywords for `load_pretrained`."""
  settings = {"num_classes": args.num_classes, "input_size": args.input_size}
  run = _workdir(args.input)
  if run:
    try:
      cfg = config_lib.read_run(run)
    except errors.ConfigError as e:
      raise errors.ConfigError(f"--input: {e}") from e
    name = cfg.model.name
    if args.model not in (None, name):
      raise errors.ConfigError(
          f"--model: {args.model}, but {args.input} is a run of {name}")
    if args.num_classes is None:
      settings["num_classes"] = cfg.task.num_classes
    if args.input_size is None:
      settings["input_size"] = cfg.task.input_size
    return name, {**settings, **cfg.model.overrides()}
  if args.model is None:
    raise errors.ConfigError("--model: is missing; give e.g. "
                             "--model=poolformer_s12")
  return args.model, settings


def _workdir(path: str) -> pathlib.Path | None:
  """The workdir of the run that the folder is, or is a part of."""
  folder = paths.local("--input", path).absolute()
  if folder.is_dir():
    for part in (folder, *folder.parents[:2]):
      if (part / "config.json").is_file():
        return part
  return None


def parse() -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(__doc__, "convert")
  parser.add_argument("--model", help="a name of metaformer_jax.list_models()")
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
