"""Whether a run makes progress, by its newest checkpoint."""

import math
import time
from collections.abc import Callable

# Listings of the checkpoints while the shorter limit passes. A new checkpoint
# is noticed at most one interval late, and a hang two.
_LOOKS = 8


class Progress:
  """How long the newest checkpoint has been the newest one.

  It counts what it sees, by its own clock, and compares no time of another
  machine. It begins again with each supervisor, and does not count while the
  computer sleeps. Only a listing that shows no other step than before is
  evidence; one that failed is not.
  """

  def __init__(self, hang_seconds: float, start_seconds: float,
               clock: Callable[[], float] = time.monotonic):
    """
    Args:
      hang_seconds: that a checkpoint may be the newest one.
      start_seconds: the same from a start to the first new checkpoint, which
        includes compilation. 0 for either: without a limit.
      clock: returns seconds; replaced by tests.
    """
    self._limits = {True: start_seconds, False: hang_seconds}
    self._pause = min(filter(None, self._limits.values()),
                      default=math.inf) / _LOOKS
    self._clock = clock
    self.begin(None)

  def begin(self, step: int | None) -> None:
    """The run starts now; step: its newest checkpoint, None if unknown."""
    self._step = step
    self._starting = True
    self._since = self._looked = self._clock()

  @property
  def limit(self) -> float:
    """Seconds that are allowed at present; 0: any number."""
    return self._limits[self._starting]

  def due(self) -> bool:
    """Whether the checkpoints should be listed now."""
    return self._clock() - self._looked >= self._pause

  def hangs(self, step: int | None) -> bool:
    """Whether the limit has passed without a new checkpoint.

    Args:
      step: the newest one, as just listed; None if they cannot be listed.
    """
    now = self._looked = self._clock()
    if step is None:
      return False
    if self._step is None:  # How old this one is, is not known either.
      self._step, self._since = step, now
    if step != self._step:  # Also a lower one: the newest was damaged.
      self._step, self._since, self._starting = step, now, False
    return 0 < self.limit < now - self._since
