"""The picture of a study: a line for each variant, the best at the top."""

import pathlib
import statistics
from collections.abc import Sequence
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metaformer_jax.config.tasks import Measure

_DOT, _MEAN, _PUBLISHED, _BAR = "#5b9bd5", "#1f3d63", "#c0392b", "#cfd8e3"

# With this many variants or more, a mean that is further from the median than
# so many median deviations is drawn at the edge, or the others would be one
# dot. Its value is beside it.
_MANY, _FAR = 5, 12


def draw(rows: Sequence[dict[str, Any]], measure: Measure, title: str,
         target: pathlib.Path | IO[bytes]) -> None:
  """Draws the rows of `study.collect` as a PNG, into a file.

  Left: a dot for each seed, a bar and a number for their mean, a cross for the
  published value. Right: parameters and MACs. Variants of which every run has
  diverged are at the bottom.
  """
  key = measure.name
  done = sorted((row for row in rows if row[key]),
                key=lambda row: statistics.mean(row[key]),
                reverse=measure.higher_is_better)
  rows = [*done, *(row for row in rows if not row[key])]
  figure = Figure(figsize=(11, 1.3 + 0.3 * max(1, len(rows))),
                  layout="constrained")
  FigureCanvasAgg(figure)
  axes, *costs = figure.subplots(1, 3, sharey=True, width_ratios=(3.2, 1, 1))
  low, high = _limits([row[key] for row in done])
  if any(row["published"] is not None for row in done):
    high += 0.2 * (high - low)  # For "published 81.0" beside a mark.
  for y, row in enumerate(rows):
    _draw_row(axes, y, row[key], row["published"], low, high)
  axes.set_xlim(low, high)
  axes.set_ylim(len(rows) - 0.4, -0.6)
  axes.set_yticks(range(len(rows)), [_short(row["variant"]) for row in rows])
  axes.set_xlabel(title + (
      ", percent" if measure.is_fraction else "")
      + ("" if measure.higher_is_better else " (lower is better)"))
  axes.grid(alpha=0.3)
  axes.set_axisbelow(True)
  if axes.get_legend_handles_labels()[0]:
    figure.legend(*_unique(axes), loc="outside upper right", ncols=4,
                  fontsize=8, frameon=False)
  for axis, cost, label in zip(costs, ("n_params", "macs"),
                               ("parameters", "MACs of one image")):
    _draw_costs(axis, [float(row[cost]) for row in rows], label)
  figure.savefig(target, format="png", dpi=90)


def _limits(found: Sequence[Sequence[float]]) -> tuple[float, float]:
  """The range of the axis, with room for the numbers beside the marks."""
  if not found:
    return 0.0, 1.0
  means = [statistics.mean(values) for values in found]
  middle = statistics.median(means)
  reach = _FAR * statistics.median(abs(mean - middle) for mean in means)
  shown = [values for values, mean in zip(found, means)
           if len(means) < _MANY or not reach or abs(mean - middle) <= reach]
  least, most = min(map(min, shown)), max(map(max, shown))
  room = (most - least) or abs(most) * 0.1 or 1.0
  return least - 0.12 * room, most + 0.25 * room


def _draw_row(axes: Axes, y: int, values: Sequence[float],
              published: float | None, low: float, high: float) -> None:
  """The marks of one variant, and their numbers."""
  has_cross = published is not None and low <= published <= high
  note = "" if published is None or has_cross else (
      f"   published {published:.1f}")
  if not values:
    axes.annotate("diverged", (low, y), xytext=(8, 0), va="center",
                  textcoords="offset points", fontsize=8, color="0.4")
    return
  mean = statistics.mean(values)
  is_inside = low <= mean <= high
  if is_inside:
    axes.plot(values, [y] * len(values), "o", color=_DOT, alpha=0.7,
              markersize=6, markeredgewidth=0, label="a seed")
    axes.plot(mean, y, "|", color=_MEAN, markersize=13, markeredgewidth=2,
              label="mean")
    right = max(values)
  else:
    right = low if mean < low else high
    axes.plot(right, y, "<" if mean < low else ">", color=_MEAN, markersize=7,
              clip_on=False, label="beyond the axis")
  if has_cross:
    axes.plot(published, y, "x", color=_PUBLISHED, markersize=6,
              label="published")
    right = max(right, published) if is_inside else right
  at_right = mean > high
  axes.annotate(f"{mean:.2f}{note}", (right, y), va="center", fontsize=8,
                xytext=(-8 if at_right else 8, 0), textcoords="offset points",
                ha="right" if at_right else "left")


def _draw_costs(axes: Axes, values: Sequence[float], label: str) -> None:
  """A bar and a number for each variant."""
  axes.barh(range(len(values)), values, height=0.6, color=_BAR)
  most = max(values, default=1) or 1
  for y, value in enumerate(values):
    axes.text(0.03 * most, y, _count(value), va="center", fontsize=8)
  axes.set_xlim(0, 1.02 * most)
  axes.set_xticks([])
  axes.set_xlabel(label)
  axes.tick_params(left=False)
  axes.spines[:].set_visible(False)


def _count(value: float) -> str:
  """11.9 M"""
  for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
    if value >= unit:
      return f"{value / unit:.3g} {letter}"
  return f"{value:g}"


def _short(name: str) -> str:
  """A name that leaves room for the marks."""
  return name if len(name) <= 48 else f"{name[:30]}...{name[-15:]}"


def _unique(axes: Axes) -> tuple[list[Any], list[str]]:
  """Each mark of the legend once."""
  found = dict(zip(*reversed(axes.get_legend_handles_labels())))
  return list(found.values()), list(found)
