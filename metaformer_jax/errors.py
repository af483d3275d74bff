"""Errors that end a run with a message for the user instead of a traceback.

Each entry point turns them into one line on stderr and an exit code, by which
launchers decide whether to restart (docs/design.md, "Process contract").
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """One line that says what is wrong and what to do; the base class."""

  exit_code = 1


class ConfigError(UserError):
  """The configuration, or a file or folder that it names, is unusable."""

  exit_code = 2


class WeightsError(ConfigError):
  """A file of weights is unusable; the message lists every problem."""


class DataError(UserError):
  """Too many examples are unusable; the message names one."""


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
  """The text on one line; names from outside cannot control the terminal."""
  return "".join(c if c.isprintable() else "?"
                 for c in " ".join(str(text).split()))


def did_you_mean(name: str, valid: Iterable[str]) -> str:
  """Returns '; did you mean X?', or the choices if none is similar."""
  valid = sorted(valid)
  if not valid:
    return ""
  near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  if near:
    return f"; did you mean {near[0]}?"
  shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
  return f"; valid: {shown}"
