"""OpenCV's operations on pixels, compiled by Numba: the same values, faster.

mmsegmentation resizes and converts colours with OpenCV, whose numbers differ
from Pillow's: its bilinear filter does not average when it shrinks. Only the
crop of a resized picture is computed. Pictures are uint8 [H, W, 3].

Sources: OpenCV 4 and 5, modules/imgproc/src/resize.cpp (INTER_LINEAR in fixed
point, INTER_NEAREST) and color_hsv.simd.hpp (8-bit HSV, hues below 180).
"""

import math

import numpy as np

from metaformer_jax.data.augment.kernels import compiled

# Fractional bits of a weight of the bilinear filter, and of HSV's quotients.
_BITS = 11
_HSV_BITS = 12


@compiled
def _weights(n_in, n_out, start, n, clip, flip):
  """The bilinear filter of n of n_out outputs, beginning with `start`.

  Args:
    n_in, n_out: number of inputs, and of all outputs.
    start, n: the outputs that are asked for.
    clip: an output beyond the outermost inputs has one input only; else it has
      the outermost one twice.
    flip: whether the n outputs are in reverse order.

  Returns:
    int32 [n] four times: the two inputs of each output, and their weights.
  """
  scale = 1.0 / (n_out / n_in)
  first, second = np.empty(n, np.int32), np.empty(n, np.int32)
  one, other = np.empty(n, np.int32), np.empty(n, np.int32)
  for i in range(n):
    output = start + (n - 1 - i if flip else i)
    place = np.float32((output + 0.5) * scale - 0.5)
    left = math.floor(place)
    rest = np.float32(place - np.float32(left))
    if clip and (left < 0 or left >= n_in - 1):
      rest = np.float32(0)
    first[i] = min(max(left, 0), n_in - 1)
    second[i] = min(max(left + 1, 0), n_in - 1)
    one[i] = np.int32(np.rint((np.float32(1) - rest) * np.float32(1 << _BITS)))
    other[i] = np.int32(np.rint(rest * np.float32(1 << _BITS)))
  return first, second, one, other


@compiled
def _mix_columns(row, filters, out):
  """uint8 [W, 3] -> out int32 [3 n], with 4 of the fractional bits dropped."""
  first, second, one, other = filters
  for i in range(len(first)):
    left, right = first[i], second[i]
    for c in range(3):
      out[3 * i + c] = (np.int32(row[left, c]) * one[i]
                        + np.int32(row[right, c]) * other[i]) >> 4


@compiled
def _mix_rows(above, below, one, other, out):
  """int32 [3 n] twice, of `_mix_columns` -> out uint8 [3 n]."""
  for i in range(len(out)):
    out[i] = ((one * above[i] >> 16) + (other * below[i] >> 16) + 2) >> 2


@compiled
def _halved(image, top, left, flip, out):
  """The mean of 2 x 2 pixels: what OpenCV does to halve both sides."""
  height, width, _ = out.shape
  for y in range(height):
    for column in range(width):
      x = width - 1 - column if flip else column
      for c in range(3):
        total = np.int32(2)
        for j in range(2):
          for i in range(2):
            total += image[2 * (top + y) + j, 2 * (left + x) + i, c]
        out[y, column, c] = total >> 2


@compiled
def resize(image, size, box, flip):
  """A part of the resized picture, by OpenCV's INTER_LINEAR.

  Args:
    image: uint8 [H, W, 3].
    size: (height, width) of the whole result.
    box: (top, left, height, width) of the part, inside of it.
    flip: whether left and right of the part are exchanged.

  Returns:
    uint8 [height, width, 3], of the box.
  """
  n_rows, n_columns, _ = image.shape
  top, left, height, width = box
  out = np.empty((height, width, 3), np.uint8)
  if n_rows == 2 * size[0] and n_columns == 2 * size[1]:
    _halved(image, top, left, flip, out)
    return out
  across = _weights(n_columns, size[1], left, width, True, flip)
  first, second, one, other = _weights(n_rows, size[0], top, height, False,
                                       False)
  # The two rows that were last mixed, as most are needed more than once.
  above, below = np.empty(3 * width, np.int32), np.empty(3 * width, np.int32)
  held_above, held_below = -1, -1
  flat = out.reshape(height, 3 * width)
  for y in range(height):
    if held_above != first[y]:
      above, below = below, above
      held_above, held_below = held_below, held_above
    if held_above != first[y]:
      _mix_columns(image[first[y]], across, above)
      held_above = first[y]
    if held_below != second[y]:
      _mix_columns(image[second[y]], across, below)
      held_below = second[y]
    _mix_rows(above, below, one[y], other[y], flat[y])
  return out


@compiled
def nearest(n_in, n_out, start, n):
  """The input of each of n outputs from `start` on, by INTER_NEAREST."""
  scale = 1.0 / (n_out / n_in)
  found = np.empty(n, np.int64)
  for i in range(n):
    found[i] = min(math.floor((start + i) * scale), n_in - 1)
  return found


@compiled
def take(labels, rows, columns):
  """uint8 [H, W] -> [len(rows), len(columns)]: these rows and columns."""
  out = np.empty((len(rows), len(columns)), np.uint8)
  for y in range(len(rows)):
    row = labels[rows[y]]
    for x in range(len(columns)):
      out[y, x] = row[columns[x]]
  return out


@compiled
def look_up(values, table):
  """Replaces the values of uint8 [H, W] by those of a table [256]."""
  out = np.empty(values.shape, table.dtype)
  for y in range(values.shape[0]):
    for x in range(values.shape[1]):
      out[y, x] = table[values[y, x]]
  return out


