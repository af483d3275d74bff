"""Requests to stop: from a preempted machine, a scheduler, or Ctrl-C."""

import signal
import threading

import jax
import numpy as np

from metaformer_jax.runtime import sharding


def name(number: int) -> str:
  """The name of a signal, "SIGTERM" for 15; empty for 0, no signal."""
  return signal.Signals(number).name if number else ""


class StopSignal:
  """Notes SIGTERM or SIGINT, so that the run ends after the current step.

  Further signals change nothing: the state is being saved. SIGKILL ends the
  process at once and loses what came after the last checkpoint.
  """

  def __init__(self):
    self._number = 0
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # Only the main thread can handle signals.
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)
    return self

  def _note(self, number, frame):
    del frame
    self._number = number

  def __exit__(self, *exc):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def flags(self, mesh) -> jax.Array:
    """The signal's number, or 0, once per device: int32 [n devices].

    The compiled step returns the maximum over all processes, so that all of
    them end after the same step, whichever received a signal.
    """
    own = np.full(len(mesh.local_devices), self._number, np.int32)
    return sharding.put_batch({"stop": own}, mesh)["stop"]
