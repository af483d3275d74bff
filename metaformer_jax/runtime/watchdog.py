"""Shows the stack of every thread when a run hangs."""

import faulthandler
import sys
import threading
import time


class Watchdog:
  """Writes stack traces to stderr when `beat` has not been called for a while.

  It does nothing else: whether to wait, as for a slow disk, is up to the user.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._last = time.monotonic()
    self._waiting_for = "the start"
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *exc):
    self._over.set()
    self._thread.join()

  def beat(self, waiting_for: str) -> None:
    """Notes that the run makes progress, and what it waits for next."""
    self._last, self._waiting_for = time.monotonic(), waiting_for

  def _watch(self):
    n_reports = 0
    while not self._over.wait(min(1.0, self._seconds / 4)):
      silent = time.monotonic() - self._last
      if silent < self._seconds:
        n_reports = 0
      elif silent >= (n_reports + 1) * self._seconds:
        n_reports += 1
        # The original stream: a replacement may hold a lock.
        stream = sys.__stderr__
        print(f"no progress for {silent:.0f} s, waiting for "
              f"{self._waiting_for}; config.log.hang_seconds = "
              f"{self._seconds:g}. The stack of every thread:", file=stream,
              flush=True)
        faulthandler.dump_traceback(stream, all_threads=True)
