"""How label maps are decoded, and sizes read from headers."""

import io

import image_files
import numpy as np
import pytest
from PIL import Image

from metaformer_jax.data import images

LABELS = np.array([[0, 1, 2], [3, 150, 255]], np.uint8)
PNG = image_files.encode(LABELS)


def palette():
  picture = Image.fromarray(LABELS, "L")
  picture.putpalette(np.random.default_rng(0).bytes(768))
  return picture


def packed(depth):
  """A PNG of a few bits per value, of 0, 1, ... and the largest, in one row."""
  values = [0, 1, 2, 2**depth - 1]
  bits = "".join(f"{v % 2**depth:0{depth}b}" for v in values)
  row = int(bits.ljust(16, "0"), 2).to_bytes(2, "big")[:-(-len(bits) // 8)]
  return image_files.png(4, 1, depth, 0, b"\0" + row), [
      v % 2**depth for v in values]


@pytest.mark.parametrize("kind, encoded, expected", [
    ("gray", PNG, LABELS),
    ("palette", image_files.encode(palette()), LABELS),
    ("palette with transparency",
     image_files.encode(palette(), transparency=1), LABELS),
    ("16 bits", image_files.encode(LABELS.astype(np.uint16) * 200),
     LABELS.astype(int) * 200),
    ("1 bit", image_files.encode(Image.fromarray(LABELS > 1)), LABELS > 1),
    ("2 bits", packed(2)[0], [packed(2)[1]]),
    ("4 bits", packed(4)[0], [packed(4)[1]]),
    ("1 bit by hand", packed(1)[0], [packed(1)[1]]),
    ("array", LABELS, LABELS),
    ("wide array", LABELS.astype(np.int64) - 7, LABELS.astype(int) - 7)])
def test_a_label_is_the_number_in_its_file(kind, encoded, expected):
  got = images.decode_labels(encoded)
  assert np.issubdtype(got.dtype, np.integer), kind
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("encoded, message", [
    (image_files.encode(image_files.NOISE), "mode RGB has 3 values per pixel"),
    (image_files.encode(Image.new("RGBA", (3, 2))), "mode RGBA has 4 values"),
    (image_files.encode(Image.new("LA", (3, 2))), "mode LA has 2 values"),
    (image_files.encode(LABELS, "JPEG"), "cannot identify a PNG"),
    (image_files.encode(LABELS, "TIFF"), "cannot identify a PNG"),
    (b"", "cannot identify a PNG in 0 bytes"),
    (PNG[:50], "truncated|broken"),
    (image_files.BOMB, "400000000 pixels"),
    (np.zeros((2, 3, 1), np.uint8), "not a label map"),
    (np.zeros((2, 3), np.float32), "float32 is not a label map")])
def test_what_is_no_label_map_is_refused(encoded, message):
  with pytest.raises(Exception, match=message):
    images.decode_labels(encoded)


@pytest.mark.parametrize("name", image_files.ODD)
def test_a_size_is_that_of_the_decoded_image(name):
  encoded, pixels = image_files.ODD[name]
  assert images.size(io.BytesIO(encoded)) == pixels.shape[:2]


def test_a_size_needs_the_header_only():
  encoded = image_files.encode(image_files.NOISE, "JPEG")
  assert images.size(io.BytesIO(encoded[:-100])) == (16, 24)


def test_the_largest_number_of_pixels_is_that_of_the_config():
  assert images.decode_labels(PNG, 6).shape == (2, 3)
  assert images.size(io.BytesIO(PNG), 6) == (2, 3)
  for call in (images.decode_labels, lambda x, n: images.size(io.BytesIO(x),
                                                              n)):
    with pytest.raises(ValueError, match="3 x 2 pixels are more than "
                       r"config\.data\.max_pixels, 5"):
      call(PNG, 5)
