"""Where the time of a run goes, and what is counted over all its restarts."""

import resource
import sys
import time
from collections.abc import Mapping

# What a run counts from its first start on; checkpoints carry it.
#   started: when that was, seconds of Unix time.
#   productive_seconds: spent in steps that were not lost since, input aside.
#   skipped_steps: those that changed nothing, as they were not finite.
#   bad_images: training images that were replaced.
Totals = dict[str, float]


def new_totals(saved: Mapping[str, float] | None = None) -> Totals:
  """Those of a checkpoint, or of a run that begins."""
  return {"started": time.time(), "productive_seconds": 0.0,
          "skipped_steps": 0, "bad_images": 0, **(saved or {})}


class Clock:
  """Divides the time of a process among what it does.

  One thing at a time: "setup", "input" (waiting for a batch), "step",
  "evaluation" and "checkpoint" (what saving keeps the run waiting).
  """

  def __init__(self, totals: Totals):
    self._totals = totals
    self._doing = "setup"
    self._since = time.perf_counter()
    self._spent = dict.fromkeys(
        ("setup", "input", "step", "evaluation", "checkpoint"), 0.0)

  def turn_to(self, doing: str) -> None:
    """Ends what is being done, and begins another thing."""
    now = time.perf_counter()
    seconds = now - self._since
    self._spent[self._doing] += seconds
    if self._doing == "step":
      self._totals["productive_seconds"] += seconds
    self._doing, self._since = doing, now

  def spent(self) -> float:
    """Seconds on what is being done, since it began."""
    return time.perf_counter() - self._since

  def window(self, n_steps: int, batch_size: int) -> dict[str, float]:
    """The figures since the last call.

    Returns:
      images_per_second and step_seconds, of steps and their input;
      input_wait, the input's part of these; checkpoint_stall, the checkpoints'
      part of all; goodput, productive seconds over those since the run first
      started, restarts and what lay between included; host_memory_gib, the most
      that this process has had.
    """
    self.turn_to(self._doing)
    spent = self._spent
    training = max(spent["input"] + spent["step"], 1e-9)
    elapsed = max(time.time() - self._totals["started"], 1e-9)
    everything = max(sum(spent.values()), 1e-9)
    figures = {
        "images_per_second": n_steps * batch_size / training,
        "step_seconds": training / max(n_steps, 1),
        "input_wait": spent["input"] / training,
        "checkpoint_stall": spent["checkpoint"] / everything,
        "goodput": min(self._totals["productive_seconds"] / elapsed, 1.0),
        "host_memory_gib": host_memory() / 2**30,
    }
    self._spent = dict.fromkeys(spent, 0.0)
    return figures


def host_memory() -> int:
  """The most memory that this process has had, in bytes."""
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == "darwin" else 1024 * peak
