"""What a run writes besides checkpoints: metrics, TensorBoard events, curves.

Everything is derived from `metrics.jsonl`, one record per line: {"step",
"split", ...}. When a run resumes, records after the restored step are dropped,
as these steps are repeated.

For a workdir on object storage the files are local ones, of which `Mirror`
makes objects.
"""

import contextlib
import csv
import errno
import io
import json
import logging
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from metaformer_jax import errors, storage
from metaformer_jax.config import paths
from metaformer_jax.config.schema import Experiment, Log
from metaformer_jax.runtime import mirror, tensorboard, tracking

log = logging.getLogger(__name__)

Record = dict[str, Any]

# A long run writes a few megabytes.
_MAX_BYTES = 2**28

# Of a metric's name, which is shown on the terminal and in plots.
_MAX_NAME = 200

# Of metrics.csv, which has as many cells in every row.
_MAX_COLUMNS = 256


def check(cfg: Log) -> None:
  """Raises ConfigError if a package that the log needs is missing."""
  if cfg.wandb:
    tracking.package()


class Writer:
  """Writes the metrics of a run, if enabled: on the first process only.

  As a context manager, it notes on Weights & Biases how the run has ended.
  """

  def __init__(self, workdir: pathlib.Path, cfg: Experiment,
               restored_step: int, curves: Sequence[str], enabled: bool):
    """`curves` are the metrics in curves.png."""
    self._workdir, self._curves = workdir, curves
    self._file = self._table = self._events = self._tracker = None
    self._mirror = None
    self.records: list[Record] = []
    if not enabled:
      return
    with _storing(workdir), contextlib.ExitStack() as undo:
      undo.callback(self.close)
      self._folder = workdir
      if storage.is_remote(workdir):
        self._mirror = mirror.Mirror(workdir)
        self._folder = self._mirror.folder
        self._mirror.fetch("metrics.jsonl")
      path = self._folder / "metrics.jsonl"
      self.records = [r for r in read(path) if r["step"] <= restored_step]
      storage.write(path, "".join(_line(r) for r in self.records))
      self._file = path.open("a")
      self._table = _Table(self._folder / "metrics.csv", self.records)
      if cfg.log.tensorboard:
        self._events = tensorboard.Events(
            self._folder / "tensorboard", restored_step + 1, cfg)
      if cfg.log.wandb:
        self._tracker = tracking.Tracker(workdir, self._folder, cfg)
      undo.pop_all()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind, error, traceback) -> None:
    self.close(error)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Adds a record and its TensorBoard scalars, and syncs them to disk."""
    if self._file is None:
      return
    record = {"step": step, "split": split, **metrics}
    self.records.append(record)
    with _storing(self._workdir):
      self._file.write(_line(record))
      self._file.flush()
      os.fsync(self._file.fileno())  # To survive a crash of the machine.
      self._table.add(self.records)
      if self._events is not None:
        self._events.write(step, split, metrics)
    if self._tracker is not None:
      self._tracker.write(step, split, metrics)

  def store(self) -> None:
    """Makes objects of what was written; on disk it is there already."""
    if self._mirror is not None:
      self._mirror.store()

  def finish(self, summary: dict[str, Any]) -> pathlib.Path | None:
    """Writes summary.json and curves.png; returns the latter's path."""
    if self._file is None:
      return None
    with _storing(self._workdir):
      storage.write(self._folder / "summary.json",
                    json.dumps(summary, indent=2) + "\n")
      if self._events is not None:
        self._events.finish(summary["step"])
      if self._tracker is not None:
        self._tracker.finish(summary)
      draw_curves(self.records, self._curves, self._folder / "curves.png")
      if self._mirror is not None:
        storage.persist(self.store, mirror.PATIENCE, "storing the summary")
    return self._workdir / "curves.png"

  def close(self, error: BaseException | None = None) -> None:
    """Closes all files; `error` is what ends the run, if anything does."""
    if self._tracker is not None:
      self._tracker.close(error)
      self._tracker = None
    for stream in (self._file, self._table, self._events, self._mirror):
      if stream is not None:
        with contextlib.suppress(OSError):  # Reported by `write`.
          stream.close()


