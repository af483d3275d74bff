"""Requests to stop: from a preempted machine, a scheduler, or Ctrl-C.

A handler in Python runs between two instructions of the main thread, which a
compiler may keep busy for minutes, and must not take a lock. Here the signals'
numbers go through a pipe to a thread, which acts at once and may log.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from metaformer_jax import errors
from metaformer_jax.runtime import notices

log = logging.getLogger(__name__)

_NUMBERS = (signal.SIGTERM, signal.SIGINT)

# For an orderly end without a run.
_GRACE_SECONDS = 2

# How long a run that is asked to stop waits for the batch of its last step.
# Machines are often taken away 30 seconds after a signal.
_INPUT_SECONDS = 5

_Batch = TypeVar("_Batch")


def name(number: int) -> str:
  """The name of a signal, "SIGTERM" for 15; empty for 0, no signal."""
  return signal.Signals(number).name if number else ""


class Listener:
  """Calls a function, in a thread, for each SIGTERM and SIGINT.

  Only the main thread can handle signals: entered in another one, it does
  nothing.
  """

  def __init__(self, act: Callable[[int], None],
               in_main: Callable[[], None] = lambda: None):
    """Takes what to do with a signal's number, and in the main thread."""
    self._act, self._in_main = act, in_main
    self._undo = contextlib.ExitStack()

  def __enter__(self):
    if threading.current_thread() is not threading.main_thread():
      return self
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # As `set_wakeup_fd` requires.
    threading.Thread(target=self._read, args=(reader,), daemon=True).start()
    self._undo.callback(os.close, writer)
    self._undo.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(
        writer, warn_on_full_buffer=False))
    for number in _NUMBERS:
      # Without a handler in Python, nothing would be written to the pipe.
      before = signal.signal(number, lambda number, frame: self._in_main())
      self._undo.callback(signal.signal, number, before)
    return self

  def __exit__(self, *exc):
    self._undo.close()

  def _read(self, reader: int) -> None:
    with open(reader, "rb", buffering=0) as pipe:
      while number := pipe.read(1):
        if number[0] in _NUMBERS:
          self._act(number[0])


def ending() -> Listener:
  """Within it, a signal ends the process, with one line and without saving.

  The main thread gets a KeyboardInterrupt. It may be in a compiler: if it has
  not ended soon, the process does.
  """
  told = threading.Event()

  def leave(number):
    line = f"Preempted: {name(number)}: ending; nothing is to be saved\n"
    os.write(sys.__stderr__.fileno(), line.encode())
    told.set()
    time.sleep(_GRACE_SECONDS)
    os._exit(errors.Preempted.exit_code)

  def leave_main():
    told.wait(_GRACE_SECONDS)  # Or it could end before the line is written.
    raise KeyboardInterrupt

  return Listener(leave, leave_main)


class StopSignal:
  """Notes SIGTERM or SIGINT, so that the run ends after the current step.

  A notice that the machine will be taken away counts as a SIGTERM.
  It does so from `listen` on: before there is something to save, signals keep
  their effect. Further signals change nothing: the state is being saved.
  SIGKILL ends the process at once and loses what came after the last
  checkpoint.
  """

  def __init__(self):
    self._number = 0
    self._noting = threading.Lock()  # Of the threads that note something.
    self._listener = None
    self._notices = notices.Watch(self._note_notice)
    # In the main thread: whether it waits for input. And whether that has
    # taken too long since the first signal.
    self._in_input, self._overdue = False, False
    self._timer = threading.Timer(_INPUT_SECONDS, self._interrupt_input)
    self._timer.daemon = True

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self._notices.close()
    if self._listener is not None:
      self._timer.cancel()
      if self._timer.is_alive():
        self._timer.join()  # It may be sending a signal.
      self._listener.__exit__(*exc)

  def listen(self) -> None:
    """Starts to note signals and notices, if it has not."""
    if self._listener is None:
      self._listener = Listener(self._note, self._leave_input).__enter__()
      self._notices.start()

  def batches(self, batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, for which a run that is asked to stop waits briefly.

    Raises:
      Preempted: a batch has not come for some seconds after a signal.
    """
    with contextlib.closing(batches):
      while True:
        self._in_input = True
        try:
          batch = next(batches)
        except StopIteration:
          return
        finally:
          self._in_input = False
        yield batch

  def _leave_input(self) -> None:
    """In the main thread, after each signal."""
    if self._in_input and self._overdue:
      self._in_input = False
      raise errors.Preempted(
          f"{name(self._number)}: no batch came for {_INPUT_SECONDS} s; the "
          "same command continues from the last checkpoint")

  def _interrupt_input(self) -> None:
    self._overdue = True
    # Interrupts what the main thread waits for, and calls `_leave_input`.
    signal.pthread_kill(threading.main_thread().ident, self._number)

  def _note_notice(self, key: str) -> None:
    log.warning("the metadata of this machine say %s: it will be taken away, "
                "which is taken as a SIGTERM", key)
    self._note(signal.SIGTERM)

  def _note(self, number: int) -> None:
    with self._noting:
      first, self._number = not self._number, self._number or number
    if self._overdue:
      return
    if first:
      self._timer.start()
    log.warning("%s: saving after this step, then ending; further signals "
                "change nothing" if first else
                "%s: the run is already ending; it saves first", name(number))

  def flags(self, mesh):
    """The signal's number, or 0, once per device: int32 [n devices].

    The compiled step returns the maximum over all processes, so that all of
    them end after the same step, whichever received a signal.
    """
    # Entry points import this module before jax.
    import numpy as np  # noqa: PLC0415

    from metaformer_jax.runtime import sharding  # noqa: PLC0415

    own = np.full(len(mesh.local_devices), self._number, np.int32)
    return sharding.put_batch({"stop": own}, mesh)["stop"]
