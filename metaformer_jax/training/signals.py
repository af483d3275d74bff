"""Being told to end: by a preempted machine, a scheduler, or Ctrl-C."""

import signal
import threading


class StopSignal:
  """Notes SIGTERM or SIGINT, for the loop to end after its step.

  A second one acts at once, as if nothing had been installed.
  """

  def __init__(self):
    self.signal: signal.Signals | None = None
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # Only the main thread may ask to be told.
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self.signal = signal.Signals(number)
    self._restore()

  def _restore(self):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def __exit__(self, *exc):
    self._restore()
