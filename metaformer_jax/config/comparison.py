"""How two sets of facts differ, as short texts for one line."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# What a digest begins with; its value says nothing to people.
DIGEST = "sha256:"

_ABSENT = "no such key"
_MAX_CHARACTERS = 200
_MAX_LISTED = 5


def between(old: Mapping[str, Any], new: Mapping[str, Any],
            form: str = "{}: {} -> {}") -> Iterator[str]:
  """Yields a text for each fact that differs, in their order.

  Of long lists of the same length, it names the first place that differs.

  Args:
    old, new: JSON values by what they are.
    form: of a text, for the key and both values. Of a digest it is "other
      KEY".
  """
  for key in {**old, **new}:
    one, other = old.get(key, _ABSENT), new.get(key, _ABSENT)
    if one != other:
      yield _text(key, one, other, form)


def table(facts: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
  """What differs among any number of sets of facts.

  Returns:
    For each key whose value is not the same in all, in their order, a short
    text for each set, empty where it has no such key.
  """
  return {key: [_cut(one[key]) if key in one else "" for one in facts]
          for key in dict.fromkeys(key for one in facts for key in one)
          if any(one.get(key, _ABSENT) != facts[0].get(key, _ABSENT)
                 for one in facts)}


def _text(key: str, one: Any, other: Any, form: str) -> str:
  if any(isinstance(v, str) and v.startswith(DIGEST) for v in (one, other)):
    return f"other {key}"
  if max(len(str(one)), len(str(other))) <= _MAX_CHARACTERS:
    return form.format(key, one, other)
  if isinstance(one, list) and isinstance(other, list):
    if len(one) != len(other):
      return form.format(key, f"{len(one)} values", f"{len(other)} values")
    i = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    return _text(f"{key}[{i}]", one[i], other[i], form)
  return form.format(key, _cut(one), _cut(other))


def _cut(value: Any) -> str:
  text = str(value)
  return text if len(text) <= _MAX_CHARACTERS else (
      f"{text[:_MAX_CHARACTERS]}...")


def listed(texts: Iterable[str]) -> str:
  """The first texts, separated by semicolons, and how many more there are."""
  texts = list(texts)
  more = len(texts) - _MAX_LISTED
  return "; ".join(texts[:_MAX_LISTED]) + (f"; and {more} more"
                                           if more > 0 else "")
