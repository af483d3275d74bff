"""Decodes the PNGs that label maps mostly are, in half of Pillow's time.

Pillow inflates row by row; here the whole picture is inflated at once.
"""

import struct
import zlib

import numpy as np

from metaformer_jax.data.augment.kernels import compiled

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBBBBB")

# Chunks that do not change the values of pixels, beside those that have them.
_KNOWN = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"pHYs", b"gAMA",
          b"sRGB"}

# Each takes time, even if it has no data.
_MOST_CHUNKS = 2**16


def decode(png: bytes, max_pixels: int) -> np.ndarray | None:
  """The values of a PNG of 8-bit gray or of indices of a palette.

  Args:
    png: the file.
    max_pixels: there may be no more.

  Returns:
    uint8 [H, W]; None if the file is of another kind or damaged.
  """
  try:
    size, data = _read(png)
    n = size[0] * (size[1] + 1)
    if not 0 < size[0] * size[1] <= max_pixels:
      return None
    inflate = zlib.decompressobj()
    rows = inflate.decompress(data, n + 1)
  except (ValueError, struct.error, zlib.error):
    return None
  if len(rows) != n or not inflate.eof or inflate.unused_data:
    return None
  out = np.empty(size, np.uint8)
  rows = np.frombuffer(rows, np.uint8).reshape(size[0], size[1] + 1)
  return out if _unfilter(rows, out) else None


def _read(png: bytes) -> tuple[tuple[int, int], bytes]:
  """(height, width) and the compressed data; ValueError for another kind."""
  if png[:8] != _SIGNATURE or png[12:16] != b"IHDR":
    raise ValueError
  width, height, *kind = _HEADER.unpack_from(png, 16)
  # 8 bits, gray or palette, not interlaced.
  if kind not in ([8, 0, 0, 0, 0], [8, 3, 0, 0, 0]):
    raise ValueError
  found, data, place = set(), [], 8
  for _ in range(_MOST_CHUNKS):
    length, = struct.unpack_from(">I", png, place)
    name, end = png[place + 4:place + 8], place + 8 + length
    checksum, = struct.unpack_from(">I", png, end)
    if name not in _KNOWN or checksum != zlib.crc32(png[place + 4:end]):
      raise ValueError
    if name == b"IDAT":
      data.append(png[place + 8:end])
    found.add(name)
    if name == b"IEND":
      break
    place = end + 4
  else:
    raise ValueError
  if kind[1] == 3 and b"PLTE" not in found:
    raise ValueError
  return (height, width), b"".join(data)


@compiled
def _unfilter(rows, out):
  """Undoes the filters of PNG (its standard, section 9) for bytes.

  Args:
    rows: uint8 [H, W + 1]: the type of each row's filter and its bytes.
    out: uint8 [H, W], to be filled.

  Returns:
    Whether all types are known.
  """
  height, width = out.shape
  nothing = np.zeros(width, np.uint8)
  for y in range(height):
    kind, row, line = rows[y, 0], rows[y, 1:], out[y]
    above = out[y - 1] if y else nothing
    if kind == 0:
      line[:] = row
    elif kind == 2:
      for x in range(width):
        line[x] = row[x] + above[x]
    elif kind == 1:
      left = np.uint8(0)
      for x in range(width):
        left = np.uint8(row[x] + left)
        line[x] = left
    elif kind == 3:
      left = 0
      for x in range(width):
        left = (row[x] + ((left + above[x]) >> 1)) & 255
        line[x] = left
    elif kind == 4:
      left, corner = 0, 0
      for x in range(width):
        up = np.int64(above[x])
        near = left
        if up != corner:  # Else the left one is the nearest.
          a, b, c = abs(up - corner), abs(left - corner), abs(
              left + up - 2 * corner)
          near = left if a <= b and a <= c else up if b <= c else corner
        left, corner = (row[x] + near) & 255, up
        line[x] = left
    else:
      return False
  return True
