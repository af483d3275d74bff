"""Boxes, maps and masks that RoIAlign and pasting are compared on; NumPy."""

import functools
import pathlib
from typing import NamedTuple

import numpy as np

# Of the canvas of the maps; a multiple of the last stride.
HEIGHT, WIDTH = 384, 640
STRIDES = (4, 8, 16, 32)
# Of the image of the masks, padded, and of that of the pasted ones.
MASKED_SIZE = (96, 128)
PASTED_SIZE = (60, 80)
N_CELLS = 28
THRESHOLDS = (0.5, 0.3)


@functools.cache
def golden():
  """What tests/golden/make_roi_align.py has written."""
  path = pathlib.Path(__file__).parent / "golden" / "roi_align.npz"
  with np.load(path) as file:
    return dict(file)


def maps() -> list[np.ndarray]:
  """float32 [h, w, 1] of each level."""
  rng = np.random.default_rng(0)
  return [rng.normal(size=(HEIGHT // s, WIDTH // s, 1)).astype(np.float32)
          for s in STRIDES]


def around(rng, n, height, width, low, high):
  """n boxes with sides from low to high, and their centres in the image."""
  center = rng.uniform((0, 0), (width, height), (n, 2))
  sides = np.exp(rng.uniform(np.log(low), np.log(high), (n, 2)))
  return np.concatenate([center - sides / 2, center + sides / 2], 1)


def boxes() -> np.ndarray:
  """float32 [500, 4]: of all levels, and degenerate ones."""
  rng = np.random.default_rng(1)
  clip = functools.partial(np.clip, a_min=0, a_max=2 * (WIDTH, HEIGHT))
  inside = clip(around(rng, 200, HEIGHT, WIDTH, 4, 600))
  whole = clip(around(rng, 60, HEIGHT, WIDTH, 4, 300)).round()
  slivers = clip(around(rng, 60, HEIGHT, WIDTH, 0.01, 5000))
  beyond = around(rng, 60, HEIGHT, WIDTH, 4, 1000)  # Partly.
  outside = around(rng, 20, HEIGHT, WIDTH, 4, 60) + 2000
  empty = around(rng, 40, HEIGHT, WIDTH, 4, 600)
  empty[:20, 2], empty[10:30, 3] = empty[:20, 0], empty[10:30, 1]
  empty[30:, 2:] = empty[30:, :2] + (1e-3, 1e-4)
  # Squares with the sides at which the level changes, and just below.
  corner = rng.integers(0, 40, (60, 2))
  sides = np.resize((111.9, 112, 223.9, 224, 447.9, 448), (60, 1))
  squares = np.concatenate([corner, corner + sides], 1)
  return np.concatenate([inside, whole, slivers, beyond, outside, empty,
                         squares]).astype(np.float32)


class Masks(NamedTuple):
  """Bitmaps of objects, and boxes that have one each.

  Attributes:
    bitmaps: uint8 [G, *MASKED_SIZE].
    boxes: float32 [R, 4].
    index: int32 [R], the object of each box.
  """

  bitmaps: np.ndarray
  boxes: np.ndarray
  index: np.ndarray


def masks() -> Masks:
  """Ellipses, rectangles and noise, of 10 to 40 pixels, some at the border."""
  rng = np.random.default_rng(2)
  height, width = MASKED_SIZE
  y, x = np.mgrid[:height, :width] + 0.5
  bitmaps, objects = [], []
  for i in range(12):
    box = around(rng, 1, height, width, 10, 40)[0]
    box = np.clip(box.round(), 0, (width, height) * 2)
    (x1, y1), (x2, y2) = box[:2], box[2:]
    bitmap = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    if i % 3 == 0:
      bitmap &= (((x - (x1 + x2) / 2) / (x2 - x1)) ** 2
                 + ((y - (y1 + y2) / 2) / (y2 - y1)) ** 2) < 0.25
    if i % 3 == 1:
      bitmap &= rng.uniform(size=bitmap.shape) < 0.6
    bitmaps.append(bitmap)
    objects.append(box)
  index = np.resize(np.arange(12), 60).astype(np.int32)
  found = np.array(objects)[index]
  found[12:] += rng.normal(0, 4, (48, 4))  # The objects' own, and others.
  found[48:52, 2] = found[48:52, 0]
  found[52:56] += 40
  found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]),
                          np.maximum(found[:, :2], found[:, 2:])], 1)
  return Masks(np.array(bitmaps, np.uint8), found.astype(np.float32), index)


class Pasted(NamedTuple):
  """float32 [n, N_CELLS, N_CELLS], and boxes in an image of PASTED_SIZE."""

  probabilities: np.ndarray
  boxes: np.ndarray


def pasted() -> Pasted:
  """Noise, smooth masks, and ones of 0 and 1 alone, which have many ties."""
  rng = np.random.default_rng(3)
  height, width = PASTED_SIZE
  n = 48
  found = around(rng, n, height, width, 1, 90)
  found[:24] = np.clip(found[:24], 0, (width, height) * 2)
  found[:12] = found[:12].round()  # Some are without width or height.
  found[12] = (10.5, 10, 10.5, 30)  # Pixels have their centres on it.
  found[13] = (20, 20.25, 20.5, 20.75)
  found[14] = (0, 0, width, height)
  found[15] = (10, 10, 38, 38)
  noise = rng.uniform(size=(n, N_CELLS, N_CELLS))
  y, x = (np.mgrid[:N_CELLS, :N_CELLS] + 0.5) / N_CELLS - 0.5
  radius = rng.uniform(0.2, 0.6, (n, 1, 1))
  smooth = 1 / (1 + np.exp(30 * (x**2 + y**2 - radius**2)))
  kind = np.arange(n)[:, None, None] % 3
  probabilities = np.select([kind == 0, kind == 1],
                            [smooth, noise < 0.5], noise)
  return Pasted(probabilities.astype(np.float32), found.astype(np.float32))
