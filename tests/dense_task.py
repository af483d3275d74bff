"""A small dense task: labels of pixels, padding, canvases of two shapes.

The model holds its backbone under `backbone/`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from metaformer_jax.config import tasks
from metaformer_jax.models import registry
from metaformer_jax.tasks import base

CANVASES = ((16, 32), (32, 16))
MODEL = {"depths": (1, 1), "dims": (16, 32), "token_mixers": ("pooling",) * 2,
         "layer_scale_init": 0.1}


@dataclasses.dataclass(frozen=True)
class Section(tasks.Task):
  MEASURES = (tasks.Measure("pixel_accuracy", True),)

  name: str = "dense"
  num_classes: int = 3


class DenseModel(nn.Module):
  backbone: nn.Module

  @nn.compact
  def __call__(self, image, valid, train=False):
    x = self.backbone.features(image, mask=valid, train=train)["stage1"]
    logits = nn.Dense(3, name="head")(x)
    return logits.repeat(4, 1).repeat(4, 2)


class Squares:
  """Pictures with one square, red, green or blue; black is class 0."""

  n_examples = 12

  def __init__(self, padding=0, canvases=CANVASES):
    self._padding, self._canvases = padding, canvases

  def _batch(self, first, canvas):
    batch = {"image": np.full((8, *canvas, 3), self._padding, np.uint8),
             "label": np.zeros((8, *canvas), np.int32),
             "valid": np.zeros((8, *canvas), bool)}
    for place, i in enumerate(range(first, first + 8)):
      rng = np.random.default_rng(i % self.n_examples)
      image, label, valid = (x[place] for x in batch.values())
      height, width = (side - 4 * rng.integers(3) for side in canvas)
      # On the grid of the model's output, which has a stride of 4.
      y, x = (4 * rng.integers((side - 4) // 4) for side in (height, width))
      colour = i % 2
      image[:height, :width] = 0
      image[y:y + 8, x:x + 8, colour] = 255
      label[y:y + 8, x:x + 8] = colour + 1
      valid[:height, :width] = True
    return batch

  def train_batches(self, position):
    while True:
      step = position // 8
      yield self._batch(position, self._canvases[step % 2])
      position += 8

  def eval_batches(self):
    for first in (0, 8):
      batch = self._batch(first, CANVASES[first // 8])
      batch["valid"] &= (np.arange(8) + first < self.n_examples)[:, None, None]
      yield batch


class PixelAccuracy:
  def reset(self):
    self._sums = np.zeros(2)

  def statistics(self, logits, batch):
    right = (logits.argmax(-1) == batch["label"]) & batch["valid"]
    return jnp.stack([right.sum(), batch["valid"].sum()])

  def update(self, statistics):
    self._sums += statistics

  def result(self):
    return {"pixel_accuracy": self._sums[0] / self._sums[1],
            "n_pixels": int(self._sums[1])}


class DenseTask:
  rng_names = ("dropout", "drop_path")

  def __init__(self, data=None):
    make = functools.partial(registry.create_model, "poolformer_s12", **MODEL)
    self.model = DenseModel(make(num_classes=0))
    self.pretrained = base.Backbone("poolformer", "backbone", CANVASES[0],
                                    make(num_classes=10))
    self._data = data or Squares()

  def init_inputs(self):
    return (jnp.zeros((1, *CANVASES[0], 3)), jnp.ones((1, *CANVASES[0]), bool))

  def train_batches(self, batch_size):
    struct = jax.ShapeDtypeStruct
    return [{"image": struct((batch_size, *canvas, 3), jnp.uint8),
             "label": struct((batch_size, *canvas), jnp.int32),
             "valid": struct((batch_size, *canvas), jnp.bool_)}
            for canvas in CANVASES]

  def predict(self, variables, batch, **kwargs):
    return self.model.apply(variables, batch["image"].astype(jnp.float32) / 255,
                            batch["valid"], **kwargs)

  def loss(self, variables, batch, rngs, train):
    logits = self.predict(variables, batch, train=train, rngs=rngs)
    loss = optax.softmax_cross_entropy_with_integer_labels(
        logits, batch["label"]).mean(where=batch["valid"])
    return loss, {"loss": loss}, {}

  def make_data(self, split):
    return self._data

  def make_evaluators(self):
    return {"pixels": PixelAccuracy()}
