"""Decoding images; nothing else in the package does it.

A file is what its first bytes say, whatever its name. Its pixels become those
that `Image.open(file).convert("RGB")` of Pillow gives, as timm and torchvision
read it: transparency is dropped, not blended; CMYK is Adobe's in JPEGs; of
several frames the first is taken; EXIF's orientation is not applied, as the
published accuracies were measured without (Pillow itself applies a TIFF's).
Only where that would cut off values this module differs: 16-bit gray keeps its
high bytes, and what has no fixed white is refused.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from metaformer_jax.config.schema import Data

# No others: Pillow's EPS, for one, starts a program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF", "JPEG2000")

# Pillow warns of metadata that nothing here reads. Of pixels it warns too, and
# from twice its limit on refuses: what lies between is refused here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def decode(image: bytes | np.ndarray,
           max_pixels: int = Data.max_pixels) -> Image.Image:
  """An image as an RGB picture.

  Args:
    image: encoded, or an array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] of
      uint8, or [H, W] of uint16.
    max_pixels: an encoded image of more is refused by its header, before
      memory is taken for its pixels.

  Raises:
    Exception: of many types, as Pillow's are. The image is cut off, damaged, of
      another format, or too large; its metadata expands to too much; or its
      pixels are floats or 32-bit integers, whose white nothing tells.
  """
  if not isinstance(image, bytes):
    if image.ndim == 3 and image.shape[-1] == 1:
      image = image[..., 0]
    return _rgb(Image.fromarray(image))
  # Holds for a GIF's frame and a TIFF's tile, which may exceed the picture.
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
    return picture  # Converted, it would be copied.
  # A PGM of more than 8 bits is scaled to 16 by Pillow, as mode I.
  if picture.mode.startswith("I;16") or (
      picture.mode == "I" and picture.format in ("PNG", "PPM")):
    picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
  elif picture.mode in ("I", "F"):
    kind = "floats" if picture.mode == "F" else "32-bit integers"
    raise ValueError(f"its pixels are {kind}, whose white nothing tells; "
                     "convert it to 8 or 16 bits")
  # convert() would warn of it, or search for its colour.
  picture.info.pop("transparency", None)
  return picture.convert("RGB")
