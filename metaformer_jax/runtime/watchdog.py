"""Shows the stack of every thread when a run hangs, and ends it in the end."""

import faulthandler
import os
import sys
import threading
import time


class Watchdog:
  """Watches that `beat` is called again and again.

  When it has not been called for a while, the stacks of all threads are written
  to stderr. Later, the process ends with exit code 1, as if it were killed:
  nothing is saved, and no other code runs. A thread does this, which needs
  Python's lock; if other code holds the lock all the time, faulthandler's
  thread, which does not need it, ends the process.
  """

  def __init__(self, seconds: float, exit_after: float | None = None):
    """Takes the times without a beat; None or 0: the process does not end."""
    self._seconds, self._exit_after = seconds, exit_after or None
    self._last = time.monotonic()
    self._waiting_for, self._limited = "the start", False
    self._over = threading.Event()
    self._lock = threading.Lock()  # Of `_limited` and faulthandler's timer.
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, *exc):
    self._over.set()
    self._thread.join()
    self._arm(False)

  def beat(self, waiting_for: str, limited: bool = False) -> None:
    """Notes that the run makes progress.

    Args:
      waiting_for: what it waits for next.
      limited: whether the process ends if that takes too long. What is not
        limited may take any time: a compilation, a save to a slow disk.
    """
    self._last, self._waiting_for = time.monotonic(), waiting_for
    if limited != self._limited:
      with self._lock:
        self._limited = limited
      self._arm(limited)

  def _arm(self, limited: bool) -> None:
    """Starts faulthandler's timer again, or stops it."""
    if self._exit_after is None:
      return
    with self._lock:
      if limited and self._limited:
        faulthandler.dump_traceback_later(self._exit_after, exit=True,
                                          file=sys.__stderr__)
      else:
        faulthandler.cancel_dump_traceback_later()

  def _watch(self):
    n_reports = 0
    times = (self._seconds, self._exit_after or self._seconds)
    while not self._over.wait(min(1.0, *(t / 4 for t in times))):
      silent = time.monotonic() - self._last
      self._arm(self._limited)
      if self._exit_after and self._limited and silent >= self._exit_after:
        self._show(silent, "exit_after_seconds", self._exit_after,
                   "ending with exit code 1; nothing is saved, and the same "
                   "command continues from the last checkpoint")
        os._exit(1)
      if silent < self._seconds:
        n_reports = 0
      elif silent >= (n_reports + 1) * self._seconds:
        n_reports += 1
        self._show(silent, "hang_seconds", self._seconds, "still waiting")

  def _show(self, silent: float, key: str, seconds: float, fate: str) -> None:
    # The original stream: a replacement may hold a lock.
    stream = sys.__stderr__
    print(f"no progress for {silent:.0f} s, waiting for {self._waiting_for}; "
          f"config.log.{key} = {seconds:g}: {fate}. The stack of every thread:",
          file=stream, flush=True)
    faulthandler.dump_traceback(stream, all_threads=True)
