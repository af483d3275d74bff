"""Files of the outlines of objects: a few arrays, as safetensors."""

import itertools
import json
import os
from collections.abc import Iterable

import numpy as np
import safetensors
import safetensors.numpy

from metaformer_jax.config import tensor_files
from metaformer_jax.data.sources import outlines

# Of the arrays of a file, which all have one axis.
_TYPES = {"points": np.float64, "ends": np.int64, "starts": np.int64,
          "rle_rows": np.int64, "rle_ends": np.int64, "rle_texts": np.uint8}


def save(segments: Iterable[outlines.Segment], sizes: np.ndarray) -> bytes:
  """The content of a file that `load` reads: safetensors of all arrays.

  Args:
    segments: of A annotations, as a file of COCO's was read.
    sizes: int [A, 2], heights and widths of the annotations' images.
  """
  builder = outlines.Builder()
  for segment in segments:
    builder.add(segment)
  found, _ = builder.build(sizes)
  texts = list(found.rles.values())
  arrays = {"points": found.points, "ends": found.ends, "starts": found.starts,
            "rle_rows": list(found.rles),
            "rle_ends": np.cumsum([0, *map(len, texts)]),
            "rle_texts": np.frombuffer(b"".join(texts), np.uint8)}
  return safetensors.numpy.save({
      name: np.ascontiguousarray(array, _TYPES[name])
      for name, array in arrays.items()})


def load(path: str | os.PathLike[str]) -> outlines.Segments:
  """The outlines in a file of `save`.

  Raises:
    OSError, ValueError: it is missing, damaged, or not of `save`.
  """
  points, ends, starts, rows, rle_ends, texts = _read(path, *_TYPES)
  _check(_are_edges(ends, len(points)) and _are_edges(starts, len(ends) - 1)
         and _are_edges(rle_ends, len(texts))
         and len(rle_ends) == len(rows) + 1 and _are_in(rows, starts)
         and outlines.are_near(points))
  text = texts.tobytes()
  rles = {row: text[a:b] for row, (a, b) in zip(
      rows.tolist(), itertools.pairwise(rle_ends.tolist()))}
  if not all(isinstance(json.loads(rle), dict) for rle in rles.values()):
    raise ValueError("it has a text that is no RLE")
  return outlines.Segments(points, ends, starts, rles)


def exist(path: str | os.PathLike[str]) -> np.ndarray:
  """`outlines.Segments.exist` of a file, of which little is read.

  Raises:
    OSError, ValueError: as `load`.
  """
  starts, rows = _read(path, "starts", "rle_rows")
  _check(_are_in(rows, starts))
  nothing = np.zeros(0)
  return outlines.Segments(nothing, nothing, starts,
                           dict.fromkeys(rows.tolist())).exist()


def _read(path: str | os.PathLike[str], *names: str) -> list[np.ndarray]:
  """Some arrays of a file, with their types."""
  with tensor_files.opened(path) as file:
    if {*file.keys()} != {*_TYPES}:
      raise ValueError("it has other arrays than outlines")
    arrays = [file.get_tensor(name) for name in names]
  if any(array.dtype != _TYPES[name] or array.ndim != 1
         for name, array in zip(names, arrays)):
    raise ValueError("it has arrays of other types than outlines")
  return arrays


def _are_edges(edges: np.ndarray, n: int) -> bool:
  """Whether they divide n values into parts."""
  return (len(edges) > 0 and edges[0] == 0 and edges[-1] == n
          and bool((np.diff(edges) >= 0).all()))


def _are_in(rows: np.ndarray, starts: np.ndarray) -> bool:
  """Whether rows are of annotations whose polygons begin at `starts`."""
  return bool(((rows >= 0) & (rows < len(starts) - 1)).all())


def _check(good: bool) -> None:
  if not good:
    raise ValueError("its arrays do not fit together")
