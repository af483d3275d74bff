"""Decoding: the pixels of odd files, bad files, and its cost."""

import io
import json
import pathlib
import struct
import subprocess
import sys

import image_files
import numpy as np
import pytest
from image_files import encode
from PIL import Image

from metaformer_jax.data import images


@pytest.mark.parametrize("kind", image_files.ODD)
def test_odd_files_are_decoded(kind):
  data, expected = image_files.ODD[kind]
  picture = images.decode(data)
  assert picture.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(picture), expected)


@pytest.mark.parametrize("kind", image_files.BAD)
def test_bad_files_raise(kind):
  with pytest.raises((OSError, ValueError, SyntaxError,
                      Image.DecompressionBombError)):
    images.decode(image_files.BAD[kind])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_decoded_whole_or_raises(form):
  """It never gives half a picture."""
  data = encode(image_files.NOISE, form)
  whole = np.asarray(images.decode(data))
  for n in range(0, len(data), 7):
    try:
      got = np.asarray(images.decode(data[:n]))
    except Exception:
      continue
    assert n > len(data) - 20, n
    np.testing.assert_array_equal(got, whole)


@pytest.mark.parametrize("kind, words", [
    ("html", r"in 54 bytes .* b'<!DOCTYPE html><'$"),
    ("eps", r"cannot identify .* b'%!PS-Adobe-3.0 E'$")])  # Not run, either.
def test_the_error_says_what_the_file_begins_with(kind, words):
  with pytest.raises(OSError, match=words):
    images.decode(image_files.BAD[kind])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_limit_is_on_the_product_of_the_sides(form):
  data = encode(image_files.NOISE, form)
  assert images.decode(data, 24 * 16).size == (24, 16)
  with pytest.raises(ValueError, match=r"^24 x 16 pixels .*max_pixels, 383$"):
    images.decode(data, 24 * 16 - 1)


def test_pixels_are_counted_before_any_is_decoded():
  data = image_files.png(7_000, 8_000)  # No pixel follows.
  with pytest.raises(ValueError, match=r"^7000 x 8000 pixels"):
    images.decode(data)
  with pytest.raises(OSError, match="truncated"):
    images.decode(data, 56_000_000)


def test_only_the_first_frame_counts():
  frames = [Image.new("RGB", (3, 2), c) for c in ("red", "lime")] * 50
  data = encode(frames[0], "GIF", save_all=True,
                            append_images=frames[1:])
  assert images.decode(data, 6).size == (3, 2)


def test_a_limit_above_pillows_is_used(monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
  data, expected = image_files.ODD["rgb png"]
  np.testing.assert_array_equal(images.decode(data, 384), expected)


@pytest.mark.parametrize("dtype,message", [
    ("float32", "float32, for which white is not defined; give uint8"),
    ("float64", "float64, for which white is not defined"),
    ("int32", "int32; give uint8"), ("int64", "int64; give uint8"),
    ("bool", "bool; give uint8"), ("object", "object; give uint8")])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 3)])
def test_arrays_without_a_defined_white_are_refused(dtype, message, shape):
  with pytest.raises(ValueError, match=f"^its pixels are {message}"):
    images.decode(np.full(shape, 1, dtype))


@pytest.mark.parametrize("shape,message", [
    ((3, 24, 32), r"\[3, 24, 32\] has its channels first; transpose\(1, 2, 0"),
    ((1, 24, 32), "has its channels first"), ((24, 32, 2), "has 2 channels"),
    ((24, 32, 5), "has 5 channels"), ((5, 24, 32), "has 32 channels"),
    ((2, 24, 32, 3), "is several images"), ((2, 3, 24, 32), "several images"),
    ((24,), "has 1 axes"), ((), "has 0 axes"), ((1, 1, 1, 24, 32), "has 5 ax"),
    ((0, 0), "has no pixels"), ((0, 32, 3), "has no pixels"),
    ((24, 32, 0), "has no pixels")])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_of_other_shapes_are_refused(shape, message, dtype):
  with pytest.raises(ValueError, match=rf"^an array .*{message}.*; images are"):
    images.decode(np.zeros(shape, dtype))


def test_colours_of_16_bits_are_refused():
  with pytest.raises(ValueError, match=r"uint16; .* gray may be"):
    images.decode(np.zeros((2, 3, 3), np.uint16))
  images.decode(np.zeros((2, 3, 1), np.uint16))


def test_arrays_of_16_bits_keep_the_high_byte():
  array = np.array([[0, 255, 256, 65535]], np.uint16)
  got = np.asarray(images.decode(array))
  assert got[0].tolist() == [[0] * 3, [0] * 3, [1] * 3, [255] * 3]


def test_a_gray_array_may_have_a_channel():
  array = np.array([[[0]], [[9]]], np.uint8)
  assert np.asarray(images.decode(array)).tolist() == [[[0] * 3], [[9] * 3]]


# Files and arrays written down here.


def _values(picture):
  return np.asarray(picture).tolist()


def _palette():
  picture = Image.new("P", (2, 1))
  picture.putpalette([10, 20, 30, 40, 50, 60])
  picture.putpixel((1, 0), 1)
  return picture


