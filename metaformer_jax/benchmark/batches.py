"""Batches of random images and labels, for any task."""

from collections.abc import Mapping

import numpy as np

from metaformer_jax.tasks import base

# Of the training split: the learning rate depends on it, the cost does not.
N_EXAMPLES = 1_281_167

# Objects of an image of a detection batch.
_N_OBJECTS = 8


def training(task: base.Task, batch_size: int,
             num_classes: int | None) -> dict[str, np.ndarray]:
  """A global training batch, of the first of the shapes that can occur.

  Images are random, labels are random classes, and images of dense tasks fill
  their canvas. What is not known by its name is zero.
  """
  rng = np.random.default_rng(0)
  shapes, *_ = task.train_batches(batch_size)
  batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
  for name, x in batch.items():
    if name == "image":
      batch[name] = rng.integers(0, 256, x.shape, x.dtype)
    elif name == "label":
      batch[name] = rng.integers(0, num_classes or 1, x.shape).astype(x.dtype)
    elif name == "size":
      batch[name] = np.full(x.shape, batch["image"].shape[1:3], x.dtype)
  return batch | _objects(rng, batch, num_classes)


def _objects(rng: np.random.Generator, batch: Mapping[str, np.ndarray],
             num_classes: int | None) -> dict[str, np.ndarray]:
  """A few boxes of each image, and their masks, of a detection batch."""
  if "boxes" not in batch:
    return {}
  labels = np.full_like(batch["labels"], -1)
  n = min(_N_OBJECTS, labels.shape[1])
  labels[:, :n] = rng.integers(0, num_classes or 1, (len(labels), n))
  low = rng.uniform(0, 0.6, (len(labels), n, 2))
  corners = np.concatenate([low, low + rng.uniform(0.1, 0.4, low.shape)], -1)
  height, width = batch["image"].shape[1:3]
  boxes = np.zeros_like(batch["boxes"])
  boxes[:, :n] = corners * (width, height, width, height)
  found = {"boxes": boxes, "labels": labels}
  if "masks" in batch:
    found |= {"masks": np.ones_like(batch["masks"]), "frames": boxes}
  return found


def evaluation(task: base.Task, batch_size: int) -> dict[str, np.ndarray]:
  """One random image, prepared as an example of the task, `batch_size` times.

  The image has the size of the model's input. A task of a user's own that does
  not prepare images gets a training batch.
  """
  shapes, *_ = task.train_batches(batch_size)
  if "image" not in shapes or not hasattr(task, "preprocess"):
    return training(task, batch_size, None)
  size = shapes["image"].shape[1:]
  image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
  return {name: np.repeat(np.asarray(value)[None], batch_size, 0)
          for name, value in task.preprocess(image).items()}
