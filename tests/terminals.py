"""A terminal: what programs write to it, and what is then on its screen."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading


class Terminal:
  """A pseudo-terminal of a size; `slave` is what programs write to."""

  def __init__(self, columns: int, lines: int):
    self.columns = columns
    self._master, self.slave = pty.openpty()
    fcntl.ioctl(self.slave, termios.TIOCSWINSZ,
                struct.pack("HHHH", lines, columns, 0, 0))
    self._written = b""
    self._thread = threading.Thread(target=self._read, daemon=True)
    self._thread.start()

  def _read(self):
    with contextlib.suppress(OSError):  # Once the other end is closed.
      while data := os.read(self._master, 2**16):
        self._written += data

  def finish(self) -> str:
    """Closes it; returns everything that was written."""
    os.close(self.slave)
    self._thread.join()
    os.close(self._master)
    return self._written.decode()


@contextlib.contextmanager
def stderr_on(terminal: Terminal):
  """Lets this process write its stderr to the terminal."""
  before = sys.stderr
  with os.fdopen(os.dup(terminal.slave), "w") as stream:
    sys.stderr = stream
    try:
      yield
    finally:
      sys.stderr = before


def screen(written: str, columns: int) -> tuple[list[str], int]:
  """The lines of a terminal of endless height; and how many were too long."""
  rows, x, n_wrapped = [""], 0, 0
  for c in written:
    if c == "\r":
      x = 0
    elif c == "\n":
      rows.append("")
      x = 0
    elif c.isprintable():
      if x == columns:
        rows.append("")
        x, n_wrapped = 0, n_wrapped + 1
      rows[-1] = rows[-1][:x].ljust(x) + c + rows[-1][x + 1:]
      x += 1
    else:
      raise ValueError(f"cannot show {c!r}")
  return [row.rstrip() for row in rows], n_wrapped
