"""The part of a task's variables that is a network of the model table."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metaformer_jax import errors
from metaformer_jax.checkpoints import pretrained, published
from metaformer_jax.config import imagenet, saved
from metaformer_jax.config import weights as weights_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.tasks import base

log = logging.getLogger(__name__)


def relative_name(name: str, path: str) -> str | None:
  """A parameter's name within the backbone at `path`; None if it is outside.

  "backbone/stage1/block1/norm1/scale" -> "stage1/block1/norm1/scale".
  """
  if not path:
    return name
  prefix = f"{path}/"
  return name.removeprefix(prefix) if name.startswith(prefix) else None


def variables_of(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
  """The backbone's own variables, by collection."""
  found = {}
  for collection, tree in variables.items():
    for part in filter(None, path.split("/")):
      tree = tree.get(part, {})
    if tree:
      found[collection] = tree
  return found


def at_path(variables: Mapping[str, Any], path: str) -> dict[str, Any]:
  """Inverse of `variables_of`, with nothing but the backbone's variables."""
  found = {}
  for collection, tree in variables.items():
    for part in reversed(list(filter(None, path.split("/")))):
      tree = {part: tree}
    found[collection] = tree
  return found


def read_weights(init: str, part: base.Backbone | None,
                 shapes: Mapping[str, Any],
                 beat: Callable[[], None] = lambda: None,
                 whole: str | None = None, **head: bool) -> dict[str, Any]:
  """Reads `config.init` for a task's variables of the given shapes.

  Args:
    init: the key's value; published weights are downloaded if necessary.
    part: of the task that weights can be loaded into.
    shapes: of the task's variables.
    beat: called whenever a part of a download has arrived.
    whole: family of the conversion rules, if the weights are those of such a
      task as a whole, not of a classifier.
    **head: other_classes and head_21k of `adapt.to_shape`.

  Returns:
    The variables that are in the file, as numpy arrays; a head with other
    classes, or another number of them, is absent.

  Raises:
    ConfigError: the task has no backbone.
    WeightsError: the file does not fit it, or cannot be downloaded.
  """
  if part is None:
    raise errors.ConfigError(
        f"config.init: {init!r}, but the task has no pretrained backbone; "
        "None starts from scratch")
  path = published.locate(init, beat)
  if whole:
    return pretrained.read(path, whole, shapes, part.input_size, new_head=True,
                           **head)
  own = variables_of(shapes, part.path)
  classifier = own
  if part.path:
    image = jax.ShapeDtypeStruct((1, *part.input_size, 3), jnp.float32)
    classifier = jax.eval_shape(part.classifier.init, jax.random.key(0), image)
    classifier = pretrained.merged(classifier, own)
  weights = pretrained.read(path, part.family, classifier, part.input_size,
                            kept=own, new_head=True, **head)
  return at_path(weights, part.path)


def head(cfg: Experiment, task: base.Task) -> dict[str, Any]:
  """What becomes of the head of config.init, for `read_weights`.

  It is kept if its classes are this run's, as far as both have names. From one
  of ImageNet-21K, a run on ImageNet-1K takes its classes, as in the official
  fine-tuning. Warns if config.model computes something else than the weights'
  model with the same names.
  """
  made = weights_lib.made(cfg.init, None, cfg.model.name)
  names = getattr(cfg.task, "class_names", None)
  found = {"head_21k": names in (None, imagenet.ids())}
  if made is None or made.task.name != cfg.task.name:
    return found
  for line in saved.model_differences(made.model, cfg.model):
    log.warning("config.init: %s was made with another value of %s (made "
                "with, this run)", cfg.init, line)
  theirs = getattr(made.task, "class_names", None)
  if task.pretrained and task.pretrained.path:
    found["whole"] = getattr(task, "family", cfg.task.name)
  return found | {"other_classes": None not in (names, theirs)
                 and tuple(names) != tuple(theirs)}
