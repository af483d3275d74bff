"""Pillow's operations on pixels, compiled by Numba: the same values, faster.

Inner loops run over contiguous memory, so that they are vectorised. The
arithmetic has Pillow's types and order: resizing uses integers with 22
fractional bits and rounds between the two directions; affine maps use float64,
blends float32. Pictures are uint8 [H, W, 3]; where pixels move, each is one
uint32: red, green, blue and an unused byte.
"""

import math

import numba
import numpy as np


def compiled(function):
  """Compiles at the first call, and caches the result for other processes."""
  try:
    return numba.njit(nogil=True, cache=True)(function)
  except RuntimeError:  # There is no directory for the cache.
    return numba.njit(nogil=True)(function)


# Fractional bits of a weight.
_BITS = 22

# Rows that are resized horizontally at a time: few, to stay in the CPU's cache.
_STRIPE = 16


@compiled
def _weights(n_in: int, n_out: int, bicubic: bool):
  """The first input, the number of inputs and their weights, per output."""
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


@compiled
def _mix_rows(rows, weights, out):
  """uint8 [n_in, m] -> out [n_out, m]: weighted means of rows."""
  first, count, weights = weights
  m = rows.shape[1]
  total = np.empty(m, np.int32)
  for i in range(len(out)):
    total[:] = 1 << (_BITS - 1)
    for k in range(count[i]):
      row, w = rows[first[i] + k], weights[i, k]
      for j in range(m):
        total[j] += np.int32(row[j]) * w
    for j in range(m):
      out[i, j] = min(max(total[j] >> _BITS, 0), 255)


@compiled
def _resize_height(pixels, height, bicubic):
  """uint32 [H, W] -> [height, W]."""
  n_rows, width = pixels.shape
  out = np.empty((height, width), np.uint32)
  _mix_rows(pixels.view(np.uint8), _weights(n_rows, height, bicubic),
            out.view(np.uint8))
  return out


@compiled
def _resize_width(pixels, width, bicubic, flip):
  """uint32 [H, W] -> [H, width]; each stripe transposed, mixed and back."""
  height, n_columns = pixels.shape
  weights = _weights(n_columns, width, bicubic)
  stripe = np.zeros((n_columns, _STRIPE), np.uint32)
  mixed = np.empty((width, _STRIPE), np.uint32)
  out = np.empty((height, width), np.uint32)
  for top in range(0, height, _STRIPE):
    n = min(_STRIPE, height - top)
    for y in range(n):
      for x in range(n_columns):
        stripe[x, y] = pixels[top + y, x]
    _mix_rows(stripe.view(np.uint8), weights, mixed.view(np.uint8))
    for y in range(n):
      for x in range(width):
        out[top + y, width - 1 - x if flip else x] = mixed[x, y]
  return out


@compiled
def resize(pixels, size, bicubic, height_first, flip):
  """Resizes a picture, and mirrors it if asked.

  Args:
    pixels: uint32 [H, W].
    size: (height, width) of the result.
    bicubic: the filter; else bilinear.
    height_first: the vertical direction comes first, then the horizontal one.
    flip: whether left and right are exchanged.

  Returns:
    uint8 [height, width, 3].
  """
  height, width = size
  if height_first:
    pixels = _resize_width(_resize_height(pixels, height, bicubic), width,
                           bicubic, flip)
  else:
    pixels = _resize_height(_resize_width(pixels, width, bicubic, flip),
                            height, bicubic)
  values = pixels.view(np.uint8)
  out = np.empty((height, width, 3), np.uint8)
  for y in range(height):
    for x in range(width):
      for c in range(3):
        out[y, x, c] = values[y, 4 * x + c]
  return out


@compiled
def _padded(image):
  """uint8 [H, W, 3] -> uint32 [H + 4, W + 4]: each edge repeated twice."""
  height, width, _ = image.shape
  out = np.zeros((height + 4, width + 4), np.uint32)
  values = out.view(np.uint8)
  for y in range(height + 4):
    row = image[min(max(y - 2, 0), height - 1)]
    for x in range(width):
      for k in range(3):
        values[y, 4 * (x + 2) + k] = row[x, k]
    out[y, :2] = out[y, 2]
    out[y, width + 2:] = out[y, width + 1]
  return out


@compiled
def _interpolate(v, d, n, out):
  """Interpolates between 1, 2 or 4 rows of n values.

  d [n] is the distance from the first row, or from the second of four. The
  cubic is Keys' with a = -1; in Pillow's resize a is -0.5.
  """
  if len(v) == 1:
    for i in range(n):
      out[i] = v[0, i]
  elif len(v) == 2:
    for i in range(n):
      v1, v2 = float(v[0, i]), float(v[1, i])
      out[i] = v1 + (v2 - v1) * d[i]
  else:
    for i in range(n):
      v1, v2, v3, v4 = (float(v[0, i]), float(v[1, i]), float(v[2, i]),
                        float(v[3, i]))
      out[i] = v2 + d[i] * (v3 - v1 + d[i] * (
          2 * (v1 - v2) + v3 - v4 + d[i] * (v2 - v1 + v4 - v3)))


