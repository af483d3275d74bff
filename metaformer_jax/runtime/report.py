"""What the user sees of a run: the plan at its start, then its progress."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Container, Iterator, Sequence

import jax
import tqdm
from clu import parameter_overview
from tqdm.contrib import logging as tqdm_logging

from metaformer_jax.config.schema import Experiment
from metaformer_jax.runtime import sharding

log = logging.getLogger(__name__)

# Of the first screen.
_WIDTH = 80

# Modules that it shows; more are summed up.
_MODULES = 10


def plan(cfg: Experiment, abstract_state, frozen: Container[str], mesh,
         n_train: int, n_eval: int, total_steps: int,
         table: pathlib.Path) -> str:
  """The first screen: a summary of the run, and of its parameters.

  `frozen` has the paths of those that are not trained; `table` is the file that
  lists all.
  """
  params, train = abstract_state.params, cfg.train
  n_params = sum(x.size for x in jax.tree.leaves(params))
  device = mesh.devices.flat[0]
  size = cfg.task.input_size
  n_processes, n_classes = jax.process_count(), cfg.task.num_classes
  summary = _table({
      "model": f"{cfg.model.name}, {n_params:,} parameters, {cfg.model.dtype}",
      "data": f"{cfg.data.source}: {n_train:,} to train, {n_eval:,} to "
              "evaluate" + (f", {size[0]}x{size[1]}" if size else "")
              + (f", {n_classes:,} classes" if n_classes else ""),
      "steps": f"{total_steps:,} of {train.batch_size} images"
               + (f" in {train.accumulate} micro-batches"
                  if train.accumulate > 1 else "")
               + f", {total_steps * train.batch_size / n_train:.4g} epochs",
      "devices": f"{mesh.size} x {device.device_kind}, {n_processes} process"
                 f"{'es' if n_processes > 1 else ''}, mesh "
                 + " x ".join(f"{k}={v}" for k, v in mesh.shape.items()),
      "state": f"{sharding.n_bytes(abstract_state) / 2**20:,.1f} MiB in all",
      "learning rate": f"{cfg.optim.base_lr * train.batch_size / 1024:.4g} at "
                       "the peak",
  })
  return f"{summary}\n\n{modules(params, frozen)}\n\nall parameters: {table}"


def _table(rows: dict[str, str]) -> str:
  """Names and values, in two columns that fit the first screen."""
  width = max(map(len, rows)) + 2
  return "\n".join(textwrap.fill(
      value, _WIDTH, initial_indent=name.ljust(width),
      subsequent_indent=" " * width, break_long_words=False,
      break_on_hyphens=False) for name, value in rows.items())


def modules(params, frozen: Container[str] = ()) -> str:
  """The parameters of each top-level module, in at most ten lines.

  Args:
    params: the parameters, or their shapes.
    frozen: paths of those that are not trained.
  """
  found = _named(params)
  tops = list(dict.fromkeys(name.partition("/")[0] for name, _ in found))
  label = {top: top for top in tops}
  if len(tops) > _MODULES:  # Numbered ones in one line: block1 to block12.
    stems = {top: top.rstrip("0123456789") for top in tops}
    for top in tops:
      same = [t for t in tops if t != stems[t] == stems[top]]
      if top in same and len(same) > 1:
        label[top] = f"{same[0]} to {same[-1]}"
  rows = {}
  for name, x in found:
    row = rows.setdefault(label[name.partition("/")[0]], [0, 0])
    row[0] += x.size
    row[1] += x.size if name in frozen else 0
  rows = _largest(rows)
  total = sum(n for n, _ in rows.values())
  width = max(map(len, rows))
  return "\n".join(
      f"{name:<{width}}  {n:>13,}  {n / total:>6.1%}"
      + ("  frozen" if n_fixed == n else "  partly frozen" if n_fixed else "")
      for name, (n, n_fixed) in rows.items())


def _largest(rows: dict[str, list[int]]) -> dict[str, list[int]]:
  """The rows with the most parameters, in order, and the sum of the others."""
  if len(rows) <= _MODULES:
    return rows
  kept = sorted(rows, key=rows.get)[-(_MODULES - 1):]
  others = [row for name, row in rows.items() if name not in kept]
  return {name: row for name, row in rows.items() if name in kept} | {
      f"{len(others)} others": [sum(column) for column in zip(*others)]}


@dataclasses.dataclass(frozen=True)
class _Parameter:
  """A row of parameters.txt."""

  name: str
  shape: tuple[int, ...]
  dtype: str
  size: int
  note: str


def parameters(params, frozen: Container[str] = ()) -> str:
  """A table of all parameters, as in parameters.txt; arguments: `modules`."""
  rows = [_Parameter(name, x.shape, str(x.dtype), x.size,
                     "frozen" if name in frozen else "")
          for name, x in _named(params)]
  total = sum(row.size for row in rows)
  return f"{parameter_overview.make_table(rows)}\nTotal: {total:,}\n"


def _named(params) -> list[tuple[str, jax.ShapeDtypeStruct]]:
  """Paths and arrays, in the order in which networks are drawn."""

  def order(item):
    name = item[0]
    top = name.partition("/")[0]
    place = (3 if top.startswith("head") else 2 if top.startswith("norm")
             else int(top[-1].isdigit()))
    # block2 comes before block10.
    return place, [int(part) if part.isdigit() else part
                   for part in re.split(r"(\d+)", name)]

  return sorted(((sharding.path_name(path), x) for path, x in
                 jax.tree_util.tree_leaves_with_path(params)), key=order)


class Progress:
  """Lines, and on a terminal a bar below them.

  The lines are log records; on a terminal, those of all loggers appear above
  the bar.
  """

  def __init__(self, first_step: int, total_steps: int, names: Sequence[str],
               enabled: bool):
    """`names` are the task's metrics that are shown."""
    self._step, self._total, self._names = first_step, total_steps, names
    self._enabled = enabled
    self._on_terminal = enabled and sys.stderr.isatty()
    self._bar = None
    self._redirection = contextlib.ExitStack()

  def advance(self) -> None:
    """Counts a step; the first one opens the bar, as it is compiled before."""
    self._step += 1
    if not self._on_terminal:
      return
    if self._bar is None:
      # tqdm shows no bar in a terminal of 0 rows, which is one of unknown size.
      self._bar = tqdm.tqdm(total=self._total, initial=self._step,
                            unit="step", ncols=_columns(), nrows=20)
      self._redirection.enter_context(tqdm_logging.logging_redirect_tqdm())
    else:
      self._bar.ncols = _columns()  # The window may have another size now.
      self._bar.update()

  def show(self, step: int, metrics: dict[str, float]) -> None:
    """Shows the metrics of a window."""
    parts = [f"epoch {metrics['epoch']:.2f}"]
    parts += [f"{name} {metrics[name]:.4f}" for name in self._names
              if name in metrics]
    parts += [f"lr {metrics['learning_rate']:.2e}",
              f"{metrics['images_per_second']:.0f} img/s"]
    parts += [f"{name.replace('_', ' ')} {metrics[name]:,}"
              for name in ("skipped_steps", "bad_images") if metrics[name]]
    wait = f"input wait {metrics['input_wait']:.0%}"
    if self._bar is not None:  # Which has the number and the time of steps.
      self._bar.set_postfix_str(wait, refresh=False)
      self._write([f"step {step}", *parts])
    else:
      left = (self._total - step) * metrics["step_seconds"]
      self._write([f"step {step}/{self._total}", *parts, wait,
                   f"eta {tqdm.tqdm.format_interval(left)}"])

  def show_evaluation(self, step: int, result: dict[str, float]) -> None:
    """Shows the measures after a step."""
    self._write([f"step {step}", "eval", *measures(result)])

  def say(self, message: str) -> None:
    """Shows a line."""
    self._write([message])

  def finish(self, result: dict[str, float], *lines: str) -> None:
    """Ends the bar; shows the last measures, and lines below them."""
    self.close()
    first, *others = measures(result) or [""]
    self._write([f"done: {first}", *others])
    for line in lines:
      self.say(line)

  def _write(self, parts: Sequence[str]) -> None:
    if self._enabled:
      log.info("%s", "\n".join(_filled(parts, _columns()))
               if self._on_terminal else "  ".join(parts))

  def close(self) -> None:
    """Ends the bar; nothing happens if that is done."""
    self._redirection.close()
    if self._bar is not None:
      self._bar.close()


def measures(result: dict[str, float]) -> list[str]:
  """The parts of an evaluation's line; without bad images if there are none."""
  return [f"{name} {value:,}" if isinstance(value, int) else
          f"{name} {value:.4f}" for name, value in result.items()
          if (name, value) != ("bad_images", 0)]


def _filled(parts: Sequence[str], width: int) -> Iterator[str]:
  """Puts as many parts on a line as fit; further lines are indented."""
  line, *rest = parts
  for part in rest:
    if len(line) + 2 + len(part) <= width:
      line = f"{line}  {part}"
    else:
      yield line
      line = f"  {part}"
  yield line


def _columns() -> int:
  """Columns of the terminal that can be written without a new line."""
  try:
    columns = os.get_terminal_size(sys.stderr.fileno()).columns
  except (OSError, ValueError):  # Unknown, as of a replaced stream.
    columns = 0
  return max(10, (columns or _WIDTH) - 1)
