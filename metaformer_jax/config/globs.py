"""Patterns of parameters' paths, as "backbone/stage*/**/norm1".

`*` stands for any characters within a component of a path, and a component `**`
for any number of components, also none. A path stands for all below it. Nothing
else is special.

No pattern takes long: the time is that of searching for plain text. Regular
expressions, of which a bad one never ends, do not come from configs.
"""

from collections.abc import Iterable, Sequence

from metaformer_jax import errors


class Glob:
  """A pattern, compiled."""

  def __init__(self, pattern: str):
    # Between two "**", a run of components has its place; the leftmost one is
    # always as good as any other.
    self._first, *self._others = _split(
        [component.split("*") if component != "**" else None
         for component in pattern.split("/")])

  def matches(self, path: str) -> bool:
    """Whether the pattern has a path, or a part that the path begins with."""
    names = path.split("/")
    if not _is_at(self._first, names, 0):
      return False
    at = len(self._first)
    for run in self._others:
      last = len(names) - len(run)
      at = next((i for i in range(at, last + 1) if _is_at(run, names, i)), None)
      if at is None:
        return False
      at += len(run)
    return True


def matching(pattern: str, paths: Sequence[str], key: str,
             also: Iterable[str] = ()) -> list[str]:
  """The paths that a pattern matches.

  Args:
    pattern: as above.
    paths: of all parameters.
    key: that has the pattern, for the message.
    also: what the key takes besides patterns, for the message.

  Raises:
    ConfigError: there are none.
  """
  found = [*filter(Glob(pattern).matches, paths)]
  if not found:
    inside = f"**/{pattern}"
    near = (errors.suggest([inside])
            if any(map(Glob(inside).matches, paths)) else
            errors.did_you_mean(pattern, {
                *also, *(path[:i] for path in paths
                         for i, c in enumerate(f"{path}/") if c == "/")}))
    raise errors.ConfigError(f"{key}: {pattern!r} matches no parameter{near}")
  return found


def _split(components: Sequence[list[str] | None]) -> list[list[list[str]]]:
  """The runs of components between those that are None."""
  runs = [[]]
  for component in components:
    if component is None:
      runs.append([])
    else:
      runs[-1].append(component)
  return runs


def _is_at(run: Sequence[list[str]], names: Sequence[str], at: int) -> bool:
  """Whether the components of a run match the names from a place on."""
  return len(run) <= len(names) - at and all(
      _matches(texts, names[at + i]) for i, texts in enumerate(run))


def _matches(texts: Sequence[str], name: str) -> bool:
  """Whether a name has the texts in order, any characters between them."""
  first, *others = texts
  if not others:
    return name == first
  *middle, last = others
  at, end = len(first), len(name) - len(last)
  if end < at or not (name.startswith(first) and name.endswith(last)):
    return False
  for text in filter(None, middle):
    at = name.find(text, at, end)
    if at < 0:
      return False
    at += len(text)
  return True
