"""Weights from files in PyTorch's layouts, or from a run."""

import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metaformer_jax import errors, imports
from metaformer_jax.checkpoints import published
from metaformer_jax.config import saved, weights
from metaformer_jax.config.hub import folders
from metaformer_jax.config.model import Model
from metaformer_jax.convert import adapt, files, layouts
from metaformer_jax.models import registry

log = logging.getLogger(__name__)


def load_pretrained(name: str, path: str | pathlib.Path | None = None, *,
                    num_classes: int | None = None, in_chans: int = 3,
                    input_size: int | tuple[int, int] | None = None,
                    head_21k: bool = False, rng: jax.Array | None = None,
                    allow_import: str | Sequence[str] = (),
                    **overrides: Any) -> dict[str, Any]:
  """Returns the variables of a model from its published or other weights.

  If the weights record how they were made, as a run's do, its hyper-parameters,
  number of classes and image size are the defaults; others that change what the
  weights compute are an error.

  Args:
    name: one of `metaformer_jax.list_models()`, or the import path of a user's
      own.
    path: a .safetensors or .pth file in the official layout, timm's or Hugging
      Face transformers', recognised by its names; a safetensors file that
      `tools.convert` wrote with the names used here; a folder that transformers
      or timm wrote; a run's workdir, its checkpoints folder or one step in it
      (the moving average, if there is one); or the name of a model for its
      published weights, downloaded if necessary. By default the published
      weights of this model.
    num_classes: of the model. If the file has another number, the last layer is
      re-initialised, and the whole head if it has none; 0 omits the head, which
      the file may omit as well. By default the run's, the folder's or the
      published number, which the file must have.
    in_chans: channels of the images. If not 3, those of the stem are summed or
      repeated as in timm.
    input_size: side, or height and width, of the images, by default the
      model's: position embeddings are resized to it. Models with a matrix over
      all pixels only work at the file's size.
    head_21k: from a head of ImageNet-21K's 21,841 classes, take those of
      ImageNet-1K, as the official tool does; the model must have 1000.
    rng: key for a re-initialised last layer.
    allow_import: names of modules that the weights may name in import paths.
    **overrides: hyper-parameters, as for `create_model`.

  Returns:
    {"params": ..., and, if the model has them, "batch_stats" or "frozen"}.

  Raises:
    ValueError: unknown name or hyper-parameter, or an invalid number.
    WeightsError: one line that lists everything in the file that does not fit,
      or says why it cannot be downloaded.
  """
  own = imports.is_path(name)
  spec = None if own else registry.get_spec(name)
  n_made: int | None = None
  size: int | tuple[int, int] | None = None
  if spec is not None:
    spec.override(**overrides)  # Raises if a name is unknown.
    n_made, size = spec.num_classes, spec.input_size
  path = published.fetch(name) if path is None else published.locate(path)
  with published.advising(path):
    made = saved.read_weights(path, allow_import, name)
  if made is not None:
    if num_classes is None and made.task.num_classes == 0:
      num_classes = 0
    n_made = made.task.num_classes or n_made
    size = made.task.input_size or size
    overrides = _with_defaults(made.model, name, overrides, path)
  size = size if input_size is None else input_size
  if size is None or (own and (num_classes or n_made) is None):
    raise ValueError(f"{path} does not record for which images and classes "
                     f"{name} was made: give input_size and num_classes")
  height, width = (size, size) if isinstance(size, int) else size
  if min(height, width, in_chans) < 1 or (num_classes or 0) < 0:
    raise ValueError(
        "num_classes must be at least 0, in_chans and input_size at least 1, "
        f"got {num_classes}, {in_chans} and {input_size}")
  if head_21k and (num_classes or n_made) != 1000:
    raise ValueError("head_21k gives 1000 classes: set num_classes=1000 and a "
                     "model without _in21k in its name")
  image = jnp.zeros((1, height, width, in_chans))

  def make(n: int | None) -> nn.Module:
    return registry.create_model(name, num_classes=n, **overrides)

  # To omit a head that the file has, its shape must be known.
  whole = make(num_classes or n_made)
  target = jax.eval_shape(whole.init, jax.random.key(0), image)
  kept = target if num_classes != 0 else jax.eval_shape(
      make(0).init, jax.random.key(0), image)
  family = None if spec is None else spec.family
  variables = read(path, family, target, (height, width),
                   kept=kept, new_head=num_classes is not None and not head_21k,
                   head_21k=head_21k)
  missing = layouts.flatten(kept).keys() - layouts.flatten(variables)
  if missing:
    @jax.jit  # Only what is missing is computed.
    def fresh(rng: jax.Array) -> dict[str, jax.Array]:
      found = layouts.flatten(whole.init(rng, image))
      return {name: found[name] for name in missing}

    variables = layouts.unflatten(layouts.flatten(variables) | fresh(
        jax.random.key(0) if rng is None else rng))
  return jax.tree.map(jnp.asarray, variables)


