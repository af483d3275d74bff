"""What a run leaves besides checkpoints: metrics, TensorBoard, curves, summary.

Everything is derived from `metrics.jsonl`, a record a line: {"step", "split",
...}. When a run resumes, records after the restored step are dropped, as the
steps are made again.
"""

import contextlib
import json
import os
import pathlib
from typing import Any

from metaformer_jax import errors, experiment

Record = dict[str, Any]


class Writer:
  """Writes the metrics of a run, if enabled: by the first process only."""

  def __init__(self, workdir: pathlib.Path, cfg: experiment.Log,
               restored_step: int, enabled: bool):
    self._workdir = workdir
    self._file = self._events = None
    self.records: list[Record] = []
    if not enabled:
      return
    path = workdir / "metrics.jsonl"
    self.records = [r for r in read(path) if r["step"] <= restored_step]
    # Written beside and renamed: a kill leaves the old or the new file.
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(_line(r) for r in self.records))
    beside.replace(path)
    self._file = path.open("a")
    if cfg.tensorboard:
      from tensorboardX import SummaryWriter  # noqa: PLC0415  Slow to import.

      self._events = SummaryWriter(
          str(workdir / "tensorboard"), purge_step=restored_step + 1)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Adds a record and its TensorBoard scalars; on disk when it returns."""
    if self._file is None:
      return
    record = {"step": step, "split": split, **metrics}
    self.records.append(record)
    with _storing(self._workdir):
      self._file.write(_line(record))
      self._file.flush()
      os.fsync(self._file.fileno())  # It outlives the machine.
    if self._events is not None:
      for name, value in metrics.items():
        self._events.add_scalar(f"{split}/{name}", value, step)

  def finish(self, summary: dict[str, Any]) -> pathlib.Path | None:
    """Writes summary.json and curves.png; returns the path of the picture."""
    if self._file is None:
      return None
    with _storing(self._workdir):
      path = self._workdir / "summary.json"
      path.write_text(json.dumps(summary, indent=2) + "\n")
      return draw_curves(self.records, self._workdir / "curves.png")

  def close(self) -> None:
    for stream in (self._file, self._events):
      if stream is not None:
        with contextlib.suppress(OSError):  # Told when it was written.
          stream.close()


@contextlib.contextmanager
def _storing(workdir: pathlib.Path):
  try:
    yield
  except OSError as e:
    raise errors.StorageError(
        f"{workdir}: cannot be written: {e.strerror}; once there is room, the "
        "same command goes on from the last checkpoint") from e


def read(path: pathlib.Path) -> list[Record]:
  """The records of a metrics.jsonl; a line cut off by a kill is left out."""
  if not path.is_file():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def _line(record: Record) -> str:
  return json.dumps(record) + "\n"


def draw_curves(records: list[Record], path: pathlib.Path) -> pathlib.Path:
  """Draws loss, top-1 and learning rate against the step as a PNG."""
  # The object interface: no global state, no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
  from matplotlib.figure import Figure  # noqa: PLC0415

  figure = Figure(figsize=(12, 3.5), layout="constrained")
  FigureCanvasAgg(figure)
  names = ("loss", "top1", "learning_rate")
  for axes, name in zip(figure.subplots(1, len(names)), names):
    for split, marker in (("train", ""), ("eval", "o")):
      points = [(r["step"], r[name]) for r in records
                if r["split"] == split and name in r]
      if points:
        axes.plot(*zip(*points), marker=marker, markersize=3, label=split)
    axes.set(title=name.replace("_", " "), xlabel="step")
    axes.grid(alpha=0.3)
    if axes.lines:
      axes.legend()
  figure.savefig(path, dpi=100)
  return path
