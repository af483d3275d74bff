r"""Draws which parts of an image support a class:

    python -m metaformer_jax.tools.cam --weights=poolformer_s12.pth.tar \
        --image=cat.jpg --output=cam.png
    python -m metaformer_jax.tools.cam --weights=runs/one --weights=runs/two \
        --method=gradcam++ --layer=stage3 --image=cat.jpg --output=cam.png

The map is Grad-CAM's (arXiv 1610.02391) or that of another --method, by default
of the last stage and of the class that the model predicts, as in the official
PoolFormer (misc/cam_image.py). It is scaled as by pytorch-grad-cam, and drawn
over the picture at its own size, where the model has seen it: what the crop of
the evaluation leaves out keeps its colours.

Several --weights are drawn side by side, after the picture itself, each with
the preprocessing of its own model. --weights may also be a run's workdir; then
the model is that of the run, and --class may be one of its classes' names. For
each of them a line of JSON has the class and its probability, and the output's
path.
"""

import argparse
import functools
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image

from metaformer_jax import command, errors, inference
from metaformer_jax.config import tasks
from metaformer_jax.data import images
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import activation_maps
from metaformer_jax.ops import images as image_ops
from metaformer_jax.tools import panels

log = logging.getLogger("metaformer_jax.tools.cam")


def overlay(image: np.ndarray, cam: np.ndarray, *,
            box: Sequence[float] | None = None, alpha: float = 0.5,
            colormap: str = "turbo") -> np.ndarray:
  """Blends a map over an image.

  Args:
    image: uint8 [H, W, 3].
    cam: [h, w], from 0 to 1, as of `activation_maps.scaled`; resized
      bilinearly.
    box: (left, top, right, bottom) of the map in pixels of the image, by
      default the whole; it may be larger. Elsewhere the image is unchanged.
    alpha: opacity of the map.
    colormap: name of one of matplotlib's.

  Returns:
    uint8 [H, W, 3].
  """
  cam = np.asarray(cam, np.float32)
  height, width = image.shape[:2]
  left, top, right, bottom = box or (0, 0, width, height)
  # The pixels in the box, and the part of the map that lies over them.
  (x0, x1), (y0, y1) = _inside(left, right, width), _inside(top, bottom, height)
  h, w = cam.shape
  xs = np.clip((np.array([x0, x1]) - left) * w / (right - left), 0, w)
  ys = np.clip((np.array([y0, y1]) - top) * h / (bottom - top), 0, h)
  cam = np.asarray(Image.fromarray(cam).resize(
      (x1 - x0, y1 - y0), Image.Resampling.BILINEAR,
      (xs[0], ys[0], xs[1], ys[1])))
  colours = matplotlib.colormaps[colormap](cam)[..., :3] * 255
  drawn = image.copy()
  part = drawn[y0:y1, x0:x1]
  part[...] = ((1 - alpha) * part + alpha * colours).round()
  return drawn


def _inside(start: float, end: float, size: int) -> tuple[int, int]:
  """The pixels of an image between two places, at least one of them."""
  first = min(max(0, round(start)), size - 1)
  return first, max(first + 1, min(size, round(end)))


class Explained(NamedTuple):
  """What one model says of an image.

  Attributes:
    row: of the output: weights, class, name if it is known, probability.
    picture: the image.
    drawn: the map over it.
  """

  row: dict[str, Any]
  picture: Image.Image
  drawn: Image.Image


def main(args: argparse.Namespace) -> None:
  """Draws the maps that the command line names."""
  panels.check(args.output)
  found = [_explain(weights, model, args)
           for weights, model in panels.models_of(args.weights, args.model)]
  picture = found[0].drawn
  if len(found) > 1:
    picture = panels.grid([[
        panels.Panel(found[0].picture, "the image"),
        *(panels.Panel(one.drawn, _caption(one.row)) for one in found)]])
  panels.save(picture, args.output)
  for one in found:
    print(json.dumps({**one.row, "output": args.output}), flush=True)


def _caption(row: dict[str, Any]) -> str:
  return (f"{panels.short(row['weights'])}\n{row.get('name', row['class'])} "
          f"{row['probability']:.2f}")


