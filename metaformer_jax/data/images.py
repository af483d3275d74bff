"""Decoding images; nothing else in the package does it.

The first bytes of a file decide its format, not its name. The pixels are those
of Pillow's `Image.open(file).convert("RGB")`, as timm and torchvision read it:
transparency is dropped, not blended; CMYK in JPEGs is Adobe's; only the first
of several frames is used; EXIF's orientation is not applied, because the
published accuracies were measured without it (Pillow itself applies a TIFF's).
This module differs only where `convert` would clip values: 16-bit gray keeps
its high bytes, and pixels without a defined white are refused.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaformer_jax.config import schema

# No others: Pillow's EPS decoder, for example, runs a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")

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
      memory is allocated for its pixels.

  Raises:
    Exception: of many types, like Pillow's. The image is truncated, damaged, in
      another format or too large; its metadata decompresses to too much; or its
      pixels are floats or 32-bit integers, for which white is not defined.
  """
  if not isinstance(image, bytes):
    if image.ndim == 3 and image.shape[-1] == 1:
      image = image[..., 0]
    return _rgb(Image.fromarray(image))
  # Also limits a GIF's frame and a TIFF's tile, which can exceed the picture.
  Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
  try:
    picture = Image.open(io.BytesIO(image), formats=FORMATS)
  except UnidentifiedImageError as e:
    raise UnidentifiedImageError(
        f"cannot identify an image in {len(image)} bytes that begin with "
        f"{image[:16]!r}") from e
  with picture:
    width, height = picture.size
    if width * height > max_pixels:
      raise ValueError(f"{width} x {height} pixels are more than "
                       f"config.data.max_pixels, {max_pixels}")
    picture.load()
    return _rgb(picture)


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
