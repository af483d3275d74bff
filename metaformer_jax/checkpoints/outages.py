"""Steps that are left out because object storage does not answer."""

import logging
import pathlib
import time
from collections.abc import Callable
from concurrent import futures

from metaformer_jax import errors
from metaformer_jax.runtime import leases, processes

log = logging.getLogger(__name__)

# Seconds for which a run goes on although no checkpoint is taken, and for which
# it waits for an answer before it leaves one out.
PATIENCE, ANSWER = 1800.0, 10.0


class Outage:
  """What a run has not saved since its last checkpoint.

  Attributes:
    missing: the steps that were left out.
  """

  def __init__(self, where: pathlib.Path, lock: leases.Lease | None):
    """Takes the folder of the checkpoints, and what process 0 asks for.

    The lock is asked on object storage only.
    """
    self._where, self._lock, self._since = where, lock, None
    self.missing: set[int] = set()

  def can_save_after(self, step: int, last: futures.Future | None) -> bool:
    """Waits for the last save, unless object storage stops answering.

    If it does, the step is left out. All processes must call it, and the first
    one waits.
    """
    def wait():
      while last and not last.done():
        if not self._answers():
          return False
        futures.wait([last], ANSWER)
      return True

    return self._agreed(step, wait)

  def can_save(self, step: int, topic: str) -> bool:
    """Whether object storage answers; if not, a step is left out.

    All processes must call it, with a topic as for `processes.on_first`.
    """
    return self._agreed(step, self._answers, topic)

  def _answers(self) -> bool:
    return not self._lock or self._lock.reachable(ANSWER)

  def _agreed(self, step: int, ask: Callable[[], bool],
              topic: str = "") -> bool:
    found = bool(processes.on_first(lambda: int(ask()), topic))
    if not found:
      self.leave_out(step)
    return found

  def leave_out(self, step: int, error: Exception | None = None) -> None:
    """Notes and says that a step is not saved.

    Raises:
      StorageError: none could be saved for `PATIENCE` seconds.
    """
    why = f" ({errors.one_line(error)})" if error else ""
    now = time.monotonic()
    self.missing.add(step)
    self._since = self._since or now
    if now - self._since > PATIENCE:
      raise errors.StorageError(
          f"{self._where}: object storage has taken no checkpoint for "
          f"{PATIENCE / 60:.0f} minutes{why}; run the same command to continue "
          "from the last one") from error
    log.warning("%s: object storage does not answer%s: step %d is not saved; "
                "training goes on, and the next save tries again",
                self._where, why, step)

  def end(self) -> None:
    """A step was saved."""
    self._since = None
    self.missing.clear()

  def require(self, step: int) -> None:
    """Raises an OSError that may pass if a step was left out."""
    if step in self.missing:
      raise OSError(f"UNAVAILABLE: step {step} was not saved")