class _Table:
  """metrics.csv: a row for each record, a column for each metric so far.

  A record with a new metric has all rows written again, into a file that
  replaces the old one, so that the first line always names all columns. It is
  rewritten when a run resumes, so it need not survive a crash.
  """

  def __init__(self, path: pathlib.Path, records: list[Record]):
    self._path, self._file = path, None
    self._write(records)

  def _write(self, records: list[Record]) -> None:
    self.close()
    names = dict.fromkeys(["step", "split"])
    for record in records:
      names.update(dict.fromkeys(record))
    self._all, self._names = set(names), list(names)[:_MAX_COLUMNS]
    text = io.StringIO()
    writer = self._writer(text)
    writer.writeheader()
    writer.writerows(records)
    storage.write(self._path, text.getvalue())
    self._file = self._path.open("a")

  def _writer(self, file) -> csv.DictWriter:
    return csv.DictWriter(file, self._names, extrasaction="ignore",
                          lineterminator="\n")

  def add(self, records: list[Record]) -> None:
    """Adds the last record, which is new."""
    if records[-1].keys() <= self._all:
      self._writer(self._file).writerow(records[-1])
      self._file.flush()
    else:
      self._write(records)

  def close(self) -> None:
    if self._file is not None:
      self._file.close()


@contextlib.contextmanager
def _storing(workdir: pathlib.Path):
  try:
    yield
  except OSError as e:
    where, why = e.filename2 or e.filename or workdir, e.strerror or e
    raise errors.StorageError(
        f"{where}: cannot be written: {why}; fix that and run the same command "
        "to continue from the last checkpoint") from e


def read(path: pathlib.Path) -> list[Record]:
  """The records of a metrics.jsonl.

  An incomplete last line is ignored; other lines that are not records, as on a
  damaged disk, are ignored with a warning.

  Raises:
    OSError: the file is a pipe, a folder or a device, is too large, or cannot
      be read.
  """
  try:
    if storage.is_remote(path):
      content = path.read_bytes()
    else:
      with paths.open_file(path) as file:
        content = file.read(_MAX_BYTES + 1)
  except FileNotFoundError:
    return []
  if len(content) > _MAX_BYTES:
    raise OSError(errno.EFBIG, f"has more than {_MAX_BYTES} bytes", str(path))
  *lines, _ = content.split(b"\n")
  records = [r for r in map(_parse, lines) if r]
  if len(records) < len(lines):
    log.warning("%s: %d of %d lines are not records; ignored", path,
                len(lines) - len(records), len(lines))
  return records


def last_evaluation(records: list[Record],
                    step: int) -> dict[str, float] | None:
  """What the evaluation after a step measured; None if it is not recorded."""
  for record in reversed(records):
    if record["split"] == "eval" and record["step"] == step:
      return {k: v for k, v in record.items() if k not in ("step", "split")}
  return None


def _parse(line: bytes) -> Record | None:
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict):
    return None
  step, split = record.get("step"), record.get("split")
  good = (type(step) is int and 0 <= step < 2**63 and isinstance(split, str)
          and all(map(_is_metric, record.items())))
  return record if good else None


def _is_metric(item: tuple[str, Any]) -> bool:
  """Whether a name and a value are those of a metric, or "split"."""
  name, value = item
  if name == "split":
    return True
  if not name.isprintable() or len(name) > _MAX_NAME:
    return False
  if type(value) is float:  # Those of float32, NaN and infinity included.
    return abs(value) < 2.0**128 or not math.isfinite(value)
  return type(value) is int and abs(value) < 2**63


def _line(record: Record) -> str:
  return json.dumps(record) + "\n"


def draw_curves(records: list[Record], names: Sequence[str],
                path: pathlib.Path) -> pathlib.Path:
  """Draws metrics against the step as a PNG; returns its path."""
  # The object interface has no global state and needs no display.
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
  from matplotlib.figure import Figure  # noqa: PLC0415

  figure = Figure(figsize=(4 * len(names), 3.5), layout="constrained")
  FigureCanvasAgg(figure)
  for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0],
                        names):
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
