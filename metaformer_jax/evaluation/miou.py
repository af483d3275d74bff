"""Mean intersection over union, from the confusion matrix of all pixels."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class MeanIoU:
  """The measures of mmsegmentation, over all pixels of the data set together.

  A class's IoU is the number of pixels that are of the class and predicted as
  such, over those of which either is true; its accuracy is that number over the
  pixels of the class. The means leave out classes for which the ratio is 0 / 0:
  those that are neither present nor predicted, and for the accuracy those that
  are not present. Source: mmseg/core/evaluation/metrics.py, `eval_metrics`.
  """

  def __init__(self, num_classes: int, names: Sequence[str] | None = None):
    """`names` are for the table; None numbers the classes."""
    self._n = num_classes
    self._names = names or [str(i) for i in range(num_classes)]
    self.reset()

  def reset(self) -> None:
    self._confusion = np.zeros((self._n, self._n), np.int64)
    self._n_examples = 0

  def statistics(self, outputs: jax.Array, batch) -> dict[str, jax.Array]:
    """Counts the pixels of each (label, prediction).

    Args:
      outputs: predicted classes, integers [B, H, W].
      batch: "label", integers [B, H, W], of which those that are not a class
        do not count; "mask", bool [B], false for what is not an example.

    Raises:
      ValueError: int32 could overflow.
    """
    label, n = batch["label"], self._n
    if label.size >= 2**31:
      raise ValueError(f"a batch of {label.size} pixels is too large to count; "
                       "reduce config.eval.batch_size")
    valid = (label < n) & batch["mask"][:, None, None]
    cell = label.astype(jnp.int32) * n + outputs.astype(jnp.int32)
    # The counts of each image, so that each device counts its own.
    cell = jnp.where(valid, cell, n * n).reshape(len(label), -1)
    counts = jax.vmap(
        lambda cells: jnp.zeros(n * n + 1, jnp.int32).at[cells].add(1))(cell)
    return {"confusion": counts.sum(0)[:-1].reshape(n, n),
            "n_examples": batch["mask"].sum()}

  def update(self, statistics: dict[str, np.ndarray]) -> None:
    self._confusion += statistics["confusion"]
    self._n_examples += int(statistics["n_examples"])

  def _ratios(self) -> tuple[np.ndarray, np.ndarray]:
    """IoU and accuracy of each class; NaN where they are 0 / 0."""
    right = self._confusion.diagonal().astype(np.float64)
    present, predicted = self._confusion.sum(1), self._confusion.sum(0)
    with np.errstate(invalid="ignore"):
      return right / (present + predicted - right), right / present

  def result(self) -> dict[str, float]:
    """The means; NaN if no pixel counts."""
    total = self._confusion.sum()
    iou, accuracy = map(_mean, self._ratios())
    pixels = self._confusion.trace() / total if total else np.nan
    return {"miou": iou, "mean_accuracy": accuracy,
            "pixel_accuracy": float(pixels), "n_examples": self._n_examples}

  def table(self) -> list[dict[str, Any]]:
    """IoU and accuracy of each class, None where undefined; and its pixels."""
    pixels = self._confusion.sum(1)
    return [{"class": i, "name": self._names[i], "iou": _defined(iou),
             "accuracy": _defined(accuracy), "pixels": int(pixels[i])}
            for i, (iou, accuracy) in enumerate(zip(*self._ratios()))]


def _mean(ratios: np.ndarray) -> float:
  defined = ratios[~np.isnan(ratios)]
  return float(defined.mean()) if len(defined) else float("nan")


def _defined(ratio: float) -> float | None:
  return None if np.isnan(ratio) else float(ratio)
