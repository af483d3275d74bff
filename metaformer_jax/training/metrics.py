"""Metrics of training steps, on their way from the device to the writers."""

import math
import statistics

import jax

from metaformer_jax import errors


class Window:
  """The metrics since the last `means`, fetched from the device a step late."""

  def __init__(self):
    self._pending = None
    self._fetched = []

  def add(self, i: int, metrics) -> None:
    """Takes the metrics of step i; waits for those of the step before."""
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
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not math.isfinite(metrics["loss"]):
      raise errors.DivergedError(
          f"the loss of step {i} is {metrics['loss']}; lower "
          "config.optim.base_lr, or set config.optim.clip_norm=1.0")
    self._fetched.append(metrics)

  def is_due(self, i: int, every: int) -> bool:
    """Whether there is something to log, and step i is one to log at."""
    return bool(self._fetched) and i % every == 0

  def means(self) -> dict[str, float]:
    """Means since the last call; of the learning rate, the last value."""
    names = self._fetched[-1]
    means = {k: statistics.fmean(m[k] for m in self._fetched) for k in names}
    means["learning_rate"] = names["learning_rate"]
    self._fetched = []
    return means