@compiled
def affine(image, matrix, bicubic, fill):
  """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f).

  For each row, the neighbours of all points inside the picture are collected,
  then interpolated together, first horizontally, then vertically. In a
  direction in which no point moves, one neighbour is enough.

  Args:
    image: uint8 [H, W, 3].
    matrix: float64 (a, b, c, d, e, f); a pixel's centre is at its index + 0.5.
    bicubic: the filter; else bilinear.
    fill: three values, for points outside the picture.

  Returns:
    uint8 [H, W, 3].
  """
  height, width, _ = image.shape
  a, b, c, d, e, f = matrix
  pixels = _padded(image).ravel()
  side = 4 if bicubic else 2
  n_x = 1 if a == 1 and b == 0 and c == 0 else side
  n_y = 1 if d == 0 and e == 1 and f == 0 else side
  corner = 2 - (n_y == 4), 2 - (n_x == 4)
  offset = np.array([(width + 4) * j + k
                     for j in range(n_y) for k in range(n_x)])
  neighbours = np.empty((n_y * n_x, width), np.uint32)
  dx, dy = np.empty((width, 4)), np.empty((width, 4))
  across, down = np.empty((n_y, 4 * width)), np.empty(4 * width)
  found = np.empty(4 * width, np.uint8)
  column = np.empty(width, np.int64)
  out = np.empty((height, width, 3), np.uint8)
  for y in range(height):
    n = 0
    for x in range(width):
      u = a * (x + 0.5) + b * (y + 0.5) + c
      v = d * (x + 0.5) + e * (y + 0.5) + f
      if not (0 <= u < width and 0 <= v < height):
        for k in range(3):
          out[y, x, k] = fill[k]
        continue
      left, top = math.floor(u - 0.5), math.floor(v - 0.5)
      dx[n], dy[n] = u - 0.5 - left, v - 0.5 - top
      at = (top + corner[0]) * (width + 4) + left + corner[1]
      for k in range(len(offset)):
        neighbours[k, n] = pixels[np.uint64(at + offset[k])]
      column[n] = x
      n += 1
    for j in range(n_y):
      _interpolate(neighbours[j * n_x:(j + 1) * n_x].view(np.uint8), dx.ravel(),
                   4 * n, across[j])
    _interpolate(across, dy.ravel(), 4 * n, down)
    for i in range(4 * n):
      found[i] = np.int32(min(max(down[i], 0.0), 255.0))
    for i in range(n):
      for k in range(3):
        out[y, column[i], k] = found[4 * i + k]
  return out


@compiled
def histogram(image):
  """uint8 [H, W, 3] -> int64 [3, 256]: the number of pixels of each value."""
  out = np.zeros((3, 256), np.int64)
  for y in range(image.shape[0]):
    for x in range(image.shape[1]):
      for c in range(3):
        out[c, image[y, x, c]] += 1
  return out


@compiled
def look_up(image, table):
  """Replaces the values of uint8 [H, W, 3] by those of a uint8 [3, 256]."""
  out = np.empty_like(image)
  for y in range(image.shape[0]):
    for x in range(image.shape[1]):
      for c in range(3):
        out[y, x, c] = table[c, image[y, x, c]]
  return out


@compiled
def _gray(pixel):
  """BT.601's luma, with 16 fractional bits and rounded as in Pillow."""
  return (np.int32(pixel[0]) * 19595 + np.int32(pixel[1]) * 38470
          + np.int32(pixel[2]) * 7471 + 0x8000) >> 16


@compiled
def mean_gray(image):
  """The mean of the gray picture of uint8 [H, W, 3]."""
  total = 0
  for y in range(image.shape[0]):
    for x in range(image.shape[1]):
      total += _gray(image[y, x])
  return total / (image.shape[0] * image.shape[1])


@compiled
def _blend(one, other, factor, out):
  """Blends rows: `one` at factor 0, `other` at 1; also beyond. In float32."""
  for i in range(len(out)):
    first = np.float32(one[i])
    value = first + factor * (np.float32(other[i]) - first)
    out[i] = np.int32(min(max(value, np.float32(0)), np.float32(255)))


@compiled
def color(image, factor):
  """Blends gray (factor 0) and uint8 [H, W, 3] (1); the factor is float32."""
  height, width, _ = image.shape
  out = np.empty((height, width * 3), np.uint8)
  gray = np.empty((width, 3), np.int32)
  for y in range(height):
    for x in range(width):
      gray[x] = _gray(image[y, x])
    _blend(gray.ravel(), image[y].ravel(), factor, out[y])
  return out.reshape(height, width, 3)


@compiled
def sharpness(image, factor):
  """Blends smoothed (factor 0) and uint8 [H, W, 3] (1); the factor is float32.

  A smoothed pixel is 5/13 of itself and 1/13 of each of its 8 neighbours;
  pixels at the border do not change.
  """
  height, width, _ = image.shape
  rows = image.reshape(height, width * 3)
  out = rows.copy()
  three = np.empty(width * 3, np.int32)
  smooth = np.empty(max(width * 3 - 6, 0), np.int32)
  for y in range(1, height - 1):
    above, row, below = rows[y - 1], rows[y], rows[y + 1]
    for i in range(width * 3):
      three[i] = np.int32(above[i]) + np.int32(row[i]) + np.int32(below[i])
    inner, middle, right = row[3:], three[3:], three[6:]
    for i in range(len(smooth)):
      total = three[i] + middle[i] + right[i] + 4 * np.int32(inner[i])
      # Rounds to the nearest: no quotient is within 1/26 of a half.
      smooth[i] = np.int32((np.float32(total) + np.float32(6.5))
                           * np.float32(1 / 13))
    _blend(smooth, inner, factor, out[y, 3:-3])
  return out.reshape(height, width, 3)
