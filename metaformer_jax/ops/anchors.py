"""Anchors: boxes of fixed shapes around the cells of feature maps.

In NumPy, as they depend on shapes only. The values are those of mmdetection
2.19 (core/anchor/anchor_generator.py), bit for bit: its anchors are not
rounded, and their centres are at multiples of the stride, without an offset.
"""

from collections.abc import Sequence

import numpy as np


def base(stride: int, scale: float, octaves: int,
         ratios: Sequence[float]) -> np.ndarray:
  """Anchors of the cell at (0, 0).

  Args:
    stride: pixels from one cell to the next.
    scale: of the smallest square anchor: its side in strides.
    octaves: sizes of anchors, up to twice the smallest one, which is left out.
    ratios: heights over widths.

  Returns:
    float32 [A, 4], in pixels, by ratio and then by size.
  """
  scales = scale * 2 ** (np.arange(octaves) / octaves)
  heights = np.sqrt(np.array(ratios, np.float32))
  sides = np.stack([1 / heights, heights], -1) * np.float32(stride)
  sides = sides[:, None] * scales.astype(np.float32)[:, None]
  half = sides.reshape(-1, 2) * np.float32(0.5)
  return np.concatenate([-half, half], -1)


def grid(shape: tuple[int, int], stride: int, base: np.ndarray) -> np.ndarray:
  """Anchors of all cells of a feature map.

  Args:
    shape: its height and width.
    stride: pixels from one cell to the next.
    base: those of the cell at (0, 0), float32 [A, 4].

  Returns:
    float32 [h * w * A, 4], in pixels, by row, column and base anchor.
  """
  y, x = np.indices(shape).reshape(2, -1)
  corners = np.stack([x, y, x, y], -1).astype(np.float32) * np.float32(stride)
  return (corners[:, None] + base).reshape(-1, 4)
