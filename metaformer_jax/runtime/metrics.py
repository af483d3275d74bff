"""Metrics of training steps, on their way from the device to the writers."""

import logging
import statistics
from collections.abc import Sequence

import jax
import numpy as np

from metaformer_jax import errors
from metaformer_jax.runtime.accounting import Totals

log = logging.getLogger(__name__)

# How many tensors, and how many skipped steps, are named.
_NAMED = 3
_TOLD = 10


class Window:
  """The metrics since the last `means`, fetched from the device a step late.

  Attributes:
    stop: of the last fetched step, the signal that told a process to end, or 0.
  """

  def __init__(self, checked: Sequence[str], max_skipped: int, totals: Totals):
    """`checked` names the entries of "finite" (`step.train_step`)."""
    self._checked, self._max_skipped = checked, max_skipped
    self._totals = totals
    self._pending = None
    self._fetched = []  # A dict of each step, without what is not finite.
    self._first_bad = None  # Of those in a row: (step, what was not finite).
    self._n_told = 0
    self.stop = 0

  def add(self, i: int, metrics) -> None:
    """Takes the metrics of step i; waits for those of the step before.

    Raises:
      DivergedError: `max_skipped` steps in a row were not finite.
    """
    pending, self._pending = self._pending, (i, metrics)
    self._fetch(pending)

  def flush(self) -> None:
    """Waits for the metrics of the last step too."""
    pending, self._pending = self._pending, None
    self._fetch(pending)

  def _fetch(self, pending) -> None:
    if pending is None:
      return
    i, metrics = pending
    metrics = jax.device_get(metrics)
    self.stop = int(metrics.pop("stop"))
    self._totals["bad_images"] += int(metrics.pop("bad_images"))
    finite = metrics.pop("finite")
    if finite.all():
      self._first_bad = None
      self._fetched.append({k: float(v) for k, v in metrics.items()})
    else:
      self._fetched.append({"learning_rate": float(metrics["learning_rate"])})
      self._skipped(i, name_all(self._checked, finite))

  def _skipped(self, i: int, what: str) -> None:
    self._totals["skipped_steps"] += 1
    self._first_bad = self._first_bad or (i, what)
    since, first = self._first_bad
    if i - since + 1 >= self._max_skipped:
      raise errors.DivergedError(
          f"no step from {since} to {i} was finite, in the first not {first}; "
          "lower config.optim.base_lr, or set config.optim.clip_norm=1.0; the "
          "last checkpoint is from before")
    self._n_told += 1
    if self._n_told <= _TOLD:
      log.warning("step %d is skipped: not finite: %s%s", i, what,
                  "; further ones are only counted"
                  if self._n_told == _TOLD else "")

  def is_due(self, i: int, every: int) -> bool:
    """Whether there is something to log, and step i is one to log at."""
    return bool(self._fetched) and i % every == 0

  def means(self) -> dict[str, float]:
    """Means since the last call, over the steps that were not skipped.

    Of the learning rate, the last value. Counts are those of the whole run.
    """
    fetched, self._fetched = self._fetched, []
    good = [m for m in fetched if len(m) > 1]
    means = {k: statistics.fmean(m[k] for m in good) for k in good[0]
             } if good else {}
    return means | {
        "learning_rate": fetched[-1]["learning_rate"],
        "skipped_steps": self._totals["skipped_steps"],
        "bad_images": self._totals["bad_images"]}


def name_all(names: Sequence[str], finite: np.ndarray) -> str:
  """Names what is not finite: the first few, and how many more there are."""
  bad = [name for name, ok in zip(names, finite, strict=True) if not ok]
  more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
  return ", ".join(bad[:_NAMED]) + more
