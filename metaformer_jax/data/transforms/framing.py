"""The padded sizes in which images of many sizes are evaluated.

Each is compiled once, so that a few must do for all images. Each image goes to
the one in which it is padded least.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from metaformer_jax.config import tasks

# Sides of canvases are multiples of it: of the models' total stride.
STRIDE = 32

# Sides of the canvases of images that come alone: few programs are compiled.
ALONE = 128

# More kinds of sizes than these are first made fewer, by rounding them up.
_MOST_KINDS = 1024

Size = tuple[int, int]


class Canvas(NamedTuple):
  """Heights and widths of the arrays of a batch.

  Attributes:
    images: of the images, at each of the task's `eval_scales`.
    labels: of the label maps.
  """

  images: tuple[Size, ...]
  labels: Size


def rescaled(height: int, width: int, scale: Sequence[float]) -> Size:
  """The size of an image that is made to fit a rectangle, keeping its ratio.

  As mmcv's `rescale_size`, except that no side becomes 0.

  Args:
    height, width: of the image.
    scale: the sides of the rectangle, in either order; the longer one is for
      the longer side of the image.
  """
  factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
  return tuple(max(1, int(side * factor + 0.5)) for side in (height, width))


def network_sizes(height: int, width: int,
                  task: tasks.Segmentation) -> list[tuple[Size, Size]]:
  """The sizes of an image before and after it is stretched, at each scale.

  As the official PoolFormer's AlignResize (segmentation/align_resize.py).
  """
  found = []
  for factor in task.eval_scales:
    size = rescaled(height, width, [int(side * factor) for side in task.scale])
    found.append((size, _up(size, task.eval_align)))
  return found


def _up(size: Size, multiple: int) -> Size:
  height, width = (-(-side // multiple) * multiple for side in size)
  return height, width


def needed(height: int, width: int, task: tasks.Segmentation,
           multiple: int = STRIDE) -> Canvas:
  """The canvas of one image, with sides rounded up to `multiple`."""
  return Canvas(tuple(_up(size, multiple) for _, size in
                      network_sizes(height, width, task)),
                _up((height, width), multiple))


def longest(max_pixels: int) -> int:
  """The longest side of an image that is evaluated, in pixels.

  Images of several shapes share a canvas, which has the longest height and the
  longest width of all: a few long images would make it far larger than any.
  """
  return 2 * math.isqrt(max_pixels)


def usable(sizes: np.ndarray, max_pixels: int) -> np.ndarray:
  """The sizes, int [N, 2], with 0 for images with a side beyond `longest`."""
  return np.where((sizes > longest(max_pixels)).any(1, keepdims=True), 0, sizes)


def fits(inner: Canvas, outer: Canvas) -> bool:
  """Whether all arrays of one canvas fit into those of another."""
  return all(a <= b for a, b in zip(_sides(inner), _sides(outer)))


def _sides(canvas: Canvas) -> list[int]:
  return [side for size in (*canvas.images, canvas.labels) for side in size]


def area(canvas: Canvas) -> int:
  """The pixels of all its arrays."""
  return sum(math.prod(size) for size in (*canvas.images, canvas.labels))


def choose(sizes: np.ndarray, task: tasks.Segmentation) -> tuple[Canvas, ...]:
  """Chooses canvases for the images of a data set.

  Beginning with one for each size, the two are merged whose merging adds the
  fewest pixels, until there are `task.eval_canvases`. The result depends on the
  numbers of images of each size, not on their order.

  Args:
    sizes: int [N, 2], heights and widths; 0 where they are not known.
    task: the section.

  Returns:
    Canvases in order of their area. If no size is known, a single one, for
    images of `task.crop_size`.
  """
  known = sizes[(sizes > 0).all(1)]
  if not len(known):
    return (needed(*task.crop_size, task),)
  kinds, counts = np.unique(known, axis=0, return_counts=True)
  canvases = [needed(*kind, task) for kind in kinds.tolist()]
  found, n = _joined(np.array([_sides(c) for c in canvases]), counts)
  multiple = STRIDE
  while len(found) > _MOST_KINDS:
    multiple *= 2
    found, n = _joined(-(-found // multiple) * multiple, n)
  merged = [row.reshape(-1, 2).tolist()
            for row in _merged(found, n, task.eval_canvases)]
  chosen = [Canvas(tuple(map(tuple, row[:-1])), tuple(row[-1]))
            for row in merged]
  return tuple(sorted(chosen, key=lambda canvas: (area(canvas), canvas)))


def _joined(sides: np.ndarray,
            counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Unique rows, in order, and the sum of the counts of each."""
  rows, which = np.unique(sides, axis=0, return_inverse=True)
  return rows, np.bincount(which.ravel(), counts).astype(np.int64)


def _merged(sides: np.ndarray, n: np.ndarray, most: int) -> np.ndarray:
  """Merges rows of sides [K, 2 A], which n images have, until `most` are left.

  Keeps the cheapest partner of each row, so that a merge looks at few pairs.
  """
  sides, n = sides.astype(np.int64), n.copy()
  alive = np.ones(len(sides), bool)

  def costs(i):  # Pixels that are added if the row i is merged with each other.
    both = np.maximum(sides[i], sides)
    found = (_areas(both) * (n[i] + n) - _areas(sides) * n
             - _areas(sides[i:i + 1]) * n[i]).astype(float)
    found[~alive] = math.inf
    found[i] = math.inf
    return found

  cost = np.stack([costs(i) for i in range(len(sides))])
  partner = cost.argmin(1)
  for _ in range(len(sides) - most):
    least = cost[np.arange(len(sides)), partner]
    i = int(least.argmin())
    i, j = sorted((i, int(partner[i])))
    sides[i], n[i] = np.maximum(sides[i], sides[j]), n[i] + n[j]
    alive[j] = False
    cost[j] = cost[:, j] = math.inf
    cost[i] = cost[:, i] = costs(i)
    # Those whose partner has changed, or for which the new row is cheaper.
    changed = alive & (np.isin(partner, (i, j)) | (
        cost[:, i] < cost[np.arange(len(sides)), partner]))
    changed[i] = True
    partner[changed] = cost[changed].argmin(1)
  return sides[alive]


def _areas(sides: np.ndarray) -> np.ndarray:
  """The pixels of rows of sides [K, 2 A], over all arrays: int64 [K]."""
  return (sides[:, ::2] * sides[:, 1::2]).sum(1)
