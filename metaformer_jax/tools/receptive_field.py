r"""Draws the effective receptive fields of models, side by side:

    python -m metaformer_jax.tools.receptive_field --weights=runs/pooling \
        --weights=runs/attention --output=field.png
    python -m metaformer_jax.tools.receptive_field --model=resnet50 \
        --model=poolformer_s12 --image_size=512 --output=field.png

The field is the mean absolute gradient of the central place of a layer with
respect to the pixels (arXiv 1701.04128), by default of the last stage, and for
images of noise; --image names pictures instead. The picture shows its logarithm
over four decades. The table has the least share of the pixels that have 50% and
95% of the whole.

Without --weights, the models have random weights, as at the start of training.
There, a PoolFormer's LayerScale of 1e-5 hides its blocks. Of a model for
segmentation or detection it is the field of its backbone.
"""

import argparse
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

from metaformer_jax import command, errors, inference, tasks
from metaformer_jax.config import schema
from metaformer_jax.data import images
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import receptive_field
from metaformer_jax.ops import images as image_ops
from metaformer_jax.runtime import devices
from metaformer_jax.tools import output, panels

_N_NOISE = 8

# Powers of ten that the picture shows.
_DECADES = 4


def main(args: argparse.Namespace) -> None:
  """Draws and measures the fields that the command line asks for."""
  panels.check(args.output)
  devices.configure(schema.Log().compilation_cache)
  subjects = (panels.models_of(args.weights, args.model) if args.weights
              else [(None, name) for name in args.model])
  if not subjects:
    raise errors.ConfigError(
        "command line: give --weights, or --model for random weights")
  rows, cells = [], []
  for weights, model in subjects:
    loaded = _load(weights, model, args)
    name = panels.short(weights) if weights else model
    try:
      field = _field(loaded, args)
    except ValueError as e:
      raise errors.ConfigError(f"{name}: {e}") from e
    half, most = (receptive_field.share(field, mass) for mass in (0.5, 0.95))
    rows.append({
        "weights": weights or "random", "model": loaded.cfg.model.name,
        "layer": args.layer or "last stage",
        "image": "x".join(map(str, field.shape)), "share_of_50": half,
        "share_of_95": most})
    cells.append(panels.Panel(
        draw(field), f"{name}\n50%: {half:.2%}  95%: {most:.1%}"))
  panels.save(panels.grid([cells]), args.output)
  output.write(rows, "json" if args.json else "table")


def _load(weights: str | None, model: str | None,
          args: argparse.Namespace) -> inference.Loaded:
  """A model with its weights, or with random ones if there are none."""
  try:
    if weights:
      return inference.load(weights, model=model,
                            allow_import=args.allow_import)
    cfg, task = tasks.create(inference.published(model), files=False)
  except errors.ConfigError as e:
    flag = "--weights" if weights else "--model"
    raise errors.ConfigError(f"{flag}: {e}") from e
  variables = jax.jit(task.model.init)(jax.random.key(args.seed),
                                       *task.init_inputs())
  return inference.Loaded(cfg, task, variables)


def _field(loaded: inference.Loaded, args: argparse.Namespace) -> np.ndarray:
  """The field of the backbone, float32 [H, W]; ValueError: see there."""
  task = loaded.task
  if task.pretrained is None:
    raise ValueError("the task names no backbone")
  model, variables = task.model, loaded.variables
  if path := task.pretrained.path:
    model = getattr(model, path)
    variables = {name: tree[path] for name, tree in variables.items()
                 if path in tree}
  *_, height, width, channels = task.train_batches(1)[0]["image"].shape
  if args.image_size:
    height = width = args.image_size
  if args.image:
    data = loaded.cfg.data
    x = image_ops.normalize(np.stack([
        _read(path, (height, width), data.max_pixels) for path in args.image]),
        data.mean, data.std)
  else:
    x = jax.random.normal(jax.random.key(args.seed),
                          (_N_NOISE, height, width, channels))
  with errors.fitting_memory(
      f"--image_size: {height} x {width} pixels do not fit in memory; reduce "
      "it"):
    return np.asarray(jax.jit(functools.partial(
        receptive_field.field, model, layer=args.layer))(
            variables, jnp.asarray(x)))


def _read(path: str, size: tuple[int, int], max_pixels: int) -> np.ndarray:
  """The centre of a picture, resized to (height, width): uint8 [H, W, 3]."""
  try:
    picture = images.decode(
        pathlib.Path(path).expanduser().read_bytes(), max_pixels)
    picture = transforms.resize_shorter(picture, size, "bicubic", max_pixels)
  except Exception as e:  # Of many types, as Pillow's are.
    raise errors.ConfigError(
        f"--image: {path} cannot be used as an image: {e}") from e
  return np.asarray(transforms.centre_crop(picture, size))


def draw(field: np.ndarray, colormap: str = "magma") -> Image.Image:
  """A field [H, W] as a picture: its logarithm, over four decades."""
  part = field / (field.max() or 1)
  shown = 1 + np.log10(np.maximum(part, 10.0**-_DECADES)) / _DECADES
  colours = matplotlib.colormaps[colormap](shown)[..., :3] * 255
  return Image.fromarray(colours.round().astype(np.uint8))


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "receptive_field")
  panels.add_weights(parser, required=False)
  parser.add_argument("--output", required=True, help="a .png file")
  parser.add_argument("--layer", help="of which stage or module, e.g. stage3 "
                      "or stage3/block2; by default the last stage")
  parser.add_argument("--image", action="append", default=[], help="a picture "
                      "instead of noise; several by several such arguments")
  parser.add_argument("--image_size", type=command.positive, help="side of the "
                      "images; by default those of the model's training")
  parser.add_argument("--seed", type=int, default=0,
                      help="of noise and random weights, 0 by default")
  parser.add_argument("--json", action="store_true",
                      help="print a JSON object on a line for each model")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-receptive-field."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
