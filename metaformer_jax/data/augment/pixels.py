"""Operations on the pixels of RGB pictures, uint8 [H, W, 3], on the host.

Each result has exactly the values that Pillow gives, as used by timm's and
torchvision's transforms. The loops over pixels are in `kernels`.
"""

import math

import numpy as np
import PIL
from PIL import Image, ImageFilter

from metaformer_jax.data.augment import draw, kernels

FILTERS = {"bilinear": Image.Resampling.BILINEAR,
           "bicubic": Image.Resampling.BICUBIC}

_PILLOW = int(PIL.__version__.partition(".")[0])
_VALUES = np.arange(256)


def crop_resize(picture: Image.Image, box: tuple[int, int, int, int],
                size: tuple[int, int], name: str, flip: bool) -> np.ndarray:
  """Crops, resizes and, if `flip`, exchanges left and right.

  Args:
    picture: RGB.
    box: (left, top, right, bottom). Nothing outside it is sampled, unlike with
      a box given to Pillow's resize().
    size: (height, width) of the result.
    name: of the filter.
    flip: whether to mirror the result.

  Returns:
    uint8 [height, width, 3].
  """
  picture = picture.crop(box)
  width, height = picture.size
  # Pillow 13 resizes vertically first where that saves work (Resample.c).
  height_first = _PILLOW >= 13 and height - size[0] > max(
      0, 2 * (width - size[1]))
  values = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32)
  return kernels.resize(values.reshape(height, width), size, name == "bicubic",
                        height_first, flip)


def fill_colour(mean: tuple[float, ...]) -> tuple[int, ...]:
  """The colour of pixels that come from outside a picture: the data's mean."""
  return tuple(min(255, round(255 * v)) for v in mean)


def apply(image: np.ndarray, op: draw.Op, fill: tuple[int, ...]) -> np.ndarray:
  """Applies one operation to uint8 [H, W, 3], which is not changed."""
  value = op.argument
  height, width, _ = image.shape
  match op.name:
    case "auto_contrast":
      return _look_up(
          image, [_stretched(counts) for counts in kernels.histogram(image)])
    case "equalize":
      return _look_up(
          image, [_equalized(counts) for counts in kernels.histogram(image)])
    case "invert":
      return 255 - image
    case "posterize":  # With 0 bits, black.
      return image & np.uint8(0xFF00 >> int(value) & 0xFF)
    case "solarize":
      return _look_up(image, np.where(value > _VALUES, _VALUES, 255 - _VALUES))
    case "solarize_add":
      return _look_up(image, _VALUES + value * (_VALUES < 128))
    case "brightness":
      return _look_up(image, _blended(0, value))
    case "contrast":
      gray = int(kernels.mean_gray(image) + 0.5)
      return _look_up(image, _blended(gray, value))
    case "color":
      return kernels.color(image, np.float32(value))
    case "sharpness":
      return kernels.sharpness(image, np.float32(value))
    case "blur":  # Pillow's approximation of a Gaussian.
      return np.asarray(Image.fromarray(image).filter(
          ImageFilter.GaussianBlur(value)))
    case "rotate":
      matrix = _rotation(value, width, height)
    case "shear_x":
      matrix = (1, value, 0, 0, 1, 0)
    case "shear_y":
      matrix = (1, 0, 0, value, 1, 0)
    case "translate_x":
      matrix = (1, 0, value * width, 0, 1, 0)
    case "translate_y":
      matrix = (1, 0, 0, 0, 1, value * height)
    case _:
      raise ValueError(f"unknown operation {op.name!r}")
  return kernels.affine(image, tuple(map(float, matrix)),
                        op.filter == "bicubic", fill)


def _look_up(image: np.ndarray, table) -> np.ndarray:
  """Replaces values by those of a table, [256] or [3, 256], at most 255."""
  tables = np.empty((3, 256), np.uint8)
  tables[:] = np.minimum(table, 255)
  return kernels.look_up(image, tables)


def _blended(value: float, factor: float) -> np.ndarray:
  """A table: the constant `value` at factor 0, the identity at 1; also beyond.

  In float32, as in Pillow.
  """
  rise = np.float32(factor) * (_VALUES - value).astype(np.float32)
  return (np.float32(value) + rise).clip(0, 255)


def _stretched(counts: np.ndarray) -> np.ndarray:
  """A table that maps the range of a histogram [256] to 0 to 255."""
  least, most = np.flatnonzero(counts)[[0, -1]]
  if least == most:
    return _VALUES
  scale = 255 / (most - least)
  return (_VALUES * scale - least * scale).clip(0, 255)


def _equalized(counts: np.ndarray) -> np.ndarray:
  """A table that makes a histogram [256] uniform."""
  step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
  if not step:
    return _VALUES
  return (step // 2 + np.cumsum(counts) - counts) // step


def _rotation(degrees: float, width: int, height: int) -> tuple[float, ...]:
  """The matrix of a counter-clockwise rotation about the centre.

  Rounded as in Pillow.
  """
  angle = -math.radians(degrees % 360)
  cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
  x, y = width / 2, height / 2
  return cos, sin, -x * cos - y * sin + x, -sin, cos, x * sin - y * cos + y
