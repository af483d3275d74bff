"""Streams of examples: from a position to an example, for the loader.

A training stream is endless. Its order, its augmentation and what replaces a
bad example depend on (seed, epoch, index) only.

With several groups of examples, as of one shape each, a step has those of one
group. Each group has an endless stream of its own, of permutations of it. Which
group a step has, and how many steps had it before, are closed forms of (seed,
step), so that a position is one integer still.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.data.sources import base

Example = dict[str, Any]
Transform = Callable[..., Example]
Indices = np.ndarray | range

# Part of each seed, so that no two uses draw the same numbers.
_ORDER, _AUGMENT, _REPLACE, _TURNS = 0, 1, 2, 3

# Examples that are tried as the replacement of a bad one.
_TRIES = 20

# The most examples that are prepared as one part of a batch.
_PART = 64


class Train:
  """The endless stream: position -> augmented example."""

  def __init__(self, source: base.Source, transform: Transform, seed: int,
               repeats: int, groups: Sequence[Indices], batch_size: int):
    """As in `loader.Loader`; `groups` has at least one group."""
    self._source, self._transform = source, transform
    self._seed, self._repeats, self._groups = seed, repeats, groups
    self._batch_size = batch_size
    self._turns = Turns(seed, [len(group) for group in groups])

  def __getitem__(self, position: int) -> Example:
    step, place = divmod(int(position), self._batch_size)
    number, n_before = self._turns[step]
    group = self._groups[number]
    n = len(group)
    epoch, place = divmod(n_before * self._batch_size + place, n)
    place, repeat = divmod(place, self._repeats)
    place = int(_permutation(self._seed, epoch, number, n)[place])
    index = int(group[place])
    rng = augment_rng(self._seed, epoch, index, repeat)
    others = ((int(group[other]), other_rng) for other, other_rng in _others(
        (self._seed, _REPLACE, epoch, index), place, n, repeat))
    return _example(self._source, self._transform, index, rng, others)


class Turns:
  """Which group a step has, in exact integers: step -> (group, steps before).

  The second value is how many earlier steps had the same group. Of n examples,
  the first group has `size`; its steps are those for which (step * size +
  offset) mod n is below `size`. The others share the other steps in the same
  way. Of any steps in a row, each of two groups has its part, rounded down or
  up; a group without examples has none.
  """

  def __init__(self, seed: int, sizes: Sequence[int]):
    """Takes the number of examples of each group."""
    n, self._parts = sum(sizes), []
    for number, size in enumerate(sizes[:-1]):
      rng = np.random.default_rng((seed, _TURNS, number))
      self._parts.append((size, n, int(rng.integers(max(n, 1)))))
      n -= size

  def __getitem__(self, step: int) -> tuple[int, int]:
    for number, (size, n, offset) in enumerate(self._parts):
      turn = step * size + offset
      # A step is the group's if this quotient is one more than the step
      # before's.
      n_before = (turn - size) // n - (offset - size) // n
      if turn % n < size:
        return number, n_before
      step -= n_before
    return len(self._parts), step


class Evaluation:
  """The data set in its own order, then padding, for which "mask" is false."""

  def __init__(self, source: base.Source, transform: Transform):
    self._source, self._transform = source, transform

  def __getitem__(self, position: int) -> Example:
    n = len(self._source)
    valid = position < n
    index = position if valid else 0
    example = _example(self._source, self._transform, index, None,
                       _others((0, _REPLACE, 0, index), index, n, 0))
    bad = example.pop("bad")
    if bad >= 0:
      example = {name: np.zeros_like(x) for name, x in example.items()}
    return {**example, "mask": np.bool_(valid and bad < 0),
            "bad": bad if valid else np.int64(-1)}


class GroupedEvaluation:
  """The groups one after the other, each in order and padded to whole batches.

  The blank example of its group stands for padding and for a bad example.
  """

  def __init__(self, source: base.Source, transform: Transform,
               groups: Sequence[np.ndarray], batch_size: int):
    self._source, self._transform = source, transform
    numbers, order = [], []
    for number, group in enumerate(groups):
      n = -(-len(group) // batch_size) * batch_size
      order.append(np.pad(group, (0, n - len(group)), constant_values=-1))
      numbers.append(np.full(n, number))
    self._order, self._numbers = map(np.concatenate, (order, numbers))

  def __getitem__(self, position: int) -> Example:
    index, reason = int(self._order[position]), "padding"
    if index >= 0:
      example, reason = attempt(self._source, self._transform, index, None)
    if reason:
      example = self._transform.blank(int(self._numbers[position]))
    return {**example, "mask": np.bool_(not reason),
            "bad": np.int64(index if reason else -1)}


Stream = Train | Evaluation | GroupedEvaluation


class Parts:
  """A process's batches of a stream, in parts of a few examples.

  A batch is prepared in parts, so that all threads and workers share it.

  Attributes:
    n_per_batch: parts of a batch.
  """

  def __init__(self, stream: Stream, start: int, batch_size: int,
               process_index: int, process_count: int):
    """The first batch of all processes is at the position `start`."""
    self._stream, self._start, self._global = stream, start, batch_size
    self._local = batch_size // process_count
    self._offset = process_index * self._local
    self._size = max(n for n in range(1, min(self._local, _PART) + 1)
                     if self._local % n == 0)
    self.n_per_batch = self._local // self._size

  def positions(self, number: int) -> range:
    """The positions of the examples of a part."""
    batch, place = divmod(number, self.n_per_batch)
    first = (self._start + batch * self._global + self._offset +
             place * self._size)
    return range(first, first + self._size)

  def example(self, position: int) -> Example:
    return self._stream[position]

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    """The examples of a part, stacked."""
    return stacked([self._stream[i] for i in self.positions(number)])


def stacked(examples: Sequence[Example]) -> dict[str, np.ndarray]:
  """The arrays of examples, along a new first axis."""
  return {name: np.stack([example[name] for example in examples])
          for name in examples[0]}


def augment_rng(seed: int, epoch: int, index: int,
                repeat: int = 0) -> np.random.Generator:
  """What the transform of an example draws from, in an epoch of training."""
  key = (seed, _AUGMENT, epoch, index)
  return np.random.default_rng((*key, repeat) if repeat else key)


def attempt(source: base.Source, transform: Transform, index: int,
            rng: np.random.Generator | None) -> tuple[Example, str]:
  """Reads and transforms an example; returns it, and why it is bad, or "".

  DataError if the data set cannot be read any more.
  """
  record = {}
  try:
    record = source[index]
    return transform(record, rng), ""
  except errors.DataError:  # The data set cannot be read any more.
    raise
  except Exception as e:
    path = repr(record.get("path", ""))[1:-1]  # Escaped, to identify the file.
    return {}, errors.one_line(
        f"example {index} {path} cannot be used: {type(e).__name__}: {e}"
    ).rstrip(": ")


def _example(source, transform, index, rng, others) -> Example:
  """An example or, if it is bad, the first usable one of `others`.

  "bad" is the index of a bad example, else -1. DataError if all are bad.
  """
  example, reason = attempt(source, transform, index, rng)
  if not reason:
    return {**example, "bad": np.int64(-1)}
  for other, other_rng in others:
    example, failed = attempt(source, transform, other, other_rng)
    if not failed:
      return {**example, "bad": np.int64(index)}
  raise errors.DataError(
      f"{reason}; all examples tried in its place are bad, too")


def _others(key: tuple[int, int, int, int], place: int, n: int, repeat: int,
            ) -> Iterator[tuple[int, np.random.Generator]]:
  """Draws replacements for the example at a place of n: (place, rng), ..."""
  if n == 1:
    return
  steps = np.random.default_rng(key).integers(1, n, _TRIES)
  for number, step in enumerate(steps.tolist()):
    yield (place + step) % n, np.random.default_rng((*key, repeat, number))


# Two for each of two groups, as batches can lie across epochs.
@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, number: int, n: int) -> np.ndarray:
  """The order of an epoch of a group of n examples: int32 or int64 [n]."""
  key = (seed, _ORDER, epoch, number) if number else (seed, _ORDER, epoch)
  order = np.random.default_rng(key).permutation(n)
  return order.astype(np.int32) if n < 2**31 else order
