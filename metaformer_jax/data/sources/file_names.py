"""Names of files: many in little memory, cheap to send to workers."""

import itertools
from collections.abc import Iterable, Iterator
from typing import overload

import numpy as np


class FileNames:
  """A sequence of names, of which each takes what it is long.

  In an array of NumPy, each takes what the longest one does.
  """

  def __init__(self, names: Iterable[bytes]):
    names = list(names)
    self._text = b"".join(names)
    self._ends = np.cumsum([0, *map(len, names)], dtype=np.int64)

  def __len__(self) -> int:
    return len(self._ends) - 1

  def __iter__(self) -> Iterator[bytes]:
    return (self._text[start:end]
            for start, end in itertools.pairwise(self._ends.tolist()))

  @overload
  def __getitem__(self, index: int) -> bytes: ...

  @overload
  def __getitem__(self, index: slice | np.ndarray) -> "FileNames": ...

  def __getitem__(self, index):
    """A name, or those of a slice or of an array of indices."""
    if isinstance(index, slice | np.ndarray):
      return FileNames(self[int(i)] for i in np.arange(len(self))[index])
    start, end = self._ends[range(len(self))[index]:][:2]
    return self._text[start:end]
