"""Weights from elsewhere: files of PyTorch's world, or a run of ours."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metaformer_jax import errors
from metaformer_jax.checkpoints import manager as checkpoints
from metaformer_jax.convert import adapt, files, layouts
from metaformer_jax.models import registry
from metaformer_jax.training.state import TrainState

log = logging.getLogger(__name__)


def load_pretrained(name: str, path: str | pathlib.Path, *,
                    num_classes: int | None = None, in_chans: int = 3,
                    input_size: int | tuple[int, int] | None = None,
                    head_21k: bool = False, rng: jax.Array | None = None,
                    **overrides: Any) -> dict[str, Any]:
  """Returns the variables of a model from a file or folder of weights.

  Args:
    name: one of `metaformer_jax.list_models()`.
    path: a .safetensors or .pth file in the official layout, timm's or Hugging
      Face transformers', which its names tell; a safetensors file that
      `tools.convert` wrote with our own names; or a run's workdir, its
      checkpoints folder or one step in it, of which the moving average is
      taken if there is one.
    num_classes: of the model. Where the file has another number, the last layer
      begins anew; 0 leaves out the head, which the file need not have. By
      default as published, and then the file must have as many.
    in_chans: channels of the images. Others than the file's 3 sum or repeat the
      stem's, as timm does.
    input_size: side, or height and width, of the images, by default the
      model's: position embeddings are resized to it. Models with a matrix over
      all pixels work at the file's size only.
    head_21k: of a head of ImageNet-21K's 21,841 classes, take those of
      ImageNet-1K, as the official tool does; the model must have 1000.
    rng: key for a last layer that begins anew.
    **overrides: hyper-parameters, as for `create_model`.

  Returns:
    {"params": ..., and, if the model has them, "batch_stats" or "frozen"}.

  Raises:
    ValueError: unknown name or hyper-parameter, or a number that cannot be.
    WeightsError: one line with everything in the file that does not fit.
  """
  spec = registry.get_spec(name)
  size = spec.input_size if input_size is None else input_size
  height, width = (size, size) if isinstance(size, int) else size
  if min(height, width, in_chans) < 1 or (num_classes or 0) < 0:
    raise ValueError(
        "num_classes, in_chans and input_size count what cannot be fewer than "
        f"none, got {num_classes}, {in_chans} and {input_size}")
  if head_21k and (num_classes or spec.num_classes) != 1000:
    raise ValueError("head_21k gives 1000 classes: set num_classes=1000 and a "
                     "model without _in21k in its name")
  image = jnp.zeros((1, height, width, in_chans))

  def make(n):
    return registry.create_model(name, num_classes=n, **overrides)

  # Without a head, those of the file are known by a model that has one.
  whole = make(num_classes or None)
  target = jax.eval_shape(whole.init, jax.random.key(0), image)
  kept = target if num_classes != 0 else jax.eval_shape(
      make(0).init, jax.random.key(0), image)
  variables = read(path, spec.family, target, (height, width), kept=kept,
                   new_head=num_classes is not None and not head_21k,
                   head_21k=head_21k)
  missing = layouts.flatten(kept).keys() - layouts.flatten(variables)
  if missing:
    @jax.jit  # Of the model, only what is missing is computed.
    def fresh(rng):
      found = layouts.flatten(whole.init(rng, image))
      return {name: found[name] for name in missing}

    variables = layouts.unflatten(layouts.flatten(variables) | fresh(
        jax.random.key(0) if rng is None else rng))
  return jax.tree.map(jnp.asarray, variables)


def read(path: str | pathlib.Path, family: str, target: Mapping[str, Any],
         image_size: tuple[int, int], *, kept: Mapping[str, Any] | None = None,
         new_head: bool = False, head_21k: bool = False) -> dict[str, Any]:
  """Reads weights into the shapes of `target`, as variables of numpy arrays.

  Args:
    path: as for `load_pretrained`.
    family: `ModelSpec.family`.
    target: variables of the whole model, or their shapes.
    image_size: (height, width) of the model's images.
    kept: the part of `target` to return; all by default. The rest may be
      absent in the file.
    new_head, head_21k: see `adapt.to_shape`. A head that is to begin anew is
      absent.

  Raises:
    WeightsError: one line that begins with the path.
  """
  try:
    path = pathlib.Path(path).expanduser()
    is_folder = path.is_dir()
  except (OSError, RuntimeError) as e:  # Too long; the home of nobody.
    raise errors.WeightsError(f"{path}: cannot be read: {e}") from e
  if is_folder:
    tensors = layouts.flatten(checkpoints.read_variables(path))
  else:
    tensors = files.read_tensors(path)
  advice = {}  # In order, each once.

  def to_shape(name, value, shape):
    value = adapt.to_shape(name, value, shape, image_size=image_size,
                           new_head=new_head, head_21k=head_21k)
    if value is not None and value.shape != shape:
      advice[adapt.advice(name, value, shape)] = None
    return value

  unwanted = () if kept is None else (
      layouts.flatten(target).keys() - layouts.flatten(kept))
  try:
    return layouts.to_flax(family, tensors, target, to_shape,
                           unwanted=unwanted)
  except errors.WeightsError as e:
    raise errors.WeightsError(
        "; ".join([f"{path}: {e}", *filter(None, advice)])) from e


def warm_start(state: TrainState, weights: Mapping[str, Any]) -> TrainState:
  """Returns a fresh state that begins with the variables of `read`.

  What they lack, a head of another number of classes, stays as it is.
  """
  found = layouts.flatten(weights)
  flat = layouts.flatten({"params": state.params, **state.model_state})

  def place(name, fresh):
    if name not in found:
      return fresh
    value = np.asarray(found[name])
    return jax.make_array_from_callback(
        fresh.shape, fresh.sharding, lambda index: value[index])

  started = layouts.unflatten({k: place(k, v) for k, v in flat.items()})
  if flat.keys() - found:
    log.info("begins anew: %s", ", ".join(sorted(flat.keys() - found)))
  params = started.pop("params")
  return state.replace(params=params, model_state=started).start_average()
