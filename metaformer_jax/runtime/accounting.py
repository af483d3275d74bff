"""What a run counts over all its restarts, and where its time goes."""

import dataclasses
import resource
import sys
import time


@dataclasses.dataclass
class Record:
  """What a run counts from its first start on; checkpoints hold it.

  Attributes:
    position: training examples consumed, where the data continues.
    started: when the run first started, in seconds of Unix time.
    productive_seconds: spent in steps that were not lost since, without input.
    skipped_steps: steps that changed nothing, as they were not finite.
    bad_images: training images that were replaced.

  Raises:
    ValueError: a value is none of these, as in a damaged or forged checkpoint.
  """

  position: int = 0
  started: float = dataclasses.field(default_factory=lambda: time.time())
  productive_seconds: float = 0.0
  skipped_steps: int = 0
  bad_images: int = 0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      kinds = (int,) if field.type is int else (int, float)
      if type(value) not in kinds or not 0 <= value < 2**63:  # Nor NaN.
        raise ValueError(f"{field.name} is {value!r:.50}")


class Clock:
  """Splits the time of a process among its activities, one at a time.

  "setup", "input" (waiting for a batch), "step", "evaluation" and "checkpoint"
  (while a save keeps the run waiting).

  Attributes:
    productive_seconds: as in `Record`.
  """

  def __init__(self, record: Record):
    self.productive_seconds = record.productive_seconds
    self._started = record.started
    self._activity = "setup"
    self._since = time.perf_counter()
    self._spent = dict.fromkeys(
        ("setup", "input", "step", "evaluation", "checkpoint"), 0.0)

  def switch_to(self, activity: str) -> None:
    """Ends the current activity and begins another one."""
    now = time.perf_counter()
    seconds = now - self._since
    self._spent[self._activity] += seconds
    if self._activity == "step":
      self.productive_seconds += seconds
    self._activity, self._since = activity, now

  def spent(self) -> float:
    """Seconds since the current activity began."""
    return time.perf_counter() - self._since

  def window(self, n_steps: int, batch_size: int) -> dict[str, float]:
    """The figures since the last call.

    Returns:
      images_per_second and step_seconds, of steps and their input;
      input_wait, the fraction of that time spent on input;
      checkpoint_stall, the fraction of all time spent on checkpoints;
      goodput, productive seconds over the time since the run first started,
      restarts and pauses included;
      host_memory_gib, the peak of this process.
    """
    self.switch_to(self._activity)
    spent = self._spent
    training = max(spent["input"] + spent["step"], 1e-9)
    elapsed = max(time.time() - self._started, 1e-9)
    total = max(sum(spent.values()), 1e-9)
    figures = {
        "images_per_second": n_steps * batch_size / training,
        "step_seconds": training / max(n_steps, 1),
        "input_wait": spent["input"] / training,
        "checkpoint_stall": spent["checkpoint"] / total,
        "goodput": min(self.productive_seconds / elapsed, 1.0),
        "host_memory_gib": host_memory() / 2**30,
    }
    self._spent = dict.fromkeys(spent, 0.0)
    return figures


def host_memory() -> int:
  """The peak memory of this process in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak
