"""Decoding images; nothing else in the package does it.

The first bytes of a file decide its format, not its name. The pixels are those
of Pillow's `Image.open(file).convert("RGB")`, as timm and torchvision read it:
transparency is dropped, not blended; CMYK in JPEGs is Adobe's; only the first
of several frames is used; EXIF's orientation is not applied, because the
published accuracies were measured without it (Pillow itself applies a TIFF's).
This module differs only where `convert` would clip values: 16-bit gray keeps
its high bytes, and pixels without a defined white are refused.

Label maps are PNGs. A label is the number that the file holds for a pixel: a
gray value, or an index of the palette whatever its colours.
"""

import io
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaformer_jax.config import schema
from metaformer_jax.data import image_costs, png

# No others: Pillow's EPS decoder, for example, runs a program; and nothing that
# can be read off a JPEG 2000 says how long its decoder takes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")

# JPEG's largest side, and more than WebP's. Some work grows with a side alone:
# a pixel becomes a row of a resized image.
MAX_SIDE = 65_535

# Processor time of a file: a fixed part, and that of each of `max_pixels`. The
# slowest decoders take less for them, those that are written in Python more.
_SECONDS, _PIXELS_PER_SECOND = 10, 5_000_000

# Whatever files of at most so many bytes hold takes less time, and looking at
# the time would be a part of it; but for TIFFs, which can use bytes again.
_UNTIMED = 2**20

# Where a PNG has its bits per value.
_BIT_DEPTH = 24

# Pillow warns about metadata that nothing here reads, and about images above
# its limit of pixels. It refuses those above twice the limit; `decode` refuses
# by a limit of its own.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(image: bytes | np.ndarray,
           max_pixels: int = schema.Data.max_pixels) -> Image.Image:
  """An image as an RGB picture.

  Args:
    image: encoded, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of
      uint8, or [H, W] of uint16.
    max_pixels: an encoded image with more is refused, by its header, before
      memory is allocated for its pixels; and so is one that takes far longer
      than so many pixels do.

  Raises:
    Exception: of many types, like Pillow's. The image is truncated, damaged, in
      another format, too large or too slow; its metadata decompresses to too
      much; its pixels are floats or 32-bit integers, for which white is not
      defined; or an array has another shape.
  """
  if not isinstance(image, bytes):
    _check_array(image)
    if image.ndim == 3 and image.shape[-1] == 1:
      image = image[..., 0]
    return _rgb(Image.fromarray(image))
  with _open(io.BytesIO(image), max_pixels, FORMATS) as picture:
    if picture.format == "JPEG":
      image_costs.check_jpeg(image, picture, max_pixels)
    picture.load()
    return _rgb(picture)


def size(file: BinaryIO,
         max_pixels: int = schema.Data.max_pixels) -> tuple[int, int]:
  """(height, width) of an encoded image by its header; no pixel is decoded.

  Raises:
    Exception: of many types. The header is damaged, of another format, or says
      that there are more than `max_pixels`.
  """
  with _open(file, max_pixels, FORMATS) as picture:
    width, height = picture.size
  return height, width


def decode_labels(labels: bytes | np.ndarray,
                  max_pixels: int = schema.Data.max_pixels) -> np.ndarray:
  """A label map as integers [H, W], the numbers that its file holds.

  Args:
    labels: a PNG with one value per pixel: gray of 1 to 16 bits, or indices of
      a palette; or an array of integers, which is returned as it is.
    max_pixels: as for `decode`.

  Raises:
    Exception: of many types. The file is truncated, damaged, of another format
      or too large; it is a picture in colour, or has transparency; or the array
      has another shape.
  """
  if not isinstance(labels, bytes):
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(f"an array {list(labels.shape)} of {labels.dtype} is "
                       "not a label map; give integers [H, W]")
    return labels
  found = png.decode(labels, max_pixels)
  if found is not None:
    return found
  with _open(io.BytesIO(labels), max_pixels, ("PNG",)) as picture:
    if picture.mode not in ("1", "L", "P", "I") and not (
        picture.mode.startswith("I;16")):
      raise ValueError(
          f"a label map of mode {picture.mode} has {len(picture.getbands())} "
          "values per pixel; save the numbers of the classes as 8-bit gray")
    found = np.array(picture)
  if picture.mode == "1":
    return found.astype(np.uint8)
  # Pillow spreads the values of gray with 2 or 4 bits over 0 to 255.
  scale = {2: 85, 4: 17}.get(labels[_BIT_DEPTH], 1)
  return found // scale if picture.mode == "L" and scale > 1 else found


