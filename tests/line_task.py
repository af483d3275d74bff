"""A small task without images: fit y = 3 x."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from metaformer_jax.config import tasks


@dataclasses.dataclass(frozen=True)
class Section(tasks.Task):
  """Its section in an experiment."""

  MEASURES = (tasks.Measure("score", True), tasks.Measure("error", False))

  name: str = "line"


class Line(nn.Module):
  """y = a x, with a batch statistic: the mean of what it saw last."""

  @nn.compact
  def __call__(self, x, train=False):
    seen = self.variable("batch_stats", "mean", jnp.zeros, ())
    if train:
      seen.value = x.mean()
    return self.param("a", nn.initializers.constant(2.0), (1,)) * x


class Points:
  """The data: x = 0, 1, ..., 9, repeated, in batches of eight."""

  n_examples = 10

  def train_batches(self, position):
    while True:
      yield {"x": np.arange(position, position + 8, dtype=np.float32) % 10}
      position += 8

  def eval_batches(self):
    for first in (0, 8):
      x = np.arange(first, first + 8, dtype=np.float32)
      yield {"x": x, "mask": x < 10}


class Error:
  """The evaluator: the mean absolute error, and its negative to rank by."""

  def __init__(self):
    self.reset()

  def reset(self):
    self._sum, self._n = 0.0, 0

  def statistics(self, outputs, batch):
    error = jnp.abs(outputs - 3 * batch["x"])
    return (error * batch["mask"]).sum(), batch["mask"].sum()

  def update(self, statistics):
    self._sum, self._n = (self._sum + float(statistics[0]),
                          self._n + int(statistics[1]))

  def result(self):
    return {"error": self._sum / self._n, "score": -self._sum / self._n,
            "n_examples": self._n}


class LineTask:
  """The task."""

  model = Line()
  pretrained = None
  rng_names = ()

  def init_inputs(self):
    return (jnp.zeros((4,)),)

  def train_batches(self, batch_size):
    return [{"x": jax.ShapeDtypeStruct((batch_size,), jnp.float32)}]

  def loss(self, variables, batch, rngs, train):
    y, updates = self.model.apply(variables, batch["x"], train=train,
                                  mutable=["batch_stats"])
    loss = jnp.square(y - 3 * batch["x"]).mean()
    return loss, {"loss": loss}, updates

  def predict(self, variables, batch):
    return self.model.apply(variables, batch["x"])

  def make_data(self, split):
    return Points()

  def make_evaluators(self):
    return {"error": Error()}
