"""Resizing, rotation, shear and translation of RGB pictures.

Pillow's filters, as torchvision's and timm's transforms use them. With Numba
(the extra `fast`) all but the rotation are compiled, and give the same pixels.
"""

import numpy as np
import PIL
from PIL import Image

try:
  from metaformer_jax.data import kernels
except ImportError:
  kernels = None

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR,
              "bicubic": Image.Resampling.BICUBIC}

_TRANSPOSE = Image.Transpose.TRANSPOSE
_PILLOW = int(PIL.__version__.partition(".")[0])


def resize(picture: Image.Image, size: int, name: str) -> Image.Image:
  """Resizes to size x size."""
  if kernels is None:
    return picture.resize((size, size), RESAMPLING[name])
  width, height = picture.size
  # Pillow 13 begins with the vertical direction where that is less work.
  vertical = _PILLOW >= 13 and height > size and 2 * width < height + size
  pixels = np.asarray(picture if vertical else picture.transpose(_TRANSPOSE))
  resized = Image.fromarray(kernels.resize(pixels, size, name == "bicubic"))
  return resized.transpose(_TRANSPOSE) if vertical else resized


def rotate(picture: Image.Image, degrees: float, name: str,
           fill: tuple[int, ...]) -> Image.Image:
  """Rotates about the centre, counter-clockwise."""
  return picture.rotate(degrees, RESAMPLING[name], fillcolor=fill)


def shear(picture: Image.Image, factor: float, name: str,
          fill: tuple[int, ...]) -> Image.Image:
  """Shifts each row to the left by `factor` times its distance to the top."""
  shifts = factor * (np.arange(picture.height) + 0.5)
  return _shift(picture, shifts, (1, factor, 0, 0, 1, 0), name, fill)


def translate(picture: Image.Image, part: float, name: str,
              fill: tuple[int, ...]) -> Image.Image:
  """Shifts to the left by a part of the width."""
  shift = part * picture.width
  return _shift(picture, np.full(picture.height, shift),
                (1, 0, shift, 0, 1, 0), name, fill)


def _shift(picture, shifts, matrix, name, fill):
  """Either by rows, or by the matrix of the same map."""
  if kernels is None:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix,
                             resample=RESAMPLING[name], fillcolor=fill)
  return Image.fromarray(kernels.shift_rows(
      np.asarray(picture), shifts, name == "bicubic", fill))


def transposed(operation, picture: Image.Image, *args) -> Image.Image:
  """An operation on rows, done on columns."""
  return operation(picture.transpose(_TRANSPOSE), *args).transpose(_TRANSPOSE)
