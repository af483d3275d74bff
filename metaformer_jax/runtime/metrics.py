"""Means of the training metrics over the steps between two log records."""

import statistics
from collections.abc import Mapping


class Window:
  """Collects the scalars of steps, and returns their means."""

  def __init__(self):
    self._steps: list[dict[str, float]] = []

  def add(self, scalars: Mapping[str, float]) -> None:
    """Adds the scalars of one step; all steps have the same names."""
    self._steps.append({name: float(x) for name, x in scalars.items()})

  def means(self) -> dict[str, float]:
    """The means since the last call; empty if nothing was added."""
    steps, self._steps = self._steps, []
    return {name: statistics.fmean(step[name] for step in steps)
            for name in (steps[0] if steps else ())}
