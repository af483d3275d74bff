"""What is done to the pixels of RGB pictures, uint8 [H, W, 3], on the host.

`kernels` does it, compiled by Numba, or, where that is missing, Pillow, as in
torchvision's and timm's transforms: the same values, more slowly.
"""

import logging

import numpy as np
import PIL
from PIL import Image, ImageEnhance, ImageFilter, ImageStat

try:
  from metaformer_jax.data.augment import kernels
except ImportError as e:
  kernels = None
  logging.getLogger(__name__).warning(
      "images are prepared at about two thirds of the speed: %s; pip install "
      "numba", e)

FILTERS = {"bilinear": Image.Resampling.BILINEAR,
           "bicubic": Image.Resampling.BICUBIC}

_PILLOW = int(PIL.__version__.partition(".")[0])


def crop_resize(picture: Image.Image, box: tuple[int, int, int, int],
                size: int, name: str, flip: bool) -> np.ndarray:
  """Resizes (left, top, right, bottom) to [size, size, 3]; mirrors it or not.

  Cropped first: a box given to Pillow's resize() also samples pixels outside.
  """
  picture = picture.crop(box)
  if kernels is None:
    picture = picture.resize((size, size), FILTERS[name])
    if flip:
      picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(picture)
  width, height = picture.size
  # Pillow 13 begins with the vertical direction where that is less work.
  height_first = (_PILLOW >= 13 and height > size
                  and 2 * width < height + size)
  pixels = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32)
  return kernels.resize(pixels.reshape(height, width), size,
                        name == "bicubic", height_first, flip)


def affine(image: np.ndarray, matrix: tuple[float, ...], name: str,
           fill: tuple[int, int, int]) -> np.ndarray:
  """(x, y) becomes what was at (a x + b y + c, d x + e y + f), or `fill`."""
  if kernels is None:
    return np.asarray(Image.fromarray(image).transform(
        image.shape[1::-1], Image.Transform.AFFINE, matrix,
        resample=FILTERS[name], fillcolor=fill))
  return kernels.affine(image, tuple(map(float, matrix)), name == "bicubic",
                        fill)


def histogram(image: np.ndarray) -> np.ndarray:
  """How often each value comes: int [3, 256]."""
  if kernels is None:
    return np.reshape(Image.fromarray(image).histogram(), (3, 256))
  return kernels.histogram(image)


def look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Replaces values by those of a table, [256] or [3, 256], cut off at 255."""
  tables = np.empty((3, 256), np.uint8)
  tables[:] = np.minimum(table, 255)
  if kernels is None:
    return np.asarray(Image.fromarray(image).point(tables.ravel().tolist()))
  return kernels.look_up(image, tables)


def mean_gray(image: np.ndarray) -> float:
  """The mean of the gray picture."""
  if kernels is None:
    return ImageStat.Stat(Image.fromarray(image).convert("L")).mean[0]
  return kernels.mean_gray(image)


def color(image: np.ndarray, factor: float) -> np.ndarray:
  """From gray (0) to the picture (1), and beyond."""
  if kernels is None:
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(
        factor))
  return kernels.color(image, np.float32(factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
  """From smooth (0) to the picture (1), and beyond."""
  if kernels is None:
    return np.asarray(ImageEnhance.Sharpness(Image.fromarray(image)).enhance(
        factor))
  return kernels.sharpness(image, np.float32(factor))


def blur(image: np.ndarray, radius: float) -> np.ndarray:
  """Pillow's approximation of a Gaussian."""
  return np.asarray(Image.fromarray(image).filter(
      ImageFilter.GaussianBlur(radius)))
