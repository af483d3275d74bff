"""Resizing and shifting, compiled by Numba, with Pillow's own pixels.

Pillow does these one value at a time; here the inner loops run over contiguous
memory and are vectorised. The arithmetic is Pillow's: resizing in integers of
22 fractional bits, rounded between the two directions, and shifts in float64.
"""

import math

import numba
import numpy as np

_compile = numba.njit(nogil=True, cache=True)

# Fractional bits of a weight.
_BITS = 22


@_compile
def _weights(n_in: int, n_out: int, bicubic: bool):
  """Of each output: its first input, how many, and their weights."""
  scale = n_in / n_out
  spread = max(scale, 1.0)
  support = (2.0 if bicubic else 1.0) * spread
  size = math.ceil(support) * 2 + 1
  first = np.zeros(n_out, np.int32)
  count = np.zeros(n_out, np.int32)
  weights = np.zeros((n_out, size), np.int32)
  w = np.zeros(size)
  for i in range(n_out):
    centre = (i + 0.5) * scale
    start = max(0, int(centre - support + 0.5))
    n = min(n_in, int(centre + support + 0.5)) - start
    total = 0.0
    for k in range(n):
      x = abs((k + start - centre + 0.5) * (1.0 / spread))
      if not bicubic:
        w[k] = max(0.0, 1.0 - x)
      elif x < 1:
        w[k] = (1.5 * x - 2.5) * x * x + 1
      elif x < 2:
        w[k] = (((x - 5) * x + 8) * x - 4) * -0.5
      else:
        w[k] = 0.0
      total += w[k]
    first[i], count[i] = start, n
    for k in range(n):
      v = w[k] / total * (1 << _BITS)
      weights[i, k] = int(v - 0.5) if v < 0 else int(v + 0.5)
  return first, count, weights


@_compile
def _mix_rows(rows, n_out, bicubic):
  """uint8 [n_in, m] -> [n_out, m]: each a weighted mean of some rows."""
  first, count, weights = _weights(rows.shape[0], n_out, bicubic)
  m = rows.shape[1]
  total = np.empty(m, np.int32)
  out = np.empty((n_out, m), np.uint8)
  for i in range(n_out):
    total[:] = 1 << (_BITS - 1)
    for k in range(count[i]):
      row, w = rows[first[i] + k], weights[i, k]
      for j in range(m):
        total[j] += np.int32(row[j]) * w
    for j in range(m):
      out[i, j] = min(max(total[j] >> _BITS, 0), 255)
  return out


@_compile
def resize(pixels, size, bicubic):
  """Resizes uint8 [A, B, 3] along A, then along B: [size (B), size (A), 3].

  The result is transposed, as two passes over rows make it.
  """
  n = pixels.shape[1]
  mixed = _mix_rows(pixels.reshape(-1, n * 3), size, bicubic)
  rows = np.empty((n, size * 3), np.uint8)
  for i in range(size):
    for j in range(n):
      for c in range(3):
        rows[j, 3 * i + c] = mixed[i, 3 * j + c]
  return _mix_rows(rows, size, bicubic).reshape(size, size, 3)


@_compile
def shift_rows(image, shifts, bicubic, fill):
  """Pixel (x, y) becomes that at (x + shifts[y], y); `fill` beyond the edges.

  Pillow's cubic is Keys' with a = -1 here, and with a = -0.5 where it resizes.

  Args:
    image: uint8 [H, W, 3].
    shifts: float64 [H], pixels.
    bicubic: the filter; else bilinear.
    fill: three values.

  Returns:
    uint8 [H, W, 3].
  """
  height, width, _ = image.shape
  out = np.empty((height, width * 3), np.uint8)
  row = np.empty((width + 4) * 3)  # Two pixels repeat the edge on each side.
  for y in range(height):
    for c in range(3):
      row[c] = row[3 + c] = image[y, 0, c]
      row[(width + 2) * 3 + c] = row[(width + 3) * 3 + c] = (
          image[y, width - 1, c])
    row[6:-6] = image[y].reshape(-1)
    whole = math.floor(shifts[y])
    d = shifts[y] - whole
    # Where x + 0.5 + shift is in [0, width).
    start = min(max(math.ceil(-shifts[y] - 0.5), 0), width)
    stop = min(max(math.ceil(width - shifts[y] - 0.5), start), width)
    for x in range(width):
      if x < start or x >= stop:
        for c in range(3):
          out[y, 3 * x + c] = fill[c]
    first = 3 * (start + whole + 1)
    for i in range(3 * (stop - start)):
      k = first + i
      v1, v2, v3, v4 = row[k], row[k + 3], row[k + 6], row[k + 9]
      if bicubic:
        value = v2 + d * (v3 - v1 + d * (
            2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))
      else:
        value = v2 + (v3 - v2) * d
      out[y, 3 * start + i] = np.uint8(min(max(value, 0.0), 255.0))
  return out.reshape(height, width, 3)
