"""Masks of objects in images, and their RLE."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def paste(probabilities: np.ndarray, boxes: np.ndarray, size: tuple[int, int],
          threshold: float) -> Iterator[np.ndarray]:
  """Enlarges masks of boxes to masks of the image, one after the other.

  As mmdetection 2.19 does (models/roi_heads/mask_heads/fcn_mask_head.py,
  _do_paste_mask, one box at a time): the value of a pixel is interpolated
  between the centres of the box's cells, with zeros outside of the box. All is
  rounded as there.

  Args:
    probabilities: float32 [n, M, M], rows and columns of the boxes.
    boxes: float32 [n, 4], in pixels of the image.
    size: its height and width.
    threshold: pixels of an object have at least this probability.

  Yields:
    bool [height, width], in Fortran's order, for `rle`.
  """
  height, width = size
  for cells, box in zip(probabilities.astype(np.float32, copy=False),
                        boxes.astype(np.float32, copy=False)):
    mask = np.zeros((height, width), bool, order="F")
    (x, columns), (y, rows) = (
        _positions(*box[axis::2], side, n)
        for axis, side, n in zip((0, 1), (width, height), cells.shape[::-1]))
    mask[y, x] = _interpolate(cells, rows, columns) >= threshold
    yield mask


def _positions(low, high, side, n_cells):
  """Pixels in and next to a box, along one axis, and where they lie in it.

  Returns:
    Their range, and float32 positions in cells, from the first one's centre.
  """
  first = max(int(np.floor(low)) - 1, 0)
  pixels = np.arange(first, max(first, min(int(np.ceil(high)) + 1, side)))
  with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
    parts = (pixels.astype(np.float32) + np.float32(0.5) - low) / (high - low)
    parts = parts * 2 - 1
  # Infinite, or 0 / 0 and thus nowhere, for a box without width or height.
  parts = np.nan_to_num(parts, nan=-3, posinf=0, neginf=0)
  return (slice(first, first + len(pixels)),
          (parts + 1) * np.float32(n_cells / 2) - np.float32(0.5))


def _interpolate(cells, rows, columns):
  """Bilinear, [h, w]; the order of operations is that of F.grid_sample."""
  top, south = _split(rows, cells.shape[0])
  left, east = _split(columns, cells.shape[1])
  north, west = 1 - south, 1 - east
  cells = np.pad(cells, ((1, 2), (1, 2)))
  upper, lower = cells[top], cells[top + 1]
  return (upper[:, left] * np.outer(north, west)
          + upper[:, left + 1] * np.outer(north, east)
          + lower[:, left] * np.outer(south, west)
          + lower[:, left + 1] * np.outer(south, east))


def _split(positions, n_cells):
  """Indices of padded cells, and how far towards the next one it is."""
  positions = np.clip(positions, -1, n_cells)  # Zeros from there on.
  low = np.floor(positions)
  return low.astype(int) + 1, positions - low


def rle(mask: np.ndarray) -> dict[str, Any]:
  """COCO's RLE of a mask, bool [H, W]: {"size": [H, W], "counts": text}.

  It is faster for an array in Fortran's order.
  """
  found = coco_mask.encode(np.asfortranarray(mask).view(np.uint8))
  return {"size": [int(side) for side in found["size"]],
          "counts": found["counts"].decode()}
