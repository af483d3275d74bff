r"""Draws where a model sees a class in a picture:

    python -m metaformer_jax.tools.cam --model=poolformer_s12 \
        --weights=poolformer_s12.pth.tar --image=cat.jpg --output=cam.png

The map is Grad-CAM's (arXiv 1610.02391), by default of the last stage and of
the class that the model predicts; the official PoolFormer draws the same
(misc/cam_image.py). --weights may also be a run's workdir, which tells the
model itself. The class, its probability and the picture are told as JSON.
"""

import argparse
import functools
import json
import logging
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax import cli, errors, tasks
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Data, Experiment, Model
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.models import mlp_mixer, pvt, registry, vit
from metaformer_jax.models import spec as spec_lib
from metaformer_jax.tasks import classification

log = logging.getLogger("metaformer_jax.tools.cam")


def grad_cam(model: nn.Module, variables, images: jax.Array,
             classes: jax.Array | None = None,
             stage: str | None = None) -> jax.Array:
  """Where the features of a stage speak for a class: Grad-CAM, eq. 1 and 2.

  alpha_k = mean over the pixels of dy/dA_k;  map = relu(sum_k alpha_k A_k),
  of the logit y of the class and the channels A_k of the features.

  A class token reads no patch after the last attention, so that the features
  of the last stage have no gradient in ViT, DeiT and PVT. There A is what this
  attention reads, the patches after the last block's first norm.

  Args:
    model: of `create_model`, with a head.
    variables: as for `model.apply`.
    images: normalised images [B, H, W, 3].
    classes: int [B], each below `model.num_classes`, as nothing speaks for
      another; None for those with the largest logits.
    stage: a name in the model's features, by default the last.

  Returns:
    Maps [B, h, w] of the stage's size, float32, not scaled: 0 where nothing
    speaks for the class.

  Raises:
    ValueError: the model has no head or no such stage.
  """
  if not model.num_classes:
    raise ValueError("a model without a head has no class to draw a map of")
  shapes = jax.eval_shape(functools.partial(model.apply, method="features"),
                          variables, images)
  stage = stage or max(shapes)
  if stage not in shapes:
    raise ValueError(f"there is no {stage!r} among the model's features"
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
  """Of the module whose output `grad_cam` takes for a stage's features."""
  if isinstance(model, vit.VisionTransformer):
    return f"block{model.depth}", "norm1"
  if isinstance(model, pvt.PyramidVisionTransformer) and last:
    return stage, f"block{model.depths[-1]}", "norm1"
  if isinstance(model, mlp_mixer.PatchMlp):
    return (f"block{model.depth}",)
  return (stage,)


def overlay(image: np.ndarray, cam: np.ndarray, *, alpha: float = 0.5,
            colormap: str = "turbo") -> np.ndarray:
  """Blends a map, scaled to a maximum of 1, over an image.

  Args:
    image: uint8 [H, W, 3].
    cam: [h, w], resized bilinearly; all zeros are drawn as they are.
    alpha: of the map.
    colormap: a name that matplotlib knows.

  Returns:
    uint8 [H, W, 3].
  """
  cam = np.asarray(cam, np.float32)
  cam = cam / (cam.max() or 1)
  height, width = image.shape[:2]
  cam = np.asarray(Image.fromarray(cam).resize(
      (width, height), Image.Resampling.BILINEAR))
  colours = matplotlib.colormaps[colormap](cam)[..., :3] * 255
  return ((1 - alpha) * image + alpha * colours).round().astype(np.uint8)


def eval_data(spec: spec_lib.ModelSpec) -> Data:
  """How the images of a model of the table are prepared to evaluate it."""
  return Data(image_size=spec.input_size, crop_pct=spec.crop_pct,
              interpolation=spec.interpolation, mean=spec.mean, std=spec.std)


def read_image(path: str | pathlib.Path, data: Data) -> np.ndarray:
  """Decodes, resizes and crops a picture: uint8 [S, S, 3] of data.image_size.

  Raises:
    ConfigError: it cannot be read or decoded.
  """
  try:
    encoded = pathlib.Path(path).expanduser().read_bytes()
    record = {"image": encoded, "label": 0}
    return transforms.EvalTransform(data)(record)["image"]
  except Exception as e:  # Of many types, as Pillow's are.
    raise errors.ConfigError(f"{path} cannot be used as an image: {e}") from e


def _settings(name: str | None, weights: str) -> tuple[Model, Data]:
  """What the flags, or the run whose workdir `weights` is, tell of a model."""
  try:
    run = pathlib.Path(weights).expanduser() / "config.json"
    is_run = run.is_file()
  except (OSError, RuntimeError) as e:  # Too long; the home of nobody.
    raise errors.ConfigError(f"--weights: {weights}: {e}") from e
  if is_run:
    try:
      config = config_lib.read_json(run)
    except errors.ConfigError as e:
      reason = str(e).removeprefix("--config_json: ")
      raise errors.ConfigError(f"--weights: {reason}") from e
    if name not in (None, config.model.name):
      raise errors.ConfigError(
          f"--model: {name}, but {weights} is a run of {config.model.name}")
    return Model(**config.model), Data(**config.data)
  if name is None:
    raise errors.ConfigError("--model: is missing; give e.g. "
                             "--model=poolformer_s12")
  try:
    spec = registry.get_spec(name)
  except ValueError as e:
    raise errors.ConfigError(f"--model: {e}") from e
  return Model(name=name, num_classes=spec.num_classes), eval_data(spec)


def main(args: argparse.Namespace) -> None:
  """Draws what the command line names."""
  if pathlib.Path(args.output).suffix != ".png":
    raise errors.ConfigError(f"--output: {args.output} does not end with .png")
  settings, data = _settings(args.model, args.weights)
  n = settings.num_classes
  if args.label is not None and not 0 <= args.label < n:
    raise errors.ConfigError(
        f"--class: {args.label} is not one of the model's {n}, from 0")
  picture = read_image(args.image, data)
  try:
    published = registry.get_spec(settings.name).num_classes
    variables = pretrained.load_pretrained(
        # Told the number, it would begin a head that does not fit anew.
        settings.name, args.weights, num_classes=None if n == published else n,
        input_size=data.image_size, **settings.overrides())
    model = tasks.create(Experiment(model=settings, data=data)).model
    images = classification.normalize(picture[None], data.mean, data.std)
    logits = jax.jit(model.apply)(variables, images)
    classes = logits.argmax(-1) if args.label is None else jnp.array(
        [args.label])
    maps = jax.jit(functools.partial(grad_cam, model, stage=args.stage))(
        variables, images, classes)
  except ValueError as e:
    raise errors.ConfigError(f"command line: {e}") from e
  label = int(classes[0])
  if not maps.any():
    log.warning("nothing in %s speaks for class %d: the map is zero",
                args.image, label)
  try:
    Image.fromarray(overlay(picture, np.asarray(maps[0]))).save(args.output)
  except OSError as e:
    raise errors.ConfigError(f"--output: {args.output}: {e}") from e
  probability = float(jax.nn.softmax(logits[0].astype(jnp.float32))[label])
  print(json.dumps({"class": label, "probability": probability,
                    "output": args.output}), flush=True)


def parse() -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
      prog="python -m metaformer_jax.tools.cam", description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--model", help="a name of metaformer_jax.list_models()")
  parser.add_argument("--weights", required=True,
                      help="safetensors, .pth, or a run's workdir")
  parser.add_argument("--image", required=True, help="the picture, a file")
  parser.add_argument("--output", required=True, help="a .png file")
  parser.add_argument("--class", type=int, dest="label",
                      help="its number from 0; the predicted one by default")
  parser.add_argument("--stage", help="whose features, e.g. stage3; the last "
                      "by default")
  return parser.parse_args()


if __name__ == "__main__":
  cli.start_logging()
  with cli.one_line_errors():
    main(parse())
