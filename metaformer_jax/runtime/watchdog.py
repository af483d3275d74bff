"""Tells what every thread does when a run no longer moves."""

import faulthandler
import sys
import threading
import time


class Watchdog:
  """Writes stack traces to stderr when `beat` was not called for a while.

  It only tells: whether to wait on, as for a slow disk, is the user's choice.
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
    """Tells that the run moves, and what it does next."""
    self._last, self._waiting_for = time.monotonic(), waiting_for

  def _watch(self):
    told = 0
    while not self._over.wait(min(1.0, self._seconds / 4)):
      silent = time.monotonic() - self._last
      if silent < self._seconds:
        told = 0
      elif silent >= (told + 1) * self._seconds:
        told += 1
        # As it was when Python started: what replaced it may hold a lock.
        stream = sys.__stderr__
        print(f"nothing has moved for {silent:.0f} s, waiting for "
              f"{self._waiting_for}; config.log.hang_seconds = "
              f"{self._seconds:g}. What every thread does:", file=stream,
              flush=True)
        faulthandler.dump_traceback(stream, all_threads=True)
