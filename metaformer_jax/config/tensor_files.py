"""Opens safetensors files, within limits."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import safetensors

from metaformer_jax.config import paths

# The library takes headers of 100 MB, for minutes and gigabytes. Real ones have
# some thousand tensors, of 100 bytes each, and an experiment of up to 4 MiB.
_MAX_HEADER_BYTES = 2**24
_MAX_TENSORS = 2**15


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[Any]:
  """A file as `safetensors.safe_open` has it, with NumPy's arrays.

  Raises:
    OSError, ValueError: it cannot be read, is no regular file, is damaged, or
      is not within the limits.
  """
  with paths.open_file(path) as file:
    size = int.from_bytes(file.read(8), "little")
  if size > _MAX_HEADER_BYTES:
    raise ValueError(f"its header says that it has {size} bytes, more than "
                     f"{_MAX_HEADER_BYTES}")
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      n = len(file.keys())
      if n > _MAX_TENSORS:
        raise ValueError(f"it has {n} tensors, more than {_MAX_TENSORS}")
      yield file
  except safetensors.SafetensorError as e:
    raise ValueError(str(e)) from e
