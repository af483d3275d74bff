"""The protocol between a task and the rest; there is nothing to inherit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import linen as nn
from PIL import Image

Variables = Mapping[str, Any]
Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
Rows = list[dict[str, Any]]


def signature(batch: Batch) -> tuple:
  """What tells the shapes of batches apart."""
  return tuple(sorted((name, tuple(x.shape), str(x.dtype))
                      for name, x in batch.items()))


class Data(Protocol):
  """A split of a data set; `metaformer_jax.data.loader.Loader` is one.

  Batches may have "replaced", bool [b]: true where an example was unusable. In
  training another one takes its place; in evaluation "mask" is false.
  """

  @property
  def n_examples(self) -> int: ...

  def train_batches(self, position: int) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of each batch from `position` on; endless."""

  def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
    """Each example once; "mask" is false where the last batch is padded."""

  def check(self) -> None:
    """Prepares one example in this process; raises what is wrong with it."""

  def fingerprint(self) -> dict[str, Any]:
    """What tells the data set from others, JSON values by what they are.

    It must be the same on all processes and when a run is resumed. It need not
    be there, and neither need the methods below.
    """

  def layout(self) -> dict[str, Any]:
    """What else all processes must agree on, of how batches are made."""

  def start_workers(self) -> Callable[[], None]:
    """Starts what `train_batches` will need; returns what ends it."""


class Evaluator(Protocol):
  """A measure over an evaluation split; made once per run, reset before use."""

  def reset(self) -> None:
    """Forgets what was added."""

  def statistics(self, outputs: Any, batch: Batch) -> Any:
    """What `update` needs of one global batch. Traced: jax only."""

  def update(self, statistics: Any) -> None:
    """Adds the statistics of a batch, as numpy arrays; on every process."""

  def result(self) -> dict[str, float]:
    """The measures over all that was added."""

  def table(self) -> Rows:
    """Measures in more detail, by class for example; it need not have them."""

  def predictions(self) -> Rows:
    """What was predicted, as JSON that other tools read; it need not have it.

    Its examples are named as the data names them.
    """


class Backbone(NamedTuple):
  """Where a task's model holds a network of the model table.

  Warm start, layer-wise decay and the rules of weight decay find it by this.

  Attributes:
    family: of the conversion rules for its weights (`ModelSpec.family`); None
      for a model of the user's own, whose weights have our names only.
    path: of its module in the variables of `Task.model`, as "backbone"; empty
      if it is the whole model.
    input_size: height and width of the images that it is initialised with.
    classifier: the same network with the head that files of weights have.
  """

  family: str | None
  path: str
  input_size: tuple[int, int]
  classifier: nn.Module


# What a run asks of a task; `preprocess`, `postprocess` and `describe` are for
# tools, and so are the methods after them, which a task need not have.
REQUIRED = ("model", "pretrained", "rng_names", "init_inputs", "train_batches",
            "loss", "predict", "make_data", "make_evaluators")


class Task(Protocol):
  """A model, its data, its loss and its measures.

  Attributes:
    model: the network.
    pretrained: the part of it that weights can be loaded into; None if there is
      none.
    rng_names: the random streams of `loss`.
    family: of the conversion rules for all weights, if the backbone is a part
      of the model; need not be there.
  """

  model: nn.Module
  pretrained: Backbone | None
  rng_names: Sequence[str]

  def init_inputs(self) -> tuple[Any, ...]:
    """The arguments that `model.init` is traced with."""

  def train_batches(self, batch_size: int,
                    ) -> Sequence[Mapping[str, jax.ShapeDtypeStruct]]:
    """The shapes of a global training batch, one for each that can occur.

    The training step is compiled once for each of them.
    """

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
    """The evaluators by name; no two of them may report the same measure."""

  def preprocess(self, image: bytes | np.ndarray) -> dict[str, np.ndarray]:
    """An image, encoded or uint8 [H, W, 3], as an example without its batch.

    Raises:
      Exception: of many types, as Pillow's are: the image is not usable.
    """

  def postprocess(self, outputs: Any,
                  example: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What `predict` gave for one example, without its batch, for a user.

    `example` is that of `preprocess`.
    """

  def describe(self, found: Mapping[str, Any], top: int) -> Rows:
    """What `postprocess` gave, as the rows of a table.

    Args:
      found: of one image.
      top: the number of rows, at most.

    Returns:
      Rows of plain values with the same keys, the most certain one first.
    """

  def pictures(self, found: Mapping[str, Any], image: bytes | np.ndarray,
               ) -> dict[str, Image.Image]:
    """What `postprocess` gave, as pictures for a user.

    Args:
      found: of one image.
      image: that image, as for `preprocess`.

    Returns:
      Pictures by name, "overlay" for example.
    """

  def truth(self, record: Mapping[str, Any]) -> dict[str, Any]:
    """What a record of the data says of its image, as `postprocess` gives it.

    Raises:
      Exception: of many types; the record is not usable.
    """

  def training_examples(
      self, batch: Batch, rngs: Mapping[str, jax.Array] | None = None,
  ) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """A batch of training as a user sees it.

    Args:
      batch: of the training transform.
      rngs: those of the loss, for what the step does to the batch on the
        device; None for what it is given.

    Returns:
      For each example its image, uint8 [H, W, 3], without padding, and its
      targets, as `postprocess` gives predictions.
    """

  def drawn(self, found: Mapping[str, Any], image: np.ndarray, factor: int = 1,
            legend: bool = True) -> Image.Image:
    """What `postprocess` or `truth` gave, on the image.

    A task without it has nothing to draw; `describe` says it in words.

    Args:
      found: of one image.
      image: uint8 [H, W, 3].
      factor: by which the image is enlarged first, so that text is legible.
      legend: whether the names of colours are beside it.
    """

  def annotations(self, found: Mapping[str, Any]) -> dict[str, Rows]:
    """What `postprocess` gave for one image, as a COCO data set.

    Args:
      found: of the image.

    Returns:
      {"images": one row, "width" and "height"; "categories": "id" and "name" of
      each class, for all images the same; "annotations": one row for each
      object, "category_id", "bbox", ...}, JSON. Who joins the data sets of
      several images adds the "id" and "file_name" of images, and the "id" and
      "image_id" of annotations.
    """