def _explain(weights: str, model: str | None,
             args: argparse.Namespace) -> Explained:
  """The map of one of --weights.

  Raises:
    ConfigError: the weights are not of a classifier, it has no such class or
      layer, or the image cannot be used.
  """
  try:
    loaded = inference.load(weights, model=model,
                            allow_import=args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--weights: {e}") from e
  cfg = loaded.cfg
  if not isinstance(cfg.task, tasks.Classification):
    raise errors.ConfigError(
        f"--weights: {weights} is of the task {cfg.task.name}; only "
        "classifiers have maps of classes")
  label = None if args.label is None else class_number(
      str(args.label), cfg.task.num_classes, loaded.class_names)
  try:
    found, cam = _compute(loaded, args, label)
  except ValueError as e:
    raise errors.ConfigError(f"--weights: {weights}: {e}") from e
  except errors.DataError as e:
    raise errors.ConfigError(f"--image: {e}") from e
  if not cam.any():
    log.warning("%s: nothing in %s supports class %d: the map is zero", weights,
                args.image, found["class"])
  picture = images.decode(
      pathlib.Path(args.image).expanduser().read_bytes(), cfg.data.max_pixels)
  box = transforms.EvalTransform(cfg.data, cfg.task).box(*picture.size)
  return Explained({"weights": weights, **found}, picture, Image.fromarray(
      overlay(np.asarray(picture), cam, box=box)))


def _compute(loaded: inference.Loaded, args: argparse.Namespace,
             label: int | None) -> tuple[dict[str, Any], np.ndarray]:
  """A class with its probability, by default the predicted one; and its map."""
  example = loaded.preprocess(args.image)
  batch = {name: value[None] for name, value in example.items()}
  outputs = jax.jit(loaded.task.predict)(loaded.variables, batch)
  found = loaded.task.postprocess(np.asarray(outputs[0]), example)
  if "classes" not in found:
    raise ValueError("the model is without a head: it has no classes")
  label = int(found["classes"][0]) if label is None else label
  inputs = image_ops.normalize(
      batch["image"], loaded.cfg.data.mean, loaded.cfg.data.std)
  maps = jax.jit(functools.partial(
      activation_maps.maps, loaded.model, layer=args.layer,
      method=args.method))(loaded.variables, inputs, jnp.array([label]))
  (scaled,) = np.asarray(activation_maps.scaled(maps, *inputs.shape[1:3]))
  (probability,) = found["probabilities"][found["classes"] == label]
  names = loaded.class_names
  return {"class": label, **({"name": names[label]} if names else {}),
          "probability": float(probability)}, scaled


def class_number(text: str, n: int, names: Sequence[str] | None) -> int:
  """The class that a user means: by its name, else by its number.

  Args:
    text: a name, also in other case if only one is the same; or a number.
    n: how many classes there are.
    names: theirs, if they are known.

  Raises:
    ConfigError: there is no such class, or more than one.
  """
  for same in (str, str.casefold):
    found = [i for i, name in enumerate(names or ())
             if same(name) == same(text)]
    if len(found) > 1:
      raise errors.ConfigError(
          f"--class: {text!r} is the name of the classes "
          f"{', '.join(map(str, found))}; give a number")
    if found:
      return found[0]
  try:
    number = int(text)
  except ValueError:
    hint = errors.did_you_mean(text, names) if names else (
        f"; the weights record no names, so give a number from 0 to {n - 1}")
    raise errors.ConfigError(f"--class: there is no {text!r}{hint}") from None
  if not 0 <= number < n:
    raise errors.ConfigError(
        f"--class: {number} is not one of the model's {n}, from 0")
  return number


def parse() -> argparse.Namespace:
  """The command line."""
  parser = command.Parser(__doc__, "cam")
  panels.add_weights(parser)
  parser.add_argument("--image", required=True, help="an image file")
  parser.add_argument("--output", required=True, help="a .png file")
  parser.add_argument("--class", dest="label", help="its name, or its number "
                      "from 0; by default the predicted one")
  parser.add_argument("--method", choices=list(activation_maps.METHODS),
                      default="gradcam", help="gradcam by default; eigencam is "
                      "the same for all classes")
  parser.add_argument("--layer", help="draw the features of this stage or "
                      "module, e.g. stage3 or stage3/block2/token_mixer; by "
                      "default the last stage")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-cam."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
