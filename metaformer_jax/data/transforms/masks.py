"""Masks of objects as parts of a batch: crops of bitmaps, of one size.

mmdetection 2.19 keeps a bitmap of the whole resized image for each object. What
is outside of an object's part of it is 0, so that this part is enough.
"""

import numpy as np

from metaformer_jax.data.augment import cv_kernels
from metaformer_jax.data.transforms import framing


def crop(bitmap: np.ndarray, size: framing.Size, side: int, *,
         flip: bool) -> tuple[np.ndarray, np.ndarray] | None:
  """The part of a resized, then mirrored bitmap that is not 0, in M x M cells.

  Along each axis, a part of at most M pixels begins with its first pixel, and a
  cell is a pixel; the cells beyond its last one are 0, also outside of the
  image. A longer one is divided into M equal cells. A cell is 1 if at least
  half of its area is.

  Args:
    bitmap: uint8 [H, W], 0 or 1, of the original image.
    size: (height, width) of the resized image. It is resized as by OpenCV's
      INTER_NEAREST (mmdetection's Resize, BitmapMasks.rescale).
    side: M.
    flip: whether left and right are exchanged.

  Returns:
    uint8 [M, M], and float32 [4], the left, top, right and bottom of what the
    cells cover, in whole pixels of the resized image; None if nothing of the
    object is left.
  """
  rows, columns = (cv_kernels.nearest(old, new, 0, new)
                   for old, new in zip(bitmap.shape, size))
  if flip:
    columns = columns[::-1]
  y, x = _around(bitmap.any(1)[rows]), _around(bitmap.any(0)[columns])
  part = bitmap[rows[y]][:, columns[x]]
  # What is 1 in its first row may be only in columns that were not taken.
  inner = _around(part.any(1)), _around(part.any(0))
  part = part[inner]
  if not part.size:
    return None
  cells = _divided(_divided(part, side).T, side).T
  # Of a cell, as `_divided` counts it.
  area = np.prod([n if n > side else 1 for n in part.shape])
  left, top = x.start + inner[1].start, y.start + inner[0].start
  height, width = np.maximum(part.shape, side)
  return ((2 * cells >= area).astype(np.uint8),
          np.array([left, top, left + width, top + height], np.float32))


def _around(seen: np.ndarray) -> slice:
  """From the first to the last value that is true; empty if none is."""
  found = np.flatnonzero(seen)
  return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def _divided(values: np.ndarray, side: int) -> np.ndarray:
  """Divides the first axis of integers [n, m] into M cells: [M, m].

  Up to n = M each value is a cell, and zeros follow. Beyond that, a value has a
  length of M and a cell one of n, so that all edges are integers; a cell is the
  sum of the values in it, each times the length that is inside.
  """
  n = len(values)
  if n <= side:
    return np.pad(values, ((0, side - n), (0, 0)))
  before = np.zeros((n + 1, values.shape[1]), np.int64)
  np.cumsum(values, 0, out=before[1:])
  # The sum up to each edge: whole values, and a part of the next one.
  whole, part = np.divmod(np.arange(side + 1) * n, side)
  nexts = np.append(values, np.zeros_like(values[:1]), 0)[whole]
  return np.diff(before[whole] * side + nexts * part[:, None], axis=0)
