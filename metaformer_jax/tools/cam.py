r"""Draws which parts of an image support a class:

    python -m metaformer_jax.tools.cam --model=poolformer_s12 \
        --weights=poolformer_s12.pth.tar --image=cat.jpg --output=cam.png

The map is Grad-CAM's (arXiv 1610.02391), by default of the last stage and of
the class that the model predicts, as in the official PoolFormer (misc/
cam_image.py). It is drawn over the picture at its own size, where the model has
seen it: what the crop of the evaluation leaves out keeps its colours. --weights
may also be a run's workdir; then the model is that of the run, and --class may
be one of its classes' names. The class, its probability and the output's path
are printed as JSON.
"""

import argparse
import functools
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax import command, errors, inference
from metaformer_jax.config import tasks
from metaformer_jax.data import images
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import mlp_mixer, pvt, vit
from metaformer_jax.ops import images as image_ops

log = logging.getLogger("metaformer_jax.tools.cam")


def grad_cam(model: nn.Module, variables, images: jax.Array,
             classes: jax.Array | None = None,
             stage: str | None = None) -> jax.Array:
  """Where the features of a stage support a class: Grad-CAM, eq. 1 and 2.

  alpha_k = mean over the pixels of dy/dA_k;  map = relu(sum_k alpha_k A_k),
  for the logit y of the class and the channels A_k of the features.

  In ViT, DeiT and PVT the class token does not depend on the patches after the
  last attention, so that the features of the last stage have no gradient. There
  A is the input of this attention: the patches after the last block's first
  norm.

  Args:
    model: of `create_model`, with a head.
    variables: as for `model.apply`.
    images: normalised images [B, H, W, 3].
    classes: int [B], each below `model.num_classes`: the maps of others would
      be 0; None for those with the largest logits.
    stage: a name in the model's features, by default the last.

  Returns:
    Maps [B, h, w] of the stage's size, float32, not scaled: 0 where the
    features do not support the class.

  Raises:
    ValueError: the model has no head or no such stage.
  """
  if not model.num_classes:
    raise ValueError("the model is without a head: it has no classes")
  shapes = jax.eval_shape(functools.partial(model.apply, method="features"),
                          variables, images)
  stage = stage or max(shapes)
  if stage not in shapes:
    raise ValueError(f"the model has no stage {stage!r}"
                     f"{errors.did_you_mean(stage, shapes)}")
  b, h, w, dim = shapes[stage].shape
  path = _path(model, stage, last=stage == max(shapes))

  def logits_and_features(change):
    """Logits with [B, h w, dim] added to the features; and the features."""
    features = []

    def add(next_fn, args, kwargs, context):
      out = next_fn(*args, **kwargs)
      if context.module.path != path or context.method_name != "__call__":
        return out
      x, *rest = out if isinstance(out, tuple) else (out,)
      tokens = x.reshape(b, -1, dim)
      n_prefix = tokens.shape[1] - h * w  # Class tokens come first.
      features.append(tokens[:, n_prefix:])
      tokens = tokens.at[:, n_prefix:].add(change.astype(x.dtype))
      x = tokens.reshape(x.shape)
      return (x, *rest) if rest else x

    with nn.intercept_methods(add):
      logits = model.apply(variables, images)
    (found,) = features
    return logits.astype(jnp.float32), found.astype(jnp.float32)

  logits, gradient, features = jax.vjp(
      logits_and_features, jnp.zeros((b, h * w, dim)), has_aux=True)
  if classes is None:
    classes = logits.argmax(-1)
  (gradients,) = gradient(jax.nn.one_hot(classes, model.num_classes))
  alpha = gradients.mean(1)
  return nn.relu(jnp.einsum("bnk,bk->bn", features, alpha)).reshape(b, h, w)


def _path(model: nn.Module, stage: str, last: bool) -> tuple[str, ...]:
  """Path of the module whose output `grad_cam` takes as a stage's features."""
  if isinstance(model, vit.VisionTransformer):
    return f"block{model.depth}", "norm1"
  if isinstance(model, pvt.PyramidVisionTransformer) and last:
    return stage, f"block{model.depths[-1]}", "norm1"
  if isinstance(model, mlp_mixer.PatchMlp):
    return (f"block{model.depth}",)
  return (stage,)


