"""Decoding images; nothing else in the package does it."""

import io

import numpy as np
from PIL import Image


def decode(image: bytes | np.ndarray) -> Image.Image:
  """An encoded image, or uint8 [H, W] or [H, W, 3], as an RGB picture."""
  if isinstance(image, bytes):
    with Image.open(io.BytesIO(image)) as picture:
      if picture.mode.startswith("I;16"):  # 16 bits, which convert() would cut.
        picture = Image.fromarray(
            (np.asarray(picture) >> 8).astype(np.uint8))
      if picture.mode != "RGB":
        return picture.convert("RGB")
      picture.load()
      return picture  # Converted, it would be copied.
  if image.ndim == 3 and image.shape[-1] == 1:
    image = image[..., 0]
  return Image.fromarray(image).convert("RGB")