ENCODED = {
    "rgb png": (encode(Image.new("RGB", (1, 1), (1, 2, 3))), [[[1, 2, 3]]]),
    "gray png": (encode(np.array([[0, 7, 255]], np.uint8)),
                 [[[0] * 3, [7] * 3, [255] * 3]]),
    "black and white": (encode(Image.new("1", (1, 2), 1)), [[[255] * 3]] * 2),
    "palette": (encode(_palette()), [[[10, 20, 30], [40, 50, 60]]]),
    "transparent palette": (encode(_palette(), transparency=0),
                            [[[10, 20, 30], [40, 50, 60]]]),
    # Transparency is dropped, not blended.
    "rgba": (encode(Image.new("RGBA", (1, 1), (1, 2, 3, 0))), [[[1, 2, 3]]]),
    "gray and alpha": (encode(Image.new("LA", (1, 1), (9, 0))), [[[9] * 3]]),
    # Full yellow and magenta, no cyan: red.
    "cmyk jpeg": (encode(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "JPEG",
                         quality=100), [[[255, 0, 0]]]),
    "gray jpeg": (encode(Image.new("L", (1, 1), 128), "JPEG"), [[[128] * 3]]),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_decode_gives_rgb_of_any_file(kind):
  data, expected = ENCODED[kind]
  picture = images.decode(data)
  assert picture.mode == "RGB"
  assert _values(picture) == expected


def test_decode_of_a_jpeg_is_pillows():
  data = encode(image_files.NOISE, "JPEG", quality=70)
  np.testing.assert_array_equal(
      images.decode(data), Image.open(io.BytesIO(data)))


ARRAYS = {
    "rgb": (np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
            [[[0, 1, 2], [3, 4, 5]]]),
    "rgb reversed": (np.arange(6, dtype=np.uint8).reshape(1, 2, 3)[:, ::-1],
                     [[[3, 4, 5], [0, 1, 2]]]),
    "gray": (np.array([[3], [200]], np.uint8), [[[3] * 3], [[200] * 3]]),
    "one channel": (np.array([[[3], [200]]], np.uint8),
                    [[[3] * 3, [200] * 3]]),
    "rgba": (np.array([[[1, 2, 3, 0]]], np.uint8), [[[1, 2, 3]]]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_decode_gives_rgb_of_arrays(kind):
  array, expected = ARRAYS[kind]
  picture = images.decode(array)
  assert picture.mode == "RGB"
  assert _values(picture) == expected


def test_decode_of_16_bits_keeps_black_and_order():
  data = encode(Image.fromarray(np.array([[0, 100, 65535]], np.uint16)))
  picture = images.decode(data)
  assert picture.mode == "RGB"
  assert _values(picture)[0][0] == [0, 0, 0]
  assert _values(picture)[0][2] == [255, 255, 255]


def test_decode_of_16_bits_keeps_the_brightness():
  data = encode(Image.fromarray(np.array([[0, 16384, 32768]], np.uint16)))
  np.testing.assert_allclose(
      np.asarray(images.decode(data))[0, :, 0], [0, 64, 128], atol=1)


@pytest.mark.parametrize("data", [
    b"", b"no image", encode(np.random.default_rng(0).integers(
        0, 256, (64, 64, 3), np.uint8), "JPEG")[:2000]])
def test_decode_of_a_broken_file_raises(data):
  with pytest.raises(OSError, match=r"cannot identify|truncated"):
    images.decode(data)


# Cost.


SCRIPT = """
import json, resource, struct, sys, time
from metaformer_jax.data import images

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

data, found = sys.stdin.buffer.read(), []
try:
  images.decode(b"")  # Loads Pillow's formats.
except OSError:
  pass
while data:
  n, = struct.unpack_from("<I", data)
  before, start = peak(), time.process_time()
  try:
    images.decode(data[4:4 + n])
    found.append("decoded")
  except Exception as e:
    found.append((peak() - before, time.process_time() - start))
  data = data[4 + n:]
json.dump(found, sys.stdout)
"""


def test_bombs_cost_no_memory_and_time_and_print_nothing():
  bombs = {**image_files.BOMBS,
           "that Pillow warns about": image_files.png(10_000, 10_000)}
  done = subprocess.run(
      [sys.executable, "-W", "always", "-c", SCRIPT], check=True,
      input=b"".join(struct.pack("<I", len(b)) + b for b in bombs.values()),
      capture_output=True, cwd=pathlib.Path(__file__).parents[2])
  found = dict(zip(bombs, json.loads(done.stdout), strict=True))
  for name, (kibibytes, seconds) in found.items():
    assert kibibytes < 16 * 1024 and seconds < 1, (name, found)
  assert not done.stderr


def test_damaged_metadata_is_ignored_without_a_warning():
  """With any filter of warnings."""
  exif = b"Exif\0\0II*\0\xff\xff\xff\x7f"
  data = encode(image_files.NOISE, "JPEG", exif=exif)
  script = ("import sys; from metaformer_jax.data import images; "
            "images.decode(sys.stdin.buffer.read())")
  for action in ("always", "error"):
    done = subprocess.run(
        [sys.executable, "-W", action, "-c", script], input=data, check=True,
        capture_output=True, cwd=pathlib.Path(__file__).parents[2])
    assert not done.stderr
