"""How a hyper-parameter, or another value of an experiment, is declared."""

import dataclasses

REQUIRED = dataclasses.MISSING


def option(default, help_text, *, low=None, high=None, above=None, choices=None,
           own=False, length=None, each=None, role="function"):
  """A dataclass field with its meaning and limits.

  Args:
    default: the value if a config does not set it, or `REQUIRED`.
    help_text: what it is, and its unit.
    low, high: inclusive bounds of a number, or of each number of a tuple.
    above: exclusive lower bound.
    choices: the valid values of a string, or of each string of a tuple.
    own: whether an import path of a user's own is valid, too.
    length: of a tuple.
    each: `"odd"` for odd numbers only.
    role: what depends on it: the names or shapes of the weights ("shape");
      training only, as initial values and dropout ("training"); or what the
      same weights compute ("function").
  """
  return dataclasses.field(default=default, metadata={
      "help": help_text, "low": low, "high": high, "above": above,
      "choices": choices, "own": own, "length": length, "each": each,
      "role": role})
