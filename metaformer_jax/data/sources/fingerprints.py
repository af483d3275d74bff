"""What tells a data set from another one, or from what it was before.

A fingerprint has JSON values by what they are. A run keeps it in its
checkpoints, and its processes compare theirs. It does not depend on where the
data set is.
"""

import hashlib
import itertools
import os
from collections.abc import Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any

import numpy as np

from metaformer_jax import storage
from metaformer_jax.config import comparison

if TYPE_CHECKING:
  from metaformer_jax.data.sources import base

# Files of which the sizes are read, if there are more; and files at a time, as
# of a file system in a network.
_SIZED = 10_000
_THREADS = 16


def of(source: "base.Source") -> dict[str, Any]:
  """The fingerprint of a source: what all have, and what its method adds."""
  names = getattr(source, "class_names", None)
  n_classes = getattr(source, "n_classes", None)
  found = {"number of examples": len(source),
           "classes": list(map(str, names)) if names is not None
           else n_classes and int(n_classes)}
  more = getattr(source, "fingerprint", None)
  return found | (dict(more()) if more else {})


def files(*parts: tuple[str, Sequence[bytes]]) -> dict[str, str]:
  """Of files: their names in order, and the sizes of 10,000 of them.

  Which files these are depends on their number only. A file that cannot be read
  has the size -1: the loader will report it.

  Args:
    *parts: a folder, which may be on gs://, and the relative paths of files in
      it.

  Raises:
    OSError: a folder on gs:// cannot be listed.
  """
  digest = hashlib.sha256()
  for _, names in parts:
    digest.update(b"\0".join(names) + b"\0\0")
  starts = np.cumsum([0, *(len(names) for _, names in parts)])
  chosen = np.arange(starts[-1])
  if len(chosen) > _SIZED:
    chosen = np.sort(np.random.default_rng(0).choice(
        len(chosen), _SIZED, replace=False))

  listed = {folder: storage.path(folder).objects()
            for folder in {folder for folder, _ in parts}
            if storage.is_remote(folder)}

  def size(i: int) -> int:
    part = int(np.searchsorted(starts, i, "right")) - 1
    folder, names = parts[part]
    name = names[i - starts[part]]
    if folder in listed:
      found = listed[folder].get(os.fsdecode(name))
      return found.size if found else -1
    return _size(os.path.join(os.fsencode(folder), name))

  with futures.ThreadPoolExecutor(_THREADS) as pool:
    sizes = pool.map(lambda some: [size(i) for i in some],
                     np.array_split(chosen, _THREADS))
    return {"file names": comparison.DIGEST + digest.hexdigest(),
            "sizes of files": arrays(np.array(
                list(itertools.chain(*sizes)), np.int64))}


def _size(path: bytes) -> int:
  try:
    return os.stat(path).st_size
  except OSError:
    return -1


def arrays(*values: np.ndarray) -> str:
  """A digest of arrays: types, shapes and values."""
  digest = hashlib.sha256()
  for value in values:
    value = np.ascontiguousarray(value)
    digest.update(f"{value.dtype}{value.shape}".encode())
    digest.update(value.view(np.uint8))
  return comparison.DIGEST + digest.hexdigest()
