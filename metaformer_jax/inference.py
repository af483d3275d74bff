"""Models with their weights, ready to use: `metaformer_jax.load`."""

import collections
import dataclasses
import functools
import itertools
import logging
import pathlib
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  Sequence,
  Sized,
)
from concurrent import futures
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax import errors, recipes, tasks
from metaformer_jax.checkpoints import pretrained
from metaformer_jax.checkpoints import published as published_lib
from metaformer_jax.config import derived, saved, schema, typed
from metaformer_jax.config import tasks as sections
from metaformer_jax.config import weights as weights_lib
from metaformer_jax.config.hub import folders as hub_folders
from metaformer_jax.data.sources import folders
from metaformer_jax.tasks import base

log = logging.getLogger(__name__)

# A file, its bytes, a picture, or uint8 [H, W, 3].
Picture: TypeAlias = (
    str | pathlib.Path | bytes | Image.Image | np.ndarray | jax.Array)


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
    return getattr(self.task, "class_names", None)

  def preprocess(self, image: Picture) -> dict[str, np.ndarray]:
    """An image as an example for the task, as for its evaluation.

    Raises:
      DataError: the image cannot be read or decoded, or an array is not an
        image of 8 bits, channels last.
    """
    try:
      if isinstance(image, (str, pathlib.Path)):
        return self.task.preprocess(
            folders.read_file(str(pathlib.Path(image).expanduser())))
      if isinstance(image, Image.Image):
        known = image.mode in ("L", "RGB", "RGBA") or (
            image.mode.startswith("I;16"))
        image = image if known else image.convert("RGB")
      # Of jax, for example.
      return self.task.preprocess(
          image if isinstance(image, bytes) else np.asarray(image))
    except Exception as e:  # Of many types, as Pillow's are.
      shown = (image if isinstance(image, (str, pathlib.Path))
               else f"this {type(image).__name__}")
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
      OutOfMemoryError: a batch does not fit in memory.
    """
    if isinstance(images, (str, bytes, pathlib.Path, Image.Image)) or (
        getattr(images, "ndim", 4) < 4):
      images = [images]
    n = len(images) if isinstance(images, Sized) else batch_size
    found = []
    for result in self.stream(images, min(batch_size, enough_for(n))):
      if isinstance(result, errors.DataError):
        raise result
      found.append(result)
    return found

  def stream(self, images: Iterable[Picture], batch_size: int = 32,
             ) -> Iterator[dict[str, Any] | errors.DataError]:
    """As `predict`, for any number of images, in constant memory.

    Images are read and prepared by several threads.

    Yields:
      For each image, in order, what `predict` returns, or why it cannot be
      used.
    """
    images = iter(images)
    with futures.ThreadPoolExecutor() as pool:
      ready = pool.map(self._try, itertools.islice(images, batch_size))
      while results := list(ready):
        # Prepared while the model computes.
        ready = pool.map(self._try, itertools.islice(images, batch_size))
        yield from self._predict(results, batch_size)

  def _try(self, image: Picture) -> dict[str, np.ndarray] | errors.DataError:
    try:
      return self.preprocess(image)
    except errors.DataError as e:
      return e

  def _predict(self, results: list[dict[str, np.ndarray] | errors.DataError],
               batch_size: int,
               ) -> Iterator[dict[str, Any] | errors.DataError]:
    """The predictions for one batch of examples; errors are passed on."""
    examples = {i: result for i, result in enumerate(results)
                if not isinstance(result, errors.DataError)}
    groups = collections.defaultdict(list)  # Of examples of the same shapes.
    for i, example in examples.items():
      groups[base.signature(example)].append(i)
    found: list[dict[str, Any] | errors.DataError] = list(results)
    for group in groups.values():
      # Each size is compiled; that of all batches is the best if it fits.
      n = batch_size if len(groups) == 1 else enough_for(len(group))
      predicted = self._outputs([examples[i] for i in group], n)
      for i, outputs in zip(group, predicted):
        found[i] = self.task.postprocess(outputs, examples[i])
    yield from found

  def _outputs(self, examples: list[dict[str, np.ndarray]],
               batch_size: int) -> Iterator[Any]:
    """What the model gives for each of some examples of the same shapes."""
    filled = [*examples, *[examples[-1]] * (batch_size - len(examples))]
    with errors.fitting_memory(
        f"batch_size: {batch_size} images at a time do not fit in memory; "
        "reduce it"):
      batch = {name: np.stack([example[name] for example in filled])
               for name in examples[0]}
      outputs = jax.device_get(self._compiled(self.variables, batch))
    for i in range(len(examples)):
      yield jax.tree.map(lambda x, i=i: x[i], outputs)

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    return jax.jit(self.task.predict)


def enough_for(n: int) -> int:
  """The batch size for n images: a power of two, for few compilations."""
  return 1 << max(0, n - 1).bit_length()


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
  if problem := weights_lib.problem(weights):
    raise errors.ConfigError(f"{weights}: {problem}")
  name = weights_lib.model_of(weights) or model
  if model not in (None, name):
    raise errors.ConfigError(f"{weights} is of {name}, not {model}")
  path = published_lib.locate(weights)
  with published_lib.advising(path):
    cfg = saved.read_weights(path, allow_import, name)
  if cfg is not None:
    if name not in (None, cfg.model.name):
      raise errors.ConfigError(f"{weights} is of {cfg.model.name}, not {name}")
    return cfg, path
  if name is None:
    name = weights_lib.named_after(path)
    if name is None:
      raise errors.ConfigError(
          f"{weights}: does not record its model, and is not named after one; "
          "name it, as in model='poolformer_s12' (--model=poolformer_s12)"
          + ("; or give its folder, which has a config.json"
             if hub_folders.is_folder(path.parent) else ""))
    log.info("%s: taken for %s, by its name", path, name)
  return published(name), path


def published(model: str) -> schema.Experiment:
  """The experiment of published weights, with its preprocessing.

  Args:
    model: a row of the model table, for its classifier; or with a decoder
      before it, as "semantic_fpn/poolformer_s12", for ADE20K's classes, or
      "retinanet/poolformer_s12", for COCO's.

  Raises:
    ConfigError: there is no such model.
  """
  try:
    if "/" in model:
      cfg = typed.typed(recipes.published(model))
    else:
      cfg = weights_lib.published(model)
    return derived.fill(cfg)
  except ValueError as e:
    raise errors.ConfigError(str(e)) from e


def load(weights: str | pathlib.Path, *, model: str | None = None,
         num_classes: int | None = None,
         allow_import: str | Sequence[str] = (),
         **overrides: Any) -> Loaded:
  """Loads a model with its weights.

  Args:
    weights: the name of a model for its published weights, downloaded if
      necessary; a file of weights; a folder that transformers or timm wrote; or
      a run's workdir, its checkpoints folder or one step in it. An existing
      path wins over a name; "./NAME" and a `pathlib.Path` are always paths.
    model: name of the model, for a file that does not record it; as for
      `published`.
    num_classes: of a new head, if not those of the weights.
    allow_import: names of modules of the user's own that the weights may name;
      not needed for a run of the same user in the same folder.
    **overrides: keys of `config.model` that differ, as `dtype`; an error if
      they change what the weights compute.

  Raises:
    ConfigError: there are no such weights, they cannot be downloaded, do not
      record their model, name a module that is not allowed, or do not fit it.
  """
  cfg, path = experiment(weights, model, allow_import)
  try:
    cfg = dataclasses.replace(
        cfg, compile=schema.Compile(),
        model=dataclasses.replace(cfg.model, **overrides))
  except TypeError as e:
    raise errors.ConfigError(f"config.model: {e}") from e
  if num_classes is not None:
    head: dict[str, Any] = {"num_classes": num_classes, "class_names": None}
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(cfg.task, **head))
  cfg, task = tasks.create(cfg, files=False)
  if isinstance(cfg.task, sections.Classification):
    assert cfg.model.name is not None  # `tasks.create` needs one.
    variables = pretrained.load_pretrained(
        cfg.model.name, path, num_classes=num_classes,
        input_size=cfg.task.input_size, allow_import=allow_import,
        **cfg.model.overrides())
  else:
    variables = jax.tree.map(jnp.asarray, read(task, path))
  return Loaded(cfg, task, variables)


def read(task: base.Task, path: str | pathlib.Path) -> dict[str, Any]:
  """Weights as variables of a task's model, of numpy arrays.

  Raises:
    WeightsError: something in the file does not fit.
  """
  shapes = jax.eval_shape(task.model.init, jax.random.key(0),
                          *task.init_inputs())
  backbone = task.pretrained
  return pretrained.read(path, family_of(task), shapes,
                         backbone.input_size if backbone else None)


def family_of(task: base.Task) -> str | None:
  """The family of the conversion rules for a task's weights, if any."""
  backbone = task.pretrained
  if backbone is None:
    return None
  return getattr(task, "family", None) if backbone.path else backbone.family
