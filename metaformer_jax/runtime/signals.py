"""Being told to end: by a preempted machine, a scheduler, or Ctrl-C."""

import signal
import threading

import jax
import numpy as np

from metaformer_jax.runtime import sharding


def name(number: int) -> str:
  """"SIGTERM" of 15; of 0, no signal, nothing."""
  return signal.Signals(number).name if number else ""


class StopSignal:
  """Notes SIGTERM or SIGINT, for the run to end after a step.

  A second one changes nothing: the state is being saved. SIGKILL ends at once,
  and loses what came after the last checkpoint.
  """

  def __init__(self):
    self._number = 0
    self._before = {}

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self  # Only the main thread may ask to be told.
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
    """The signal's number, or 0, once for each device: int32 [n devices].

    Its maximum, which a program that all processes run takes, is what all of
    them then know: so they end after the same step, whichever was told.
    """
    own = np.full(len(mesh.local_devices), self._number, np.int32)
    return sharding.put_batch({"stop": own}, mesh)["stop"]
