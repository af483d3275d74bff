"""TensorBoard's events of a run: scalars, and hyper-parameters."""

import pathlib
import socket
import time
from typing import Any

from metaformer_jax.config import saved
from metaformer_jax.config.schema import Experiment

# Characters of a hyper-parameter that is no number, as of class names.
_MAX_TEXT = 200


class Events:
  """Scalars, on disk when `write` returns, and what the run was started with.

  tensorboardX's SummaryWriter writes in a thread, which a full disk ends with a
  traceback, leaving the run waiting for it.
  """

  def __init__(self, folder: pathlib.Path, first_step: int, cfg: Experiment):
    """Opens a new file in the folder, which earlier processes may have used."""
    # Slow to import.
    from tensorboardX import record_writer, summary  # noqa: PLC0415
    from tensorboardX.proto import event_pb2, summary_pb2  # noqa: PLC0415

    self._event, self._summary = event_pb2.Event, summary_pb2.Summary
    folder.mkdir(exist_ok=True)
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
    self._file = record_writer.RecordWriter(str(folder / name))
    self._write(file_version="brain.Event:2")
    # TensorBoard drops what earlier processes wrote from this step on.
    self._write(step=first_step, session_log=event_pb2.SessionLog(
        status=event_pb2.SessionLog.START))
    *start, self._end = summary.hparams(
        hyper_parameters(cfg),
        {f"eval/{measure.name}": None for measure in cfg.task.MEASURES})
    for part in start:
      self._add(first_step, part)

  def write(self, step: int, split: str, metrics: dict[str, float]) -> None:
    """Adds scalars with the tags SPLIT/NAME."""
    self._add(step, self._summary(value=[
        self._summary.Value(tag=f"{split}/{name}", simple_value=value)
        for name, value in metrics.items()]))

  def finish(self, step: int) -> None:
    """Says that the run is done, for the hyper-parameters' table."""
    self._add(step, self._end)

  def _add(self, step: int, summary: Any) -> None:
    self._write(step=step, summary=summary)
    self._file.flush()

  def _write(self, **fields: Any) -> None:
    self._file.write(self._event(
        wall_time=time.time(), **fields).SerializeToString())

  def close(self) -> None:
    """Closes the file, even if what is left cannot be written."""
    self._file.close()


def hyper_parameters(cfg: Experiment) -> dict[str, bool | float | str]:
  """What decides an experiment's result and is set, by "section.key".

  These are the keys that a resume may not change; tuples as texts.
  """
  left_out = {*saved.RESUMABLE, *(f"task.{key}" for key in cfg.task.RESUMABLE)}
  return {
      key: value if isinstance(value, bool | int | float) else (
          str(value)[:_MAX_TEXT])
      for key, value in saved.flat(cfg).items()
      if value is not None and left_out.isdisjoint((key, key.split(".")[0]))}
