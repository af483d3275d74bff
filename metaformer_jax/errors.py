"""Errors that end a run with a message for the user instead of a traceback.

Each entry point turns them into one line on stderr and an exit code, by which
launchers decide whether to restart (docs/design.md, "Process contract").
"""

import contextlib
import difflib
import errno
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

# Characters of a line that a user sees. A path may have 4,096 bytes.
_MAX_LINE = 6000
_END = 1000  # What to do is said at the end.
_LITTLE = 200  # More than that; a line that was cut is not cut again.

# Longer names are compared by their beginnings, as the time is quadratic.
_COMPARED = 100


class UserError(Exception):
  """One line that says what is wrong and what to do; the base class."""

  exit_code = 1


class ConfigError(UserError):
  """The configuration, or a file or folder that it names, is unusable."""

  exit_code = 2


class WeightsError(ConfigError):
  """A file of weights is unusable; the message lists every problem."""


class OutOfMemoryError(ConfigError):
  """What the configuration asks for does not fit in memory."""


class DataError(UserError):
  """Too many examples are unusable, or their files gone; names one."""


class StorageError(UserError):
  """The workdir cannot be written any more: the disk is full or gone."""


class WorkerLostError(UserError):
  """Another process of the run has died; the message names it."""


class DivergedError(UserError):
  """Training has diverged; restarting would not help."""

  exit_code = 3


class Preempted(UserError):
  """The process was asked to stop; what is needed to resume is saved."""

  exit_code = 143


def one_line(text: object) -> str:
  """The text on one line, without its middle if it is long.

  Names from outside cannot control the terminal, or fill it.
  """
  return "".join(c if c.isprintable() else "?"
                 for c in cut(" ".join(str(text).split())))


def cut(line: str) -> str:
  """A line without its middle if it is long."""
  more = len(line) - _MAX_LINE
  if more <= _LITTLE:
    return line
  return (f"{line[:_MAX_LINE - _END]}... ({more} more characters) ..."
          f"{line[-_END:]}")


@contextlib.contextmanager
def fitting_memory(advice: str) -> Iterator[None]:
  """Within it, running out of memory is an `OutOfMemoryError`, on any device.

  Args:
    advice: the key and its value, what does not fit, and what to do.
  """
  try:
    yield
  except (MemoryError, OSError, RuntimeError) as e:  # jax's is a RuntimeError.
    if not _is_out_of_memory(e):
      raise
    reason, _, _ = (str(e) or type(e).__name__).partition("\n")
    raise OutOfMemoryError(f"{advice} ({reason})") from e


def _is_out_of_memory(error: Exception) -> bool:
  if isinstance(error, OSError):
    return error.errno == errno.ENOMEM
  return isinstance(error, MemoryError) or (
      str(error).startswith("RESOURCE_EXHAUSTED"))


def nearest(name: str, valid: Iterable[str],
            by: Callable[[str], str] = str) -> list[str]:
  """The valid names that are most like a name: at most three, the best first.

  Names are alike if they differ by few letters, if one has all words of the
  other or begins with it, or if one is the other's initials, as lr. Names that
  are more than twice as far away as the best one are left out.

  Args:
    name: what a user has written.
    valid: the choices; of equally good ones, the first is better.
    by: what of a choice is compared.
  """
  found = [(*_likeness(str(name), by(choice)), choice) for choice in valid]
  found = sorted((f for f in found if f[0] >= 0.6), key=lambda f: f[:2],
                 reverse=True)  # Stable.
  if not found:
    return []
  farthest = 2 * (1 - found[0][0]) + 1e-9
  return [choice for like, _, choice in found[:3] if 1 - like <= farthest]


def _likeness(name: str, choice: str) -> tuple[float, int]:
  """How alike two names are, from 0 to 1; and the length of a common start."""
  a, b = (text[:_COMPARED].lower().replace("-", "_")
          for text in (name, choice))
  like = difflib.SequenceMatcher(None, a, b).ratio()
  one, other = (re.findall(r"[^\W\d_]+|\d+", text) for text in (a, b))
  if one and other and (
      set(one) <= set(other) or set(other) <= set(one)
      or (len(a) > 2 and b.startswith(a))
      or _initials(one) in other or _initials(other) in one):
    like = max(like, 0.7)
  start = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b))
  return like, len(list(start))


def _initials(words: list[str]) -> str | None:
  return "".join(word[0] for word in words) if len(words) > 1 else None


def did_you_mean(name: str, valid: Iterable[str],
                 by: Callable[[str], str] = str) -> str:
  """Returns '; did you mean X?', or the choices if none is near.

  The arguments are those of `nearest`.
  """
  valid = sorted(set(valid))
  if not valid:
    return ""
  shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
  return suggest(nearest(name, valid, by)) or f"; valid: {shown}"


def suggest(names: list[str]) -> str:
  """'; did you mean X, Y or Z?'; empty if there are none."""
  if not names:
    return ""
  *others, last = names
  listed = f"{', '.join(others)} or {last}" if others else last
  return f"; did you mean {listed}?"
