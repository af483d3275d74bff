"""A small task of detection, of one's own: red and green rectangles, as masks.

The detector is exact and has nothing to learn; its loss is that of a line.
"""

import dataclasses

import jax
import jax.numpy as jnp
import line_task
import numpy as np

from metaformer_jax.config import tasks
from metaformer_jax.data import images
from metaformer_jax.evaluation import coco_ap
from metaformer_jax.tasks import drawing, objects

NAMES = ("red", "green")
IDS = (3, 90)
SIZE = (24, 40)


@dataclasses.dataclass(frozen=True)
class Section(tasks.Task):
  MEASURES = (tasks.Measure("box_ap", True, is_fraction=True),)

  name: str = "box_task:BoxTask"
  num_classes: int = 2


def picture(seed):
  """An image, uint8 [H, W, 3], and its rectangles: (class, x1, y1, x2, y2)."""
  rng = np.random.default_rng(seed)
  image, found = np.zeros((*SIZE, 3), np.uint8), []
  for label in range(2):
    if rng.random() < 0.8:
      y, x = rng.integers(0, (SIZE[0] - 8, SIZE[1] - 8))
      height, width = rng.integers(4, 8, 2)
      image[y:y + height, x:x + width, label] = 255
      found.append((label, x, y, x + width, y + height))
  return image, found


def data_set(n):
  """The pictures 0, ..., n - 1 as COCO has them, by other ids."""
  annotations = []
  for i in range(n):
    for label, x1, y1, x2, y2 in np.array(picture(i)[1]).tolist():
      annotations.append({
          "id": len(annotations), "image_id": 100 - i, "iscrowd": 0,
          "category_id": IDS[label], "bbox": [x1, y1, x2 - x1, y2 - y1],
          "area": (x2 - x1) * (y2 - y1),
          "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]]})
  return {"info": {}, "annotations": annotations,
          "images": [{"id": 100 - i, "height": SIZE[0], "width": SIZE[1]}
                     for i in range(n)],
          "categories": [{"id": i, "name": x} for i, x in zip(IDS, NAMES)]}


class Pictures(line_task.Points):
  """The data: lines for training, ten pictures for evaluation."""

  def eval_batches(self):
    for first in (0, 8):
      index = np.arange(first, first + 8)
      yield {"image": np.stack([picture(i)[0] for i in index]),
             "index": index.astype(np.int32), "mask": index < self.n_examples,
             "original_size": np.tile(np.int32(SIZE), (8, 1))}


class Source:
  """What the evaluation needs of a data set."""

  category_ids = IDS

  def annotations(self):
    return data_set(Pictures.n_examples)


class BoxTask(line_task.LineTask):

  class_names = NAMES
  Section = Section

  def __init__(self, cfg):
    del cfg

  def predict(self, variables, batch):
    outputs = []
    for label in range(2):
      bright = batch["image"][..., label] > 128
      edges = []
      for axis in (1, 2):
        seen = bright.any(axis)
        edges.append((seen.argmax(1), seen.shape[1] - seen[:, ::-1].argmax(1)))
      (x1, x2), (y1, y2) = edges
      outputs.append({
          "boxes": jnp.stack([x1, y1, x2, y2], -1).astype(jnp.float32),
          "scores": jnp.full(len(x1), 0.9 - 0.2 * label),
          "labels": jnp.full(len(x1), label), "valid": bright.any((1, 2)),
          # Whole boxes, but for parts of pixels at their corners.
          "masks": jnp.ones((len(x1), 28, 28))})
    return jax.tree.map(lambda *x: jnp.stack(x, 1), *outputs)

  def make_data(self, split):
    return Pictures()

  def make_evaluators(self):
    return {"detection": coco_ap.AveragePrecision(
        lambda: objects.ground_truth(Source(), True), NAMES, 0.5)}

  def preprocess(self, image):
    return {"image": np.asarray(images.decode(image))}

  def postprocess(self, outputs, example):
    return objects.find(outputs, example["image"].shape[:2], NAMES, 0.5)

  def describe(self, found, top):
    return objects.describe(found, top)

  def annotations(self, found):
    return objects.annotations(found, NAMES, IDS)

  def pictures(self, found, image):
    return {"overlay": drawing.masks(
        np.asarray(images.decode(image)), found["masks"], found["boxes"],
        found["classes"], found["scores"], NAMES)}
