"""Published training recipes: one file per task.

A file of a family in configs/ has a table of its variants, which `variant`
reads.
"""

from collections.abc import Mapping
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import trees
from metaformer_jax.models import registry
from metaformer_jax.recipes import detection, segmentation


def variant(table: Mapping[str, Any], name: str | None) -> Any:
  """The row of a config file's table that --config=FILE.py:NAME asks for.

  Args:
    table: variants by name.
    name: as given to `get_config`; None if the command line names none.

  Raises:
    ConfigError: no variant is named, or an unknown one.
  """
  if not name:
    raise errors.ConfigError(
        f"needs a variant, as in FILE.py:{next(iter(table))}; valid: "
        f"{', '.join(table)}")
  if name not in table:
    raise errors.ConfigError(
        f"{name!r} is not a variant{errors.did_you_mean(name, table)}")
  return table[name]


def published(name: str) -> trees.ConfigDict:
  """The model of published checkpoints of a dense task.

  Args:
    name: of the decoder and the backbone, as "semantic_fpn/poolformer_s12", of
      ADE20K, or "retinanet/poolformer_s12", of COCO.

  Raises:
    ConfigError: there is no such decoder.
    ValueError: there is no such backbone.
  """
  head, _, backbone = name.partition("/")
  task_of = {known: task for task in (segmentation, detection)
             for known in task.HEADS}
  if head not in task_of:
    raise errors.ConfigError(f"{name}: {head!r} is not a decoder"
                             f"{errors.did_you_mean(head, task_of)}")
  task = task_of[head]
  config = task.HEADS[head](registry.get_spec(backbone).name)
  config.init = None
  config.model.dtype = "float32"
  config.task.update(task.CLASSES)
  return config
