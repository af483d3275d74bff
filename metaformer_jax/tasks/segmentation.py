"""Semantic segmentation: a class for each pixel."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image

from metaformer_jax.config import checks, derived, typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks.segmentation import IGNORE
from metaformer_jax.data import images, loader, sources
from metaformer_jax.data.transforms import framing
from metaformer_jax.data.transforms import segmentation as transforms
from metaformer_jax.evaluation import miou
from metaformer_jax.heads import segmenter
from metaformer_jax.ops import pixels, resize, windows
from metaformer_jax.tasks import base, classes, dense, drawing, own_models


@dataclasses.dataclass(frozen=True)
class Segmentation:
  """Cross-entropy of all pixels; mean IoU.

  Batches are {"image": uint8 [B, H, W, 3], "size": int32 [B, 2], height and
  width of each image, which begins at the top left of its canvas; "label":
  uint8 [B, H', W'], IGNORE where no class counts; "replaced": bool [B]}. In
  training the label maps have the images' size. In evaluation they have a
  canvas of their own, with the original sizes "label_size": int32 [B, 2]; and
  "image1", "size1", ... are the images at further scales.
  """

  cfg: Experiment

  rng_names = ("dropout", "drop_path")

  @functools.cached_property
  def model(self) -> nn.Module:
    return segmenter.create(dense.backbone(self.cfg), self.cfg.task,
                            feature_norm=dense.feature_norm(self.cfg))

  @property
  def family(self) -> str:
    """Of the conversion rules for all weights: by decoder and backbone."""
    return f"{self.cfg.task.head}/{self.pretrained.family}"

  @property
  def pretrained(self) -> base.Backbone:
    return dense.pretrained(self.cfg, self.cfg.task.crop_size)

  def init_inputs(self) -> tuple[jax.Array, jax.Array]:
    return dense.init_inputs(self.cfg, self.cfg.task.crop_size)

  def train_batches(self, batch_size: int):
    size, struct = self.cfg.task.crop_size, jax.ShapeDtypeStruct
    return [{
        "image": struct((batch_size, *size, 3), jnp.uint8),
        "label": struct((batch_size, *size), jnp.uint8),
        "size": struct((batch_size, 2), jnp.int32),
        "replaced": struct((batch_size,), jnp.bool_)}]

  def _apply(self, variables, x, sizes, **kwargs) -> Any:
    """What the model gives for normalised images at the top left."""
    mask = resize.mask(sizes, *x.shape[1:3])
    return self.model.apply(variables, x, mask=mask, **kwargs)

  def loss(self, variables, batch, rngs, train):
    sizes = batch["size"]
    outputs, updates = self._apply(
        variables, dense.normalized(self.cfg, batch["image"], sizes), sizes,
        train=train, rngs=rngs, mutable=["batch_stats"])
    loss, accuracy = self._cross_entropy(outputs["logits"], outputs["mask"],
                                         batch)
    metrics = {"loss": loss, "pixel_accuracy": accuracy}
    if "auxiliary" in outputs:
      auxiliary, _ = self._cross_entropy(
          outputs["auxiliary"], outputs["auxiliary_mask"], batch)
      loss = loss + self.cfg.task.auxiliary_weight * auxiliary
      metrics |= {"loss": loss, "auxiliary_loss": auxiliary}
    state = {k: v for k, v in variables.items() if k != "params"}
    return loss, metrics, {**state, **updates}

  def _cross_entropy(self, logits, mask, batch):
    return pixels.cross_entropy(logits, resize.sizes(mask), batch["label"],
                                batch["size"], IGNORE)

  def predict(self, variables, batch):
    """Returns the class of each pixel of the label maps, uint8 [B, H', W'].

    As mmsegmentation: logits are resized to the network's image, then to the
    label map; with several scales or mirrored images, the probabilities are
    averaged.
    """
    found = []
    for i in range(len(self.cfg.task.eval_scales)):
      key = str(i or "")
      sizes = batch[f"size{key}"]
      x = dense.normalized(self.cfg, batch[f"image{key}"], sizes)
      found.append(self._logits(variables, x, sizes))
      if self.cfg.task.eval_flip:
        mirrored = self._logits(variables, windows.mirrored(x, sizes[:, 1]),
                                sizes)
        found.append(mirrored._replace(logits=windows.mirrored(
            mirrored.logits, mirrored.sizes[:, 1])))
    return pixels.classes(found, batch["label_size"], batch["label"].shape[1:])

  def _logits(self, variables, x, sizes) -> pixels.Logits:
    """Logits of the whole images, or of windows."""
    task = self.cfg.task

    def whole(x, sizes):
      outputs = self._apply(variables, x, sizes)
      return pixels.Logits(outputs["logits"], resize.sizes(outputs["mask"]),
                           sizes, x.shape[1:3])

    if task.eval_mode == "whole":
      return whole(x, sizes)

    def window(x, sizes):
      found = whole(x, sizes)
      return resize.resize(found.logits, x.shape[1:3],
                           from_sizes=found.sizes, to_sizes=sizes)

    logits = windows.average(window, x, sizes, tuple(task.crop_size),
                             tuple(task.eval_stride))
    return pixels.Logits(logits, sizes, sizes, x.shape[1:3])

  def make_data(self, split: str) -> loader.Loader:
    cfg, train = self.cfg, split == "train"
    source = sources.create(cfg.data, split, names=cfg.task.class_names)
    classes.check_number(source.n_classes, cfg, split)
    make = functools.partial(
        loader.create, cfg, split, source, n_devices=jax.device_count(),
        process_index=jax.process_index(), process_count=jax.process_count())
    if train:
      return make(transforms.TrainTransform(cfg.data, cfg.task))
    sizes = framing.usable(source.sizes(), cfg.data.max_pixels)
    transform = transforms.EvalTransform(cfg.data, cfg.task,
                                         framing.choose(sizes, cfg.task))
    return make(transform, groups=transform.groups(sizes))

  def make_evaluators(self) -> dict[str, base.Evaluator]:
    task = self.cfg.task
    return {"segmentation": miou.MeanIoU(task.num_classes, task.class_names)}

  def preprocess(self, image: bytes | np.ndarray) -> dict[str, np.ndarray]:
    """An image as an example of evaluation, with an empty label map."""
    transform = transforms.EvalTransform(self.cfg.data, self.cfg.task)
    return transform.preprocess(image)

  def postprocess(self, outputs: np.ndarray,
                  example: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The label map of one image.

    Returns:
      {"label_map": uint8 [H, W], in the image's own size; "names": those of the
      classes, if they are known}.
    """
    height, width = example["label_size"]
    return self._named(np.asarray(outputs)[:height, :width])

  @property
  def class_names(self) -> tuple[str, ...] | None:
    return self.cfg.task.class_names

  def describe(self, found: Mapping[str, Any], top: int) -> base.Rows:
    """The `top` classes with most pixels, and their part of the image."""
    label_map = found["label_map"]
    counts = np.bincount(label_map.ravel(), minlength=256)
    ranked = np.argsort(-counts, kind="stable")
    return [{"class": int(i),
             "name": str(found["names"][i] if "names" in found else i),
             "area": float(counts[i] / label_map.size)}
            for i in ranked[:top] if counts[i]]

  def pictures(self, found: Mapping[str, Any], image: bytes | np.ndarray,
               ) -> dict[str, Image.Image]:
    """"labels", with a palette, and "overlay", with a legend of names."""
    picture = images.decode(image, self.cfg.data.max_pixels)
    return {"labels": drawing.labels(found["label_map"]),
            "overlay": self.drawn(found, np.asarray(picture))}

  def drawn(self, found: Mapping[str, Any], image: np.ndarray, factor: int = 1,
            legend: bool = True) -> Image.Image:
    names = found.get("names", range(self.cfg.task.num_classes))
    image, label_map = (x.repeat(factor, 0).repeat(factor, 1)
                        for x in (image, found["label_map"]))
    return drawing.overlay(image, label_map, list(map(str, names)), legend)

  def truth(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """As `postprocess`; the label map is IGNORE where it has no class."""
    _, labels = transforms.decode(record, self.cfg.data, self.cfg.task)
    return self._named(labels)

  def training_examples(self, batch, rngs=None):
    del rngs  # The step leaves images as they are.
    return [(image[:height, :width], self._named(labels[:height, :width]))
            for image, labels, (height, width) in zip(
                batch["image"], batch["label"], batch["size"])]

  def _named(self, label_map: np.ndarray) -> dict[str, Any]:
    names = self.class_names
    return {"label_map": label_map, **({"names": names} if names else {})}


def create(cfg: Experiment,
           files: bool = True) -> tuple[Experiment, base.Task]:
  """As `tasks.create`."""
  cfg = derived.fill(cfg)
  own_models.check(cfg)
  cfg = classes.fill(cfg, files)
  if cfg.task.reduce_zero_label is None:
    cfg = dataclasses.replace(cfg, task=dataclasses.replace(
        cfg.task, reduce_zero_label=sources.reduces_zero_label(cfg.data)))
  typed.refuse(checks.check(cfg, files=False))  # The settings with n outputs.
  return cfg, Segmentation(cfg)
