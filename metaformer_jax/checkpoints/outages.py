"""Steps that are left out because object storage does not answer."""

import logging
import pathlib
import time

from metaformer_jax import errors

log = logging.getLogger(__name__)

# Seconds for which a run goes on although no checkpoint is taken, and for which
# it waits for an answer before it leaves one out.
PATIENCE, ANSWER = 1800.0, 10.0


class Outage:
  """What a run has not saved since its last checkpoint.

  Attributes:
    missing: the newest step that was left out; None if there is none.
  """

  def __init__(self, where: pathlib.Path):
    """`where` is the folder of the checkpoints, for messages."""
    self._where, self._since = where, None
    self.missing: int | None = None

  def leave_out(self, step: int, error: Exception | None = None) -> None:
    """Notes and says that a step is not saved.

    Raises:
      StorageError: none could be saved for `PATIENCE` seconds.
    """
    why = f" ({errors.one_line(error)})" if error else ""
    now = time.monotonic()
    self.missing, self._since = step, self._since or now
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
    self.missing = self._since = None

  def require(self, step: int) -> None:
    """Raises an OSError that may pass if a step was left out."""
    if self.missing == step:
      raise OSError(f"UNAVAILABLE: step {step} was not saved")