def _open(file: BinaryIO, max_pixels: int,
          formats: tuple[str, ...]) -> Image.Image:
  """Opens an encoded picture; ValueError if it has more than `max_pixels`."""
  is_tiff, n_bytes = file.read(2) in (b"II", b"MM"), file.seek(0, io.SEEK_END)
  file.seek(0)
  if is_tiff:
    image_costs.check_tiff(file.read())
    file.seek(0)
  if is_tiff or n_bytes > _UNTIMED:
    file = image_costs.Timed(file, _SECONDS + max_pixels / _PIXELS_PER_SECOND)
  # Also limits a GIF's frame and a TIFF's tile, which can exceed the picture.
  Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
  try:
    picture = Image.open(file, formats=formats)
  except UnidentifiedImageError as e:
    kind = "a PNG" if formats == ("PNG",) else "an image"
    n = file.seek(0, io.SEEK_END)
    file.seek(0)
    raise UnidentifiedImageError(
        f"cannot identify {kind} in {n} bytes that begin with "
        f"{file.read(16)!r}") from e
  try:
    check_size(picture.size, max_pixels)
    if max(picture.size) > MAX_SIDE:
      raise ValueError("{} x {} pixels: a side is longer than {}".format(
          *picture.size, MAX_SIDE))
  except ValueError:
    picture.close()
    raise
  return picture


def check_size(size: tuple[int, int], max_pixels: int, what: str = "") -> None:
  """ValueError if a picture of (width, height) has more than `max_pixels`.

  `what` says which picture it is, and ends with a space.
  """
  width, height = size
  if width * height > max_pixels:
    raise ValueError(f"{what}{width} x {height} pixels are more than "
                     f"config.data.max_pixels, {max_pixels}")


def _check_array(image: np.ndarray) -> None:
  """Raises ValueError if the array is not an image, and says what it may be."""
  shape, channels = list(image.shape), (1, 3, 4)
  problem = ""
  if image.ndim == 4:
    problem = "is several images; give one at a time"
  elif image.ndim not in (2, 3):
    problem = f"has {image.ndim} axes"
  elif not image.size:
    problem = "has no pixels"
  elif image.ndim == 3 and shape[-1] not in channels:
    problem = ("has its channels first; transpose(1, 2, 0)"
               if shape[0] in channels else f"has {shape[-1]} channels")
  if problem:
    raise ValueError(f"an array {shape} {problem}; images are [H, W], "
                     "[H, W, 1], [H, W, 3] or [H, W, 4]")
  if np.issubdtype(image.dtype, np.floating):
    raise ValueError(
        f"its pixels are {image.dtype}, for which white is not defined; give "
        "uint8, as (255 * image).round().astype('uint8') of values from 0 to 1")
  gray = image.ndim == 2 or shape[-1] == 1
  if image.dtype != np.uint8 and not (image.dtype == np.uint16 and gray):
    raise ValueError(f"its pixels are {image.dtype}; give uint8, from 0 for "
                     "black to 255 for white; gray may be uint16")


def _rgb(picture: Image.Image) -> Image.Image:
  if picture.mode == "RGB":
    return picture  # convert() would copy it.
  # Pillow scales a PGM with more than 8 bits to 16, in mode I.
  if picture.mode.startswith("I;16") or (
      picture.mode == "I" and picture.format in ("PNG", "PPM")):
    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
  elif picture.mode in ("I", "F"):
    kind = "floats" if picture.mode == "F" else "32-bit integers"
    raise ValueError(f"its pixels are {kind}, for which white is not defined; "
                     "convert it to 8 or 16 bits")
  # convert() would warn about it, or search for its colour.
  picture.info.pop("transparency", None)
  return picture.convert("RGB")
