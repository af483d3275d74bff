"""Models with their weights, ready to use: `metaformer_jax.load`."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax import errors, tasks
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.config import derived, paths, saved, schema
from metaformer_jax.config import tasks as sections
from metaformer_jax.config.hub import folders
from metaformer_jax.models import registry
from metaformer_jax.tasks import base

# Where published weights are looked for, by the name of the model.
WEIGHTS = "~/.cache/metaformer_jax/weights"
_SUFFIXES = (".safetensors", ".pth.tar", ".pth")

# A file, its bytes, a picture, or uint8 [H, W, 3].
Picture = str | pathlib.Path | bytes | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Loaded:
  """A model with its weights.

  Attributes:
    cfg: the experiment that made them, as far as they record it.
    task: what they were made for.
    variables: for `model.apply`.
  """

  cfg: schema.Experiment
  task: base.Task
  variables: Mapping[str, Any]

  @property
  def model(self) -> nn.Module:
    """The network, unbound: `model.apply(variables, images)`."""
    return self.task.model

  @property
  def class_names(self) -> Sequence[str] | None:
    """A name for each class; None if they are not known."""
    return getattr(self.cfg.task, "class_names", None)

  def preprocess(self, image: Picture) -> dict[str, np.ndarray]:
    """An image as an example for the task, as for its evaluation.

    Raises:
      DataError: the image cannot be read or decoded.
    """
    try:
      if isinstance(image, (str, pathlib.Path)):
        return self.task.preprocess(
            pathlib.Path(image).expanduser().read_bytes())
      if isinstance(image, Image.Image):
        known = image.mode in ("L", "RGB", "RGBA") or (
            image.mode.startswith("I;16"))
        image = np.asarray(image if known else image.convert("RGB"))
      return self.task.preprocess(image)
    except Exception as e:  # Of many types, as Pillow's are.
      shown = (image if isinstance(image, (str, pathlib.Path))
               else f"a {type(image).__name__}")
      raise errors.DataError(f"{shown} cannot be used as an image: {e}") from e

  def predict(self, images: Picture | Iterable[Picture],
              batch_size: int = 32) -> list[dict[str, Any]]:
    """What the task predicts for each image, in order.

    Args:
      images: one, or several.
      batch_size: images per call of the model, at most.

    Returns:
      The task's `postprocess` of each: for a classifier {"classes": int [C],
      the most probable first, "probabilities": float32 [C], "names": theirs, if
      they are known}.

    Raises:
      DataError: an image cannot be read or decoded.
    """
    if isinstance(images, (str, bytes, pathlib.Path, Image.Image)) or (
        getattr(images, "ndim", 4) < 4):
      images = [images]
    if isinstance(images, Sized):  # No more than there are.
      batch_size = max(1, min(batch_size, len(images)))
    return list(self._predict(iter(images), batch_size))

  def _predict(self, images: Iterator[Picture],
               batch_size: int) -> Iterator[dict[str, Any]]:
    while some := list(itertools.islice(images, batch_size)):
      examples = [self.preprocess(image) for image in some]
      # The last batch is filled up, to have the shape of the others.
      filled = [*examples, *[examples[-1]] * (batch_size - len(examples))]
      batch = {name: np.stack([example[name] for example in filled])
               for name in examples[0]}
      outputs = jax.device_get(self._compiled(self.variables, batch))
      for i, example in enumerate(examples):
        yield self.task.postprocess(
            jax.tree.map(lambda x, i=i: x[i], outputs), example)

  @functools.cached_property
  def _compiled(self):
    return jax.jit(self.task.predict)


def experiment(weights: str | pathlib.Path, model: str | None = None,
               allow_import: str | Sequence[str] = (),
               ) -> tuple[schema.Experiment, pathlib.Path]:
  """The experiment that made weights, and where they are.

  Args:
    weights: as for `load`.
    model: as for `load`.
    allow_import: as for `load`.

  Raises:
    ConfigError: as `load`.
  """
  path = paths.local("", weights)
  if not path.exists() and model is None and "/" not in str(weights) and (
      not path.suffix):
    path, model = _published_weights(str(weights)), str(weights)
  cfg = saved.read_weights(path, allow_import, model)
  if cfg is not None:
    if model not in (None, cfg.model.name):
      raise errors.ConfigError(f"{weights} is of {cfg.model.name}, not {model}")
    return cfg, path
  if not path.exists():
    raise errors.ConfigError(f"{weights}: does not exist")
  if model is None:
    raise errors.ConfigError(
        f"{weights}: does not record its model; name it, as in model="
        "'poolformer_s12' (--model=poolformer_s12)"
        + ("; or give its folder, which has a config.json"
           if folders.is_folder(path.parent) else ""))
  return published(model), path


def published(model: str) -> schema.Experiment:
  """The classifier of a row of the model table, with its preprocessing.

  Raises:
    ConfigError: there is no such model.
  """
  try:
    n = registry.get_spec(model).num_classes
  except ValueError as e:
    raise errors.ConfigError(str(e)) from e
  return derived.fill(schema.Experiment(
      task=sections.Classification(num_classes=n),
      model=schema.Model(name=model)))


def _published_weights(name: str) -> pathlib.Path:
  """The file of a model's published weights."""
  try:
    spec = registry.get_spec(name)
  except ValueError as e:
    raise errors.ConfigError(
        f"{name}: is neither a file, a folder nor a model: {e}") from e
  folder = pathlib.Path(WEIGHTS).expanduser()
  for suffix in _SUFFIXES:
    path = folder / f"{name}{suffix}"
    if path.is_file():
      return path
  if spec.checkpoint is None:
    raise errors.ConfigError(f"{name}: has no published weights")
  raise errors.ConfigError(
      f"{name}: its weights are not on this machine; download "
      f"{spec.checkpoint} as {folder / name}{_SUFFIXES[1]}")


def load(weights: str | pathlib.Path, *, model: str | None = None,
         num_classes: int | None = None,
         allow_import: str | Sequence[str] = (),
         **overrides: Any) -> Loaded:
  """Loads a model with its weights.

  Args:
    weights: the name of a model whose published weights are in
      ~/.cache/metaformer_jax/weights; a file of weights; a folder that
      transformers or timm wrote; or a run's workdir, its checkpoints folder or
      one step in it. An existing path wins over a name.
    model: name of the model, for a file that does not record it.
    num_classes: of a new head, if not those of the weights.
    allow_import: names of modules of the user's own that the weights may name;
      not needed for a run of the same user in the same folder.
    **overrides: keys of `config.model` that differ, as `dtype`; an error if
      they change what the weights compute.

  Raises:
    ConfigError: there are no such weights, they do not record their model, name
      a module that is not allowed, or do not fit it.
  """
  cfg, path = experiment(weights, model, allow_import)
  try:
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, **overrides))
  except TypeError as e:
    raise errors.ConfigError(f"config.model: {e}") from e
  if num_classes is not None:
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(
        cfg.task, num_classes=num_classes, class_names=None))
  cfg, task = tasks.create(cfg, files=False)
  if isinstance(cfg.task, sections.Classification):
    variables = pretrained.load_pretrained(
        cfg.model.name, path, num_classes=num_classes,
        input_size=cfg.task.input_size, allow_import=allow_import,
        **cfg.model.overrides())
  else:
    shapes = jax.eval_shape(task.model.init, jax.random.key(0),
                            *task.init_inputs())
    variables = jax.tree.map(
        jnp.asarray, pretrained.read(path, None, shapes, cfg.task.input_size))
  return Loaded(cfg, task, variables)
