"""Object detection: boxes with a class and a score."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import checks, derived, typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.data import images, loader, sources
from metaformer_jax.data.transforms import detection as transforms
from metaformer_jax.evaluation import coco_ap
from metaformer_jax.heads import detector
from metaformer_jax.tasks import (
  base,
  classes,
  dense,
  drawing,
  objects,
  one_stage,
  own_models,
  two_stage,
)


@dataclasses.dataclass(frozen=True)
class Detection:
  """The losses of RetinaNet or of an R-CNN; COCO's average precision.

  Batches are {"image": uint8 [B, H, W, 3], on one of the section's `canvases`;
  "size": int32 [B, 2], height and width of each image, which begins at the top
  left; "replaced": bool [B]}. In training they have "boxes": float32 [B, G, 4],
  in pixels of the canvas, "labels": int32 [B, G], -1 where there is no object,
  "overflow": int32 [B], the objects that are left out, and with masks "masks":
  uint8 [B, G, M, M] and "frames": float32 [B, G, 4] (`data.transforms.masks`).
  In evaluation they have "original_size": int32 [B, 2], "index": int32 [B] and
  "mask": bool [B].
  """

  cfg: Experiment

  @functools.cached_property
  def model(self) -> nn.Module:
    return detector.create(dense.backbone(self.cfg), self.cfg.task,
                           feature_norm=dense.feature_norm(self.cfg))

  @property
  def family(self) -> str:
    """Of the conversion rules for all weights: by detector and backbone."""
    return f"{self.cfg.task.head}/{self.pretrained.family}"

  @property
  def pretrained(self) -> base.Backbone:
    return dense.pretrained(self.cfg, _INIT_SIZE)

  def init_inputs(self) -> tuple[jax.Array, jax.Array]:
    return dense.init_inputs(self.cfg, _INIT_SIZE)

  def train_batches(self, batch_size: int):
    task, struct = self.cfg.task, jax.ShapeDtypeStruct
    boxes, side = (batch_size, task.max_boxes), task.object_mask_size
    masks = {"masks": struct((*boxes, side, side), jnp.uint8),
             "frames": struct((*boxes, 4), jnp.float32)}
    return [{
        "image": struct((batch_size, *canvas, 3), jnp.uint8),
        "size": struct((batch_size, 2), jnp.int32),
        "boxes": struct((*boxes, 4), jnp.float32),
        "labels": struct(boxes, jnp.int32),
        "overflow": struct((batch_size,), jnp.int32),
        "replaced": struct((batch_size,), jnp.bool_),
        **(masks if task.has_masks else {}),
    } for canvas in task.canvases]

  @functools.cached_property
  def detector(self) -> one_stage.OneStage | two_stage.TwoStage:
    """The loss and the detections of the head."""
    kind = two_stage.TwoStage if self.cfg.task.is_rcnn else one_stage.OneStage
    return kind(self.cfg, self.model)

  @property
  def rng_names(self) -> tuple[str, ...]:
    return self.detector.rng_names

  def loss(self, variables, batch, rngs, train):
    losses, updates = self.detector.loss(variables, batch, rngs, train)
    loss = sum(losses.values())
    # Objects that are left out, of an image in the mean.
    metrics = losses | {"loss": loss, "overflow": batch["overflow"].mean()}
    state = {k: v for k, v in variables.items() if k != "params"}
    return loss, metrics, {**state, **updates}

  def predict(self, variables, batch):
    """Detections by descending score, in pixels of the original images.

    Returns:
      {"boxes": float32 [B, K, 4], "scores": float32 [B, K], "labels": int32
      [B, K], "valid": bool [B, K]}, and with masks "masks": float32 [B, K, 28,
      28], the probability that a cell of the box, divided into that many, is of
      the object.
    """
    found = self.detector.predict(variables, batch)
    factors = batch["original_size"] / batch["size"]
    return found | {"boxes": found["boxes"] * jnp.tile(
        jnp.flip(factors, -1), 2)[:, None]}

  def _source(self, split: str) -> Any:
    """The data set of a split, with its objects numbered by our classes."""
    return sources.create(self.cfg.data, split,
                          names=self.cfg.task.class_names, task=self.cfg.task)

  def make_data(self, split: str) -> loader.Loader:
    cfg, source = self.cfg, self._source(split)
    classes.check_number(source.n_classes, cfg, split)
    make = (transforms.TrainTransform if split == "train"
            else transforms.EvalTransform)
    transform = make(cfg.data, cfg.task)
    return loader.create(
        cfg, split, source, transform, n_devices=jax.device_count(),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        groups=transform.groups(source))

  def make_evaluators(self) -> dict[str, base.Evaluator]:
    def ground_truth():
      return objects.ground_truth(self._source("eval"),
                                  self.cfg.task.has_masks)

    return {"detection": coco_ap.AveragePrecision(
        ground_truth, self._names(), self._mask_threshold)}

  @property
  def _mask_threshold(self) -> float | None:
    """None without masks."""
    task = self.cfg.task
    return task.mask_threshold if task.has_masks else None

  def preprocess(self, image: bytes | np.ndarray) -> dict[str, np.ndarray]:
    return transforms.EvalTransform(self.cfg.data, self.cfg.task).preprocess(
        image)

  def postprocess(self, outputs: Mapping[str, np.ndarray],
                  example: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """As `objects.find`: the detections on one image, the best ones first."""
    return objects.find(outputs, example["original_size"], self.class_names,
                        self._mask_threshold)

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return self.cfg.task.class_names

  def _names(self) -> list[str]:
    """Names of the classes, or their numbers."""
    return list(self.class_names or map(str, range(self.cfg.task.num_classes)))

  def describe(self, found: Mapping[str, Any], top: int) -> base.Rows:
    return objects.describe(found, top)

  def annotations(self, found: Mapping[str, Any]) -> dict[str, base.Rows]:
    return objects.annotations(found, self._names(), self.cfg.task.category_ids)

  def pictures(self, found: Mapping[str, Any], image: bytes | np.ndarray,
               ) -> dict[str, Image.Image]:
    """"overlay": boxes on the image, with names and scores, over any masks."""
    picture = images.decode(image, self.cfg.data.max_pixels)
    return {"overlay": self.drawn(found, np.asarray(picture))}

  def drawn(self, found: Mapping[str, Any], image: np.ndarray, factor: int = 1,
            legend: bool = True) -> Image.Image:
    del legend  # Boxes have their names.

    def enlarged(x):
      return x.repeat(factor, 0).repeat(factor, 1) if factor > 1 else x

    image = enlarged(image)
    shown = (found["boxes"] * factor, found["classes"], found["scores"],
             self._names())
    if "masks" not in found:
      return drawing.boxes(image, *shown)
    masks = found["masks"]
    if factor > 1:
      masks = list(map(enlarged, masks))
    return drawing.masks(image, masks, *shown)

  def truth(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """As `postprocess`, but "scores" are None."""
    return objects.truth(record, self.cfg.data, self.cfg.task, self.class_names)

  def training_examples(self, batch, rngs=None):
    del rngs  # The step leaves images as they are.
    return objects.of_batch(batch, self.class_names)


# With cells at every level, and soon traced.
_INIT_SIZE = (128, 128)


def create(cfg: Experiment,
           files: bool = True) -> tuple[Experiment, base.Task]:
  """As `tasks.create`."""
  cfg = derived.fill(cfg)
  own_models.check(cfg)
  cfg = classes.fill(cfg, files)
  if cfg.task.category_ids is None and files:
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(
        cfg.task, category_ids=_category_ids(cfg)))
  typed.refuse(checks.check(cfg, files=False))  # The settings with n outputs.
  return cfg, Detection(cfg)


def _category_ids(cfg: Experiment) -> tuple[int, ...] | None:
  """The numbers of the classes in the training data's files, if it has all."""
  try:
    ids = sources.create(cfg.data, "train", names=cfg.task.class_names,
                         task=cfg.task).category_ids
  except errors.ConfigError:
    return None  # `make_data` reports it, where data is needed.
  return None if None in ids else tuple(map(int, ids))