@compiled
def counts(labels):
  """uint8 [H, W] -> int64 [256]: the number of pixels of each label."""
  # Four, as neighbours often have the same label, and adding to one number
  # would wait for the last addition.
  found = np.zeros((4, 256), np.int64)
  for y in range(labels.shape[0]):
    for x in range(labels.shape[1]):
      found[x & 3, labels[y, x]] += 1
  return found.sum(0)


# Float32 throughout, where OpenCV has integers as well: all of these integers
# have less than 24 bits, and Numba's integers of 64 bits would be slow.
_HUES, _WHITE, _ONE = np.float32(180), np.float32(255), np.float32(1)
_PER_WHITE, _SIXTHS = np.float32(1 / 255), np.float32(6) / np.float32(180)
_UNIT, _HALF = np.float32(2.0 ** -_HSV_BITS), np.float32(0.5)
_30, _255 = (np.float32(v << _HSV_BITS) for v in (30, 255))
# Added and subtracted, it rounds smaller numbers to the nearest integer.
_ROUND = np.float32(1.5 * 2**23)


@compiled
def _floor(value):
  """Of a float32 that is at least -64."""
  return np.float32(np.int32(value + np.float32(64))) - np.float32(64)


@compiled
def _quotient(numerator, n):
  """numerator / n as an integer; these are the values of OpenCV's tables."""
  # As a product, because Numba checks a divisor.
  return (numerator * (_ONE / n) + _ROUND) - _ROUND


@compiled
def _to_hsv(red, green, blue):
  """float32 [W] each -> hue below 180, saturation, value, in their place."""
  for x in range(len(red)):
    r, g, b = red[x], green[x], blue[x]
    value = max(r, max(g, b))
    spread = value - min(r, min(g, b))
    hue = (b - r + np.float32(2) * spread if value == g else
           r - g + np.float32(4) * spread)
    hue = g - b if value == r else hue
    # Without spread or value, what is divided is 0.
    hue = _floor(hue * _quotient(_30, max(spread, _ONE)) * _UNIT + _HALF)
    red[x] = hue + (_HUES if hue < 0 else np.float32(0))
    green[x] = _floor(spread * _quotient(_255, max(value, _ONE)) * _UNIT
                      + _HALF)
    blue[x] = value


@compiled
def _whole(value, nearest):
  """Rounded to the nearest, or towards zero."""
  value *= _WHITE
  return ((value + _ROUND) - _ROUND if nearest else
          np.float32(np.int32(value)))


@compiled
def _to_rgb(hue, saturation, value, nearest):
  """The reverse of `_to_hsv`, rounded to the nearest or towards zero."""
  for x in range(len(hue)):
    turn = hue[x] * _SIXTHS
    sector = np.int32(turn)
    rest = turn - np.float32(sector)
    rest = rest if sector & 1 else _ONE - rest
    s, v = saturation[x] * _PER_WHITE, value[x] * _PER_WHITE
    # In float64, as OpenCV's multiply-add rounds once.
    share = np.float32(np.float64(1) - np.float64(s) * np.float64(rest))
    most, least = _whole(v, nearest), _whole(v * (_ONE - s), nearest)
    middle = _whole(v * share, nearest)
    red = most if (sector == 0) | (sector == 5) else least
    green = most if (sector == 1) | (sector == 2) else least
    blue = most if (sector == 3) | (sector == 4) else least
    hue[x] = middle if (sector == 1) | (sector == 4) else red
    saturation[x] = middle if (sector == 0) | (sector == 3) else green
    value[x] = middle if (sector == 2) | (sector == 5) else blue


@compiled
def _from_hsv(hue, saturation, value):
  """The reverse of `_to_hsv`, in the place of its values.

  OpenCV (with AVX2) rounds towards zero in vectors of 32 pixels, and to the
  nearest in the columns after the last whole one.
  """
  n = len(hue) - len(hue) % 32
  _to_rgb(hue[:n], saturation[:n], value[:n], False)
  _to_rgb(hue[n:], saturation[n:], value[n:], True)


@compiled
def distort(image, before, saturation, hue, after):
  """Looks up values, changes saturation and hue, and looks up values again.

  Args:
    image: uint8 [H, W, 3], in RGB.
    before: float32 [256], of integers, of each channel.
    saturation: float32, a factor; negative: no change.
    hue: float32, what is added, from 0 to 179 steps of 2 degrees; negative: no
      change.
    after: uint8 [256].

  Returns:
    uint8 [H, W, 3].
  """
  height, width, _ = image.shape
  out = np.empty_like(image)
  first, second, third = (np.empty(width, np.float32),
                          np.empty(width, np.float32),
                          np.empty(width, np.float32))
  for y in range(height):
    row, new = image[y], out[y]
    for x in range(width):
      first[x] = before[row[x, 0]]
      second[x] = before[row[x, 1]]
      third[x] = before[row[x, 2]]
    if saturation >= 0:
      _to_hsv(first, second, third)
      for x in range(width):
        second[x] = np.float32(np.int32(min(second[x] * saturation, _WHITE)))
      _from_hsv(first, second, third)
    if hue >= 0:
      _to_hsv(first, second, third)
      for x in range(width):
        turned = first[x] + hue
        first[x] = turned - (_HUES if turned >= _HUES else np.float32(0))
      _from_hsv(first, second, third)
    for x in range(width):
      new[x, 0] = after[np.uint8(first[x])]
      new[x, 1] = after[np.uint8(second[x])]
      new[x, 2] = after[np.uint8(third[x])]
  return out
