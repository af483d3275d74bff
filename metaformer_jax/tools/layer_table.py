"""The table by layer of `tools.summarize`; nothing is computed on arrays."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from metaformer_jax import tasks
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import cost, registry
from metaformer_jax.tasks import base
from metaformer_jax.tools import output

_COUNTS = ("params", "macs", "activation_bytes", "param_bytes")


def of_experiment(cfg: Experiment, depth: int) -> dict[str, Any]:
  """The layers of an experiment's whole model, for an image of its training.

  As `of_model`. The data need not be on this machine.
  """
  cfg, task = tasks.create(cfg, files=False)
  shapes = jax.eval_shape(task.init_inputs)
  variables = jax.eval_shape(task.model.init, jax.random.key(0), *shapes)
  inputs = _of_training(task, shapes)
  layers = cost.by_layer(task.model, *inputs, variables=variables)
  return _summary({"model": cfg.model.name, "task": cfg.task.name}, inputs,
                  layers, depth)


def _of_training(task: base.Task, shapes: Sequence[Any]) -> tuple[Any, ...]:
  """What the model is called with for one image of its first training batch.

  Args:
    task: of the model.
    shapes: of what it is initialised with, images of another size for some
      tasks and models.
  """
  image = task.train_batches(1)[0].get("image")
  if image is None:
    return tuple(shapes)
  old, new = shapes[0].shape[1:3], image.shape[1:3]
  return tuple(
      jax.ShapeDtypeStruct((1, *new, *x.shape[3:]), x.dtype)
      if x.shape[1:3] == old else x for x in shapes)


def of_model(name: str, depth: int) -> dict[str, Any]:
  """The layers of a model of the table, as a classifier of its image size.

  Args:
    name: of the model.
    depth: of the modules that have rows; those below count in their parent's.

  Returns:
    {"model", "task", "inputs": shapes, "layers": rows with "layer", a path,
    "module", its class, "output", a list of shapes, and counts without those of
    the rows below, and "total": the counts' sums}.

  Raises:
    ValueError: there is no such model.
  """
  size = registry.get_spec(name).input_size
  inputs = (jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),)
  layers = cost.by_layer(registry.create_model(name), *inputs)
  return _summary({"model": name, "task": "classification"}, inputs, layers,
                  depth)


def _summary(subject: dict[str, str], inputs: Sequence[Any],
             layers: Sequence[cost.Layer], depth: int) -> dict[str, Any]:
  rows = _rows(layers, depth)
  return {**subject, "inputs": [list(x.shape) for x in inputs], "layers": rows,
          "total": {key: sum(row[key] for row in rows) for key in _COUNTS}}


def _rows(layers: Sequence[cost.Layer], depth: int) -> list[dict[str, Any]]:
  """A row for each module to a depth, with all that is below the depth.

  Rows do not overlap: their sums are the model's. A module without anything of
  its own has no row.
  """
  rows = {layer.path: {
      "layer": "/".join(layer.path), "module": layer.kind,
      "output": [list(shape) for shape in layer.outputs],
      **dict.fromkeys(_COUNTS, 0)} for layer in layers
      if len(layer.path) <= depth}
  for layer in layers:
    row = next(rows[layer.path[:n]] for n in range(depth, -1, -1)
               if layer.path[:n] in rows)
    row["params"] += layer.n_params + layer.n_frozen
    for key in _COUNTS[1:]:
      row[key] += getattr(layer, key)
  return [row for row in rows.values() if any(row[key] for key in _COUNTS)]


def text(summary: dict[str, Any]) -> str:
  """The summary as an aligned table with a line of sums."""
  rows = [{"layer": row["layer"] or "(itself)", "module": row["module"],
           "output": _shown(row["output"]), **_counts(row)}
          for row in summary["layers"]]
  total = {"layer": "total", "module": "", "output": ""}
  rows.append({**total, **_counts(summary["total"])})
  return (f"{summary['model']}, {summary['task']}, inputs "
          f"{_shown(summary['inputs'])}\n\n{output.table(rows)}")


def _counts(row: dict[str, Any]) -> dict[str, int]:
  return {"parameters": row["params"], "MACs": row["macs"],
          "activations (bytes)": row["activation_bytes"],
          "parameters (bytes)": row["param_bytes"]}


def _shown(shapes: Sequence[Sequence[int]]) -> str:
  """Shapes as text, the first two of them."""
  shown = [" x ".join(map(str, shape)) for shape in shapes[:2]]
  return ", ".join(shown) + (", ..." if shapes[2:] else "")