def overlay(image: np.ndarray, cam: np.ndarray, *,
            box: Sequence[float] | None = None, alpha: float = 0.5,
            colormap: str = "turbo") -> np.ndarray:
  """Blends a map, scaled to a maximum of 1, over an image.

  Args:
    image: uint8 [H, W, 3].
    cam: [h, w], resized bilinearly; if it is all 0, it is not scaled.
    box: (left, top, right, bottom) of the map in pixels of the image, by
      default the whole; it may be larger. Elsewhere the image is unchanged.
    alpha: opacity of the map.
    colormap: name of one of matplotlib's.

  Returns:
    uint8 [H, W, 3].
  """
  cam = np.asarray(cam, np.float32)
  cam = cam / (cam.max() or 1)
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


def main(args: argparse.Namespace) -> None:
  """Draws the map that the command line names."""
  if pathlib.Path(args.output).suffix != ".png":
    raise errors.ConfigError(f"--output: {args.output} does not end with .png")
  try:
    loaded = inference.load(args.weights, model=args.model,
                            allow_import=args.allow_import)
  except errors.ConfigError as e:
    raise errors.ConfigError(f"--weights: {e}") from e
  cfg = loaded.cfg
  if not isinstance(cfg.task, tasks.Classification):
    raise errors.ConfigError(
        f"--weights: {args.weights} is of the task {cfg.task.name}; only "
        "classifiers have maps of classes")
  label = None if args.label is None else class_number(
      str(args.label), cfg.task.num_classes, loaded.class_names)
  try:
    found, cam = _explain(loaded, args.image, label, args.stage)
  except ValueError as e:
    raise errors.ConfigError(f"command line: {e}") from e
  except errors.DataError as e:
    raise errors.ConfigError(f"--image: {e}") from e
  if not cam.any():
    log.warning("nothing in %s supports class %d: the map is zero", args.image,
                found["class"])
  picture = images.decode(
      pathlib.Path(args.image).expanduser().read_bytes(), cfg.data.max_pixels)
  box = transforms.EvalTransform(cfg.data, cfg.task).box(*picture.size)
  try:
    Image.fromarray(overlay(np.asarray(picture), cam, box=box)).save(
        args.output)
  except OSError as e:
    raise errors.ConfigError(f"--output: {args.output}: {e}") from e
  print(json.dumps({**found, "output": args.output}), flush=True)


def _explain(loaded: inference.Loaded, image: str, label: int | None,
             stage: str | None) -> tuple[dict[str, Any], np.ndarray]:
  """A class with its probability, by default the predicted one; and its map."""
  example = loaded.preprocess(image)
  batch = {name: value[None] for name, value in example.items()}
  outputs = jax.jit(loaded.task.predict)(loaded.variables, batch)
  found = loaded.task.postprocess(np.asarray(outputs[0]), example)
  label = int(found["classes"][0]) if label is None else label
  inputs = image_ops.normalize(
      batch["image"], loaded.cfg.data.mean, loaded.cfg.data.std)
  maps = jax.jit(functools.partial(grad_cam, loaded.model, stage=stage))(
      loaded.variables, inputs, jnp.array([label]))
  (probability,) = found["probabilities"][found["classes"] == label]
  names = loaded.class_names
  return {"class": label, **({"name": names[label]} if names else {}),
          "probability": float(probability)}, np.asarray(maps[0])


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
  parser.add_argument("--model", help="a name of metaformer_jax.list_models(), "
                      "for weights that do not record it")
  parser.add_argument("--allow_import", default="", help="modules of your own "
                      "that the weights may name, separated by commas")
  parser.add_argument("--weights", required=True,
                      help="safetensors, .pth, or a run's workdir")
  parser.add_argument("--image", required=True, help="an image file")
  parser.add_argument("--output", required=True, help="a .png file")
  parser.add_argument("--class", dest="label", help="its name, or its number "
                      "from 0; by default the predicted one")
  parser.add_argument("--stage", help="draw the features of this stage, e.g. "
                      "stage3; by default the last")
  return parser.parse_args()


def console() -> None:
  """The command metaformer-cam."""
  command.start_logging()
  with command.one_line_errors():
    main(parse())


if __name__ == "__main__":
  console()
