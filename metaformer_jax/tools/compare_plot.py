"""The curves of several runs over one another."""

import dataclasses
import itertools
import math
import pathlib
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metaformer_jax.tools import compare

# Points of a curve that are drawn, at most.
_MAX_POINTS = 1000

_COLUMNS = 3  # Of the picture.
_LINES = ("-", "--", ":", "-.")

# More digits would be wider than a picture.
_LARGEST = 1e30


@dataclasses.dataclass(frozen=True)
class Panel:
  """A picture of one metric.

  Attributes:
    task: of its runs, which are compared with each other only.
    split, metric: what is drawn.
    curves: (run's index, its (step, value) pairs).
  """

  task: str
  split: str
  metric: str
  curves: Sequence[tuple[int, Sequence[tuple[int, float]]]]

  @property
  def title(self) -> str:
    return f"{self.split} {self.metric.replace('_', ' ')}"


def color(index: int) -> str:
  """Of a run, by its index: those of matplotlib's cycle."""
  return matplotlib.color_sequences["tab10"][index % 10]


def panels(runs: Sequence[compare.Run]) -> list[Panel]:
  """The loss, the measures and the learning rate, for each task."""
  found = []
  for task in dict.fromkeys(run.cfg.task.name for run in runs):
    same = [(i, run) for i, run in enumerate(runs)
            if run.cfg.task.name == task]
    measures = dict.fromkeys(
        measure.name for _, run in same for measure in run.measures)
    for split, metric in (("train", "loss"), *(
        ("eval", name) for name in measures), ("train", "learning_rate")):
      curves = [(i, _points(run.values(split, metric))) for i, run in same]
      curves = [(i, points) for i, points in curves if points]
      if curves:
        found.append(Panel(task, split, metric, curves))
  return found


def _points(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
  """What can be drawn: finite values, not more than a screen shows."""
  found = [(step, float(value)) for step, value in values
           if math.isfinite(value) and abs(value) < _LARGEST]
  stride = math.ceil(len(found) / _MAX_POINTS)
  return [*found[:-1:stride], found[-1]] if stride > 1 else found


def draw(runs: Sequence[compare.Run], found: Sequence[Panel],
         path: pathlib.Path) -> None:
  """Draws all panels as one PNG."""
  columns = min(_COLUMNS, max(1, len(found)))
  rows = math.ceil(max(1, len(found)) / columns)
  height = 3 * rows + 0.25 * math.ceil(len(runs) / columns) + 0.2
  figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
  FigureCanvasAgg(figure)
  grid = figure.subplots(rows, columns, squeeze=False)
  several = len({panel.task for panel in found}) > 1
  for axes, panel in itertools.zip_longest(grid.flat, found):
    if panel is None:
      axes.axis("off")
      continue
    _draw_panel(axes, panel, f"{panel.task}: " if several else "")
  handles = [grid[0][0].plot([], [], color=color(i), linestyle=_line(i))[0]
             for i in range(len(runs))]
  figure.legend(handles, [_plain(run.name) for run in runs], frameon=False,
                loc="outside upper left", ncols=columns, fontsize=9)
  with _quiet():
    figure.savefig(path, dpi=80)


def write_svg(panel: Panel, file: BinaryIO) -> None:
  """Writes one panel as SVG."""
  figure = Figure(figsize=(4.2, 3), layout="constrained")
  FigureCanvasAgg(figure)
  _draw_panel(figure.subplots(), panel)
  with _quiet():
    figure.savefig(file, format="svg", metadata={"Date": None})


def _draw_panel(axes: Axes, panel: Panel, start: str = "") -> None:
  for i, points in panel.curves:
    few = panel.split == "eval" and len(points) <= 50
    # Wider below, so that a curve under another one is seen.
    axes.plot(*zip(*points), color=color(i), linestyle=_line(i),
              linewidth=max(1.2, 2.8 - 0.5 * i),
              marker="o" if few or len(points) == 1 else "", markersize=3)
  axes.set_title(_plain(start + panel.title), fontsize=10)
  axes.set_xlabel("step", fontsize=9)
  axes.tick_params(labelsize=8)
  axes.grid(alpha=0.3)


def _line(index: int) -> str:
  """Runs with the same colour differ by the line."""
  return _LINES[index // 10 % len(_LINES)]


def _plain(text: str) -> str:
  """A text of a run: no formula, and not too wide."""
  text = text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}"
  return text.replace("$", r"\$")


def _quiet() -> warnings.catch_warnings:
  """Within it, characters that the font lacks are boxes without a warning."""
  return warnings.catch_warnings(action="ignore", category=UserWarning)
