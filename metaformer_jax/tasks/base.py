"""What the training loop asks of a task. A protocol: nothing to inherit."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from flax import linen as nn

Variables = Mapping[str, Any]
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class Data(Protocol):
  """A split of a data set; `metaformer_jax.data.loader.Loader` is one.

  Batches may have "replaced", bool [b]: true where an example could not be
  used. In training another is in its place; in evaluation "mask" is false.
  """

  @property
  def n_examples(self) -> int: ...

  def train_batches(self, position: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of each batch from `position` on; endless."""

  def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
    """Each example once; "mask" is false where the last batch is filled up."""


class Evaluator(Protocol):
  """One measure over an evaluation split; made anew for each evaluation."""

  def statistics(self, outputs: Any, batch: Batch) -> Any:
    """What `update` needs of one global batch. Traced: jax only."""

  def update(self, statistics: Any) -> None:
    """Adds the statistics of a batch, as numpy arrays; on every process."""

  def result(self) -> dict[str, float]:
    """The measures over all that was added."""


class Task(Protocol):
  """A model, its data, its loss and its measures."""

  model: nn.Module

  def init_inputs(self) -> tuple[Any, ...]:
    """The arguments that `model.init` is traced with."""

  def train_batch(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
    """What the training data's batches are, of all processes together."""

  def loss(self, variables: Variables, batch: Batch,
           rngs: Mapping[str, jax.Array], train: bool,
           ) -> tuple[jax.Array, Metrics, Variables]:
    """The mean loss over the global batch.

    Returns:
      The loss; scalars to log, "loss" among them; and the new value of every
      collection of `variables` but "params".
    """

  def predict(self, variables: Variables, batch: Batch) -> Any:
    """What the evaluators measure."""

  def make_data(self, split: str) -> Data:
    """Opens "train" or "eval"."""

  def make_evaluators(self) -> dict[str, Evaluator]:
    """Fresh evaluators by name."""
