"""How a hyper-parameter, or another value of an experiment, is declared."""

import dataclasses
from collections.abc import Iterable
from typing import Any

REQUIRED = dataclasses.MISSING


def option(default: Any, help_text: str, *, low: float | None = None,
           high: float | None = None, above: float | None = None,
           choices: Iterable[str] | None = None, own: bool = False,
           length: int | None = None, each: str | None = None,
           role: str = "function") -> Any:
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