def _with_defaults(made: Model, name: str, overrides: Mapping[str, Any],
                   path: str | pathlib.Path) -> dict[str, Any]:
  """The hyper-parameters with which weights were made, then the overrides.

  Raises:
    WeightsError: the named model would compute something else with them.
  """
  same = name == made.name
  merged = {**(made.overrides() if same else {}), **overrides}
  known = {k: v for k, v in merged.items() if k in vars(made)}
  wanted = Model(name=name, **known)
  different = saved.model_differences(made, wanted)
  if different:
    raise errors.WeightsError(
        f"{path}: was made with other hyper-parameters than asked for: "
        f"{'; '.join(different)}")
  return merged


def read(path: str | pathlib.Path, family: str | None,
         target: Mapping[str, Any], image_size: tuple[int, int] | None, *,
         kept: Mapping[str, Any] | None = None,
         **head: bool) -> dict[str, Any]:
  """Reads weights into the shapes of `target`, as variables of numpy arrays.

  Args:
    path: as for `load_pretrained`.
    family: `ModelSpec.family`; None for weights with our names only.
    target: variables of the whole model, or their shapes.
    image_size: (height, width) of the model's images, to which position
      embeddings are resized; None if there is nothing to resize.
    kept: the part of `target` to return; all by default. The rest may be
      absent from the file.
    **head: new_head, other_classes and head_21k of `adapt.to_shape`. A head to
      be re-initialised is absent from the result, and may be from the file.

  Raises:
    WeightsError: one line that begins with the path.
  """
  path = weights.located("", path, errors.WeightsError)
  tensors = _read_tensors(path)
  names = layouts.flatten(target)
  heads = {name for name in names if adapt.is_in_head(name)}
  advice: dict[str, None] = {}  # An ordered set.
  renewed: set[str] = set()

  def to_shape(name: str, value: np.ndarray,
               shape: tuple[int, ...]) -> np.ndarray | None:
    made = adapt.to_shape(name, value, shape, image_size=image_size, **head)
    if made is None:
      renewed.add(name)
    elif made.shape != shape:
      advice[adapt.advice(name, made, shape)] = None
    return made

  unwanted = set() if kept is None else names.keys() - layouts.flatten(kept)
  try:
    variables = layouts.to_flax(family, tensors, target, to_shape,
                                unwanted=unwanted, optional=heads)
  except errors.WeightsError as e:
    raise errors.WeightsError(
        "; ".join([f"{path}: {e}", *filter(None, advice)])) from e
  if unwanted:
    log.info("%s: not used: %s", path, ", ".join(sorted(unwanted)))
  absent = ", ".join(sorted(
      names.keys() - layouts.flatten(variables) - unwanted - renewed))
  if absent and not head.get("new_head"):
    raise errors.WeightsError(
        f"{path}: has no head ({absent}): num_classes sets the number of "
        "classes of a new one, 0 omits it")
  if absent:
    log.info("%s: has no %s", path, absent)
  return variables


def _read_tensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a file, of a run, or of a folder with files."""
  if not path.is_dir():
    with published.advising(path):
      return files.read_tensors(path)
  where = None if saved.find_workdir(path) else folders.weights(path)
  if where is None and folders.is_folder(path):
    raise errors.WeightsError(
        f"{path}: has a config.json, but no weights: {folders.WEIGHTS} or "
        "pytorch_model.bin, or an index of several")
  if where is None:
    # Orbax, which only weights of runs need, takes a second.
    from metaformer_jax.checkpoints import manager  # noqa: PLC0415

    return layouts.flatten(manager.read_variables(path))
  if isinstance(where, pathlib.Path):
    return files.read_tensors(where)
  return files.read_shards(where)


def merged(variables: Mapping[str, Any], other: Mapping[str, Any],
           ) -> dict[str, Any]:
  """The leaves of both; those of `other` where both have one."""
  return layouts.unflatten(layouts.flatten(variables) | layouts.flatten(other))


def warm_start(variables: Mapping[str, Any],
               weights: Mapping[str, Any]) -> dict[str, Any]:
  """Replaces variables by the weights of `read`, in the same placement.

  What the weights do not have, as a head with another number of classes, stays.
  """
  found, flat = layouts.flatten(weights), layouts.flatten(variables)

  def place(name: str, fresh: jax.Array) -> jax.Array:
    if name not in found:
      return fresh
    value = np.asarray(found[name])
    return jax.make_array_from_callback(
        fresh.shape, fresh.sharding, lambda index: value[index])

  kept = sorted(flat.keys() - found)
  if kept:
    log.info("not in the weights, keeps its initial values: %s",
             ", ".join(kept))
  return layouts.unflatten({k: place(k, v) for k, v in flat.items()})
