"""Image classification: one label per image."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metaformer_jax import imports
from metaformer_jax.config import checks, derived, imagenet, typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.data import loader, sources
from metaformer_jax.data.augment import pixels
from metaformer_jax.data.sources import real_labels
from metaformer_jax.data.transforms import classification as transforms
from metaformer_jax.evaluation import topk
from metaformer_jax.models import registry
from metaformer_jax.ops import images as image_ops
from metaformer_jax.tasks import (
  auto_augment,
  base,
  classes,
  mixing,
  own_models,
)


@dataclasses.dataclass(frozen=True)
class Classification:
  """Cross-entropy, smoothed and mixed as configured; top-1 and top-5.

  Batches are {"image": uint8 [B, H, W, 3], "label": int32 [B], "replaced": bool
  [B]}; in evaluation also "mask": bool [B], and for ImageNet-ReaL "labels":
  int32 [B, L].
  """

  cfg: Experiment

  rng_names = ("augment", "dropout", "drop_path")

  @functools.cached_property
  def model(self) -> nn.Module:
    cfg = self.cfg.model
    return registry.create_model(
        cfg.name, num_classes=self.cfg.task.num_classes,
        dtype=jnp.dtype(cfg.dtype), compile=self.cfg.compile,
        **cfg.overrides())

  @property
  def pretrained(self) -> base.Backbone:
    name = self.cfg.model.name
    family = None if imports.is_path(name) else registry.get_spec(name).family
    return base.Backbone(family, "", self.cfg.task.input_size, self.model)

  def init_inputs(self) -> tuple[jax.Array]:
    return (jnp.zeros((1, *self.cfg.task.input_size, 3)),)

  def train_batches(self, batch_size: int):
    size = self.cfg.task.input_size
    return [{
        "image": jax.ShapeDtypeStruct((batch_size, *size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        "replaced": jax.ShapeDtypeStruct((batch_size,), jnp.bool_)}]

  def _normalized(self, images: jax.Array) -> jax.Array:
    data = self.cfg.data
    return image_ops.normalize(images, data.mean, data.std)

  def _targets(self, labels: jax.Array) -> jax.Array:
    cfg = self.cfg.task
    return mixing.smooth_one_hot(labels, cfg.num_classes, cfg.label_smoothing)

  def _augmented(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """What the host left out, on uint8 [B, H, W, 3]."""
    cfg = self.cfg
    if cfg.data.augment_on == "host":
      return images
    drawn = auto_augment.draw(rng, len(images), cfg.task)
    return images if drawn is None else auto_augment.apply(
        images, drawn, pixels.fill_colour(cfg.data.mean))

  def loss(self, variables, batch, rngs, train):
    cfg = self.cfg.task
    images, labels = batch["image"], batch["label"]
    if train:
      images, targets = self._mixed(images, labels, rngs["augment"])
    else:
      images, targets = self._normalized(images), self._targets(labels)
    logits, updates = self.model.apply(
        variables, images, train=train, rngs=rngs, mutable=["batch_stats"])
    logits = logits.astype(jnp.float32)
    if cfg.loss == "ce":
      loss = optax.softmax_cross_entropy(logits, targets).mean()
    else:
      labels = targets
      if cfg.bce_threshold:
        labels = (targets > cfg.bce_threshold).astype(jnp.float32)
      loss = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    # A mixed image counts as the class with the larger share.
    top1 = (logits.argmax(-1) == targets.argmax(-1)).mean()
    state = {k: v for k, v in variables.items() if k != "params"}
    return loss, {"loss": loss, "top1": top1}, {**state, **updates}

  def _mixed(self, images, labels, rng):
    """Normalised images and targets of training, augmented on the device."""
    cfg = self.cfg.task
    key_mix, key_erase, key_ops = jax.random.split(rng, 3)
    images = self._augmented(images, key_ops)
    # Reversed while they are bytes: partners are on other devices.
    examples, partners = (
        (self._normalized(x), self._targets(y))
        for x, y in ((images, labels), (images[::-1], labels[::-1])))
    images, targets = mixing.mixup_cutmix(
        key_mix, examples, partners, mixup_alpha=cfg.mixup,
        cutmix_alpha=cfg.cutmix, prob=cfg.mixup_prob,
        switch_prob=cfg.mixup_switch_prob)
    return mixing.random_erasing(key_erase, images, cfg.erasing), targets

  def predict(self, variables, batch):
    """Returns float32 logits [B, num_classes]."""
    logits = self.model.apply(variables, self._normalized(batch["image"]),
                              train=False)
    return logits.astype(jnp.float32)

  def make_data(self, split: str) -> loader.Loader:
    cfg = self.cfg
    train = split == "train"
    labels = "split" if train else cfg.task.eval_labels
    source = sources.create(cfg.data, split, numbered=labels == "number",
                            names=cfg.task.class_names)
    classes.check_number(source.n_classes, cfg, split)
    if labels == "real":
      source = real_labels.RealLabels(source, cfg.task.real_path,
                                      cfg.task.num_classes)
    transform = transforms.TrainTransform if train else transforms.EvalTransform
    return loader.create(
        cfg, split, source, transform(cfg.data, cfg.task),
        n_devices=jax.device_count(), process_index=jax.process_index(),
        process_count=jax.process_count(), repeats=cfg.task.repeats)

  def make_evaluators(self) -> dict[str, base.Evaluator]:
    return {"classification": topk.TopK()}

  def preprocess(self, image: bytes | np.ndarray) -> dict[str, np.ndarray]:
    """{"image": uint8 [H, W, 3]}, resized and cropped as for evaluation."""
    transform = transforms.EvalTransform(self.cfg.data, self.cfg.task)
    return {"image": transform({"image": image, "label": 0})["image"]}

  def postprocess(self, outputs: np.ndarray,
                  example: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Ranks the classes of logits [C].

    Returns:
      {"classes": int [C], the most probable first; "probabilities": float32
      [C], of these classes; "names": theirs, if they are known}. Of a model
      without a head {"features": float32 [C]}, what it would be given.
    """
    del example
    logits = np.asarray(outputs, np.float32)
    if not self.cfg.task.num_classes:
      return {"features": logits}
    exponents = np.exp(logits - logits.max())
    return self._ranked(exponents / exponents.sum(), logits)

  def _ranked(self, probabilities: np.ndarray,
              by: np.ndarray) -> dict[str, Any]:
    """What `postprocess` returns, of probabilities [C], in an order."""
    classes = np.argsort(-by, kind="stable")
    found = {"classes": classes, "probabilities": probabilities[classes]}
    names = self.class_names
    return found | ({"names": [names[i] for i in classes]} if names else {})

  def truth(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """The label; of several, of ImageNet-ReaL, each with the same part."""
    labels = np.asarray(record.get("labels", record["label"])).reshape(-1)
    targets = np.zeros(self.cfg.task.num_classes, np.float32)
    targets[labels[labels >= 0]] = 1
    return self._ranked(targets / max(targets.sum(), 1), targets)

  def training_examples(self, batch, rngs=None):
    images, labels = batch["image"], batch["label"]
    if rngs is None:
      targets = jax.nn.one_hot(labels, self.cfg.task.num_classes)
    else:
      images, targets = jax.jit(self._mixed)(images, labels, rngs["augment"])
      images = image_ops.denormalize(images, self.cfg.data.mean,
                                     self.cfg.data.std)
    return [(image, self._ranked(target, target)) for image, target in zip(
        np.asarray(images), np.asarray(targets))]

  @functools.cached_property
  def class_names(self) -> tuple[str, ...] | None:
    """Names for people: words instead of ImageNet's ids."""
    names = self.cfg.task.class_names
    return names and imagenet.readable(names)

  def describe(self, found: Mapping[str, Any], top: int) -> base.Rows:
    """The `top` most probable classes, the most probable first."""
    names = found.get("names", found["classes"])
    return [{"class": int(number), "name": str(name),
             "probability": float(probability)}
            for number, name, probability in zip(
                found["classes"], names, found["probabilities"])][:top]


def create(cfg: Experiment,
           files: bool = True) -> tuple[Experiment, base.Task]:
  """As `tasks.create`."""
  cfg = derived.fill(cfg)
  own_models.check(cfg)
  cfg = classes.fill(cfg, files)
  typed.refuse(checks.check(cfg, files=False))  # The settings with n outputs.
  return cfg, Classification(cfg)
