"""The errors that end a run with a message for the user, not a traceback.

Each entry point turns them into one line on stderr and an exit code; the codes
are the contract that launchers restart by (docs/design.md, "Process
contract").
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
  """One line that says what is wrong and what to do; base of those below."""

  exit_code = 1


class ConfigError(UserError):
  """The configuration, or a file or folder that it names, cannot be used."""

  exit_code = 2


class WeightsError(ConfigError):
  """A file of weights cannot be used; the message lists everything wrong."""


class DataError(UserError):
  """Too many examples cannot be used; the message names one."""


class StorageError(UserError):
  """The workdir can no longer be written: the disk is full, or gone."""


class WorkerLostError(UserError):
  """Another process of the run is gone; the message names it."""


class DivergedError(UserError):
  """Training is no longer finite; starting again would not help."""

  exit_code = 3


class Preempted(UserError):
  """The process was told to end; everything needed to resume is saved."""

  exit_code = 143


def did_you_mean(name: str, valid: Iterable[str]) -> str:
  """Returns '; did you mean X?', or the choices where nothing comes near."""
  valid = sorted(valid)
  if not valid:
    return ""
  near = difflib.get_close_matches(str(name), valid, n=1, cutoff=0.5)
  if near:
    return f"; did you mean {near[0]}?"
  shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
  return f"; valid: {shown}"
