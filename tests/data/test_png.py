"""The decoder of label maps gives Pillow's values, or nothing."""

import io
import struct
import zlib

import image_files
import numpy as np
import pytest
from PIL import Image

from metaformer_jax.data import png

N = 10**6


def by_pillow(data):
  with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
    return np.array(picture)


def filtered(pixels, kinds):
  """The rows of a picture by PNG's filters, in whole-number arithmetic."""
  pixels = pixels.astype(int)
  rows = b""
  for y, kind in enumerate(kinds):
    row = pixels[y]
    left = np.append(0, row[:-1])
    up = pixels[y - 1] if y else 0 * row
    corner = np.append(0, up[:-1])
    near = left + up - corner
    distances = np.stack([abs(near - v) for v in (left, up, corner)])
    paeth = np.choose(distances.argmin(0), (left, up, corner))
    value = row - (0, left, up, (left + up) // 2, paeth)[kind]
    rows += bytes([kind]) + (value % 256).astype(np.uint8).tobytes()
  return rows


PICTURES = {
    "noise": np.random.default_rng(0).integers(0, 256, (25, 13), np.uint8),
    "steps": (np.add.outer(np.arange(25), np.arange(31)) // 9).astype(np.uint8),
    "one value": np.full((5, 7), 255, np.uint8),
    "one pixel": np.array([[77]], np.uint8),
    "one column": np.arange(20, dtype=np.uint8)[:, None],
    "one row": np.arange(20, dtype=np.uint8)[None],
}


@pytest.mark.parametrize("kind", range(6))
@pytest.mark.parametrize("name", PICTURES)
def test_every_filter_gives_pillows_values(name, kind):
  pixels = PICTURES[name]
  height, width = pixels.shape
  kinds = [kind] * height if kind < 5 else np.random.default_rng(
      1).integers(0, 5, height).tolist()
  data = image_files.png(width, height, 8, 0, filtered(pixels, kinds))
  np.testing.assert_array_equal(by_pillow(data), pixels)
  np.testing.assert_array_equal(png.decode(data, N), pixels)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("optimize", [False, True])
def test_files_of_pillow_are_read(name, optimize):
  gray = Image.fromarray(PICTURES[name])
  indexed = gray.copy()
  indexed.putpalette(np.random.default_rng(0).bytes(768))
  for data in (image_files.encode(gray, optimize=optimize),
               image_files.encode(gray, transparency=3),
               image_files.encode(indexed, bits=8, transparency=b"\0\1")):
    np.testing.assert_array_equal(png.decode(data, N), PICTURES[name])


def test_data_may_be_in_several_chunks():
  pixels = PICTURES["noise"]
  data = image_files.png(13, 25, 8, 0, filtered(pixels, [4] * 25))
  start = data.index(b"IDAT") - 4
  length, = struct.unpack_from(">I", data, start)
  content = data[start + 8:start + 8 + length]
  parts = b""
  for piece in (content[:1], b"", content[1:100], content[100:]):
    body = b"IDAT" + piece
    parts += struct.pack(">I", len(piece)) + body + struct.pack(
        ">I", zlib.crc32(body))
  data = data[:start] + parts + data[start + 12 + length:]
  np.testing.assert_array_equal(by_pillow(data), pixels)
  np.testing.assert_array_equal(png.decode(data, N), pixels)


def test_the_largest_number_of_pixels_is_kept():
  data = image_files.encode(PICTURES["noise"])
  assert png.decode(data, 25 * 13) is not None
  assert png.decode(data, 25 * 13 - 1) is None
  assert png.decode(image_files.BOMB, N) is None


ROWS = b"\0" + bytes(8)
OTHERS = {
    "16 bits": image_files.png(4, 1, 16, 0, ROWS),
    "4 bits": image_files.png(16, 1, 4, 0, ROWS),
    "colour": image_files.encode(image_files.NOISE),
    "gray and alpha": image_files.png(4, 1, 8, 4, ROWS),
    "palette without its colours": image_files.png(8, 1, 8, 3, ROWS),
    "text": image_files.png(8, 1, 8, 0, ROWS, [(b"tEXt", b"a\0b")]),
    "unknown filter": image_files.png(8, 1, 8, 0, b"\5" + bytes(8)),
    "too little data": image_files.png(8, 2, 8, 0, ROWS),
    "too much data": image_files.png(7, 1, 8, 0, ROWS),
    "no pixels": image_files.png(0, 1, 8, 0, b"\0"),
    "jpeg": image_files.encode(image_files.NOISE, "JPEG"),
    "nothing": b"",
    "signature": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_left_to_pillow(name):
  assert png.decode(OTHERS[name], N) is None


def test_a_damaged_file_is_never_read_otherwise_than_by_pillow():
  """With a byte changed, removed or added; or cut, or with the end changed."""
  whole = image_files.encode(PICTURES["steps"])
  rng = np.random.default_rng(0)
  n_none = 0
  for trial in range(600):
    data = bytearray(whole)
    place = int(rng.integers(len(data)))
    match trial % 4:
      case 0:
        data[place] ^= 1 << int(rng.integers(8))
      case 1:
        del data[place]
      case 2:
        data.insert(place, int(rng.integers(256)))
      case 3:
        del data[place:]
    got = png.decode(bytes(data), N)
    n_none += got is None
    if got is not None:
      np.testing.assert_array_equal(got, by_pillow(bytes(data)))
  assert n_none > 590
