"""RoIAlign: the features of boxes, from the maps of a pyramid.

arXiv 1703.06870, section 3, as mmdetection 2.19 computes it
(models/roi_heads/roi_extractors/single_level_roi_extractor.py) with
mmcv's RoIAlign, aligned=True and sampling_ratio=0: a bin of a box is the mean
of n x m bilinear samples, evenly spaced, as many as the bin's height and width
in pixels of the map, rounded up.

Both axes are products with matrices of weights, so that any number of samples
has the same cost, and the gradient needs no scatter. tests/compare_roi_align.py
compares this with other forms by the TPU's compiler.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

# Bins along an axis of the boxes that are computed together. Of 448 bins, maps
# of 200 x 336 pixels and 256 channels, what lies between the two products is
# 46 MB in bfloat16, which a TPU v5e keeps on the chip.
_N_BINS = 448


def levels(boxes: jax.Array, n_levels: int = 4,
           finest: float = 56.0) -> jax.Array:
  """The map that each box is taken from: 0, the finest one, to n_levels - 1.

  floor(log2(sqrt(area) / finest + 1e-6)), within these limits, without a
  logarithm, which is not exact at powers of 2.

  Args:
    boxes: float32 [..., 4], in pixels.
    n_levels: number of maps.
    finest: boxes of map i have sides from finest 2^i pixels on, if they are
      square.

  Returns:
    int32 [...].
  """
  sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
  side = jnp.sqrt(sides[..., 0] * sides[..., 1])
  return sum(((side >= finest * (2**i - 1e-6)).astype(jnp.int32)
              for i in range(1, n_levels)), jnp.zeros(side.shape, jnp.int32))


def roi_align(maps: Sequence[jax.Array], sizes: jax.Array,
              strides: Sequence[int], boxes: jax.Array, is_box: jax.Array,
              out: int) -> jax.Array:
  """The features of the boxes of one image, each from the map of its level.

  Samples up to one pixel outside of a map have the value at its border, those
  further out are 0, and both count in the mean. No gradient reaches the boxes.

  Args:
    maps: [h, w, C], finest first; finite, also outside of the valid part.
    sizes: int32 [L, 2], height and width of the valid part of each map.
    strides: of the maps, in pixels of the image.
    boxes: float32 [R, 4], in pixels of the image.
    is_box: bool [R].
    out: bins along each axis.

  Returns:
    [R, out, out, C] of the maps' dtype; sums are in float32, those of the
    gradient as well. 0 where is_box is false, and for boxes without area.
  """
  n, dtype = len(boxes), maps[0].dtype
  boxes = lax.stop_gradient(jnp.where(is_box[:, None], boxes, 0))
  # The gradient is summed over the chunks in the dtype that these have here.
  maps = [x.astype(jnp.float32) for x in maps]

  def of_chunk(boxes):
    return _align([x.astype(dtype) for x in maps], sizes, strides, boxes, out)

  n_chunks = -(-n * out // _N_BINS)
  chunk = -(-n // n_chunks)
  boxes = jnp.pad(boxes, ((0, n_chunks * chunk - n), (0, 0)))
  features = lax.map(of_chunk, boxes.reshape(n_chunks, chunk, 4))
  return features.reshape(-1, *features.shape[2:])[:n]


def _align(maps, sizes, strides, boxes, out):
  """The features of boxes that are computed together."""
  level = levels(boxes, len(maps))
  boxes = boxes / jnp.array(strides, jnp.float32)[level][:, None]
  rows, columns = (
      bin_weights(boxes[:, i] - 0.5, boxes[:, i + 2] - boxes[:, i],
                  sizes[level, 1 - i], out, max(x.shape[1 - i] for x in maps))
      for i in (1, 0))
  total = jnp.zeros((), jnp.float32)
  for i, x in enumerate(maps):
    height, width = x.shape[:2]
    own = (level == i)[:, None, None]
    total += _average(x, jnp.where(own, rows[..., :height], 0),
                      jnp.where(own, columns[..., :width], 0))
  return total.astype(maps[0].dtype)


def _average(x, rows, columns):
  """[h, w, C], weights [R, P, h] and [R, Q, w] -> float32 [R, P, Q, C]."""
  rows, columns = rows.astype(x.dtype), columns.astype(x.dtype)
  # The longer axis first: less is left between the two products.
  if x.shape[1] >= x.shape[0]:
    y = _product("rqw,hwc->rqhc", columns, x).astype(x.dtype)
    return _product("rph,rqhc->rpqc", rows, y)
  y = _product("rph,hwc->rpwc", rows, x).astype(x.dtype)
  return _product("rqw,rpwc->rpqc", columns, y)


def _product(subscripts, *arrays):
  """In float32, which holds the products of two bfloat16 numbers exactly."""
  is_float32 = arrays[0].dtype == jnp.float32
  return jnp.einsum(subscripts, *arrays, preferred_element_type=jnp.float32,
                    precision=lax.Precision.HIGHEST if is_float32 else None)


def bin_weights(starts: jax.Array, lengths: jax.Array, sizes: jax.Array,
                n_bins: int, n_cells: int, origins: jax.Array | float = 0.0,
                cells: jax.Array | float = 1.0) -> jax.Array:
  """Weights of RoIAlign along one axis.

  A box has ceil(length / n_bins) samples a bin, evenly spaced. Those from -1 to
  0 are clamped to 0, and those from size - 1 to size to size - 1; the others
  outside of the image weigh nothing (at exactly -1 or size, rounding decides).
  Then they are interpolated between the centres of two cells; beyond the cells
  there are zeros.

  The samples of a box are an arithmetic series: those next to a cell are found
  by division, and their distances summed by the series' formula. So there may
  be any number of them.

  Args:
    starts, lengths: float32 [R], of the boxes, in pixels; 0 is the centre of
      the first one.
    sizes: [R] or a number, pixels of the image.
    n_bins: bins of a box.
    n_cells: number of cells.
    origins: [R] or a number, the centre of the first cell, in pixels.
    cells: [R] or a number, the distance of one cell to the next, in pixels.

  Returns:
    float32 [R, n_bins, n_cells]; 0 for a length of 0, or below.
  """
  # ceil(lengths / n_bins), where XLA may multiply by 1 / n_bins, which is not
  # exact; n_bins * q is.
  q = jnp.round(lengths / n_bins)
  n = jnp.maximum(q + (lengths > n_bins * q), 0)
  steps = jnp.where(n > 0, lengths / jnp.maximum(n * n_bins, 1), 1)

  starts, steps, n, sizes, origins, cells = (
      jnp.asarray(x, jnp.float32).reshape(-1, 1, 1)
      for x in (starts, steps, n, sizes, origins, cells))
  # In cells from the first one's centre; sample g is at start + (g + 1/2) step.
  start, step = (starts - origins) / cells, steps / cells
  first_pixel, last_pixel = ((x - origins) / cells for x in (0, sizes - 1))
  bins = jnp.arange(n_bins, dtype=jnp.float32)[None, :, None]

  def before(position, rounded=jnp.ceil):
    """The samples before a position: the bin's first one, or further ones."""
    return jnp.clip(rounded((position - start) / step - 0.5), bins * n,
                    (bins + 1) * n)

  # Samples from first to end - 1 are not clamped.
  first, end = before(first_pixel), before(last_pixel)
  end = jnp.maximum(first, end)
  n_low = first - before(first_pixel - 1 / cells)
  n_high = before(last_pixel + 1 / cells, lambda x: jnp.floor(x) + 1) - end

  cell = jnp.arange(-1, n_cells + 1, dtype=jnp.float32)[None, None]
  edges = jnp.clip(before(cell), first, end)
  left, middle, right = edges[..., :-2], edges[..., 1:-1], edges[..., 2:]
  cell = cell[..., 1:-1]
  total = (
      (middle - left) * (start + step * (left + middle) / 2 - (cell - 1))
      + (right - middle) * (cell + 1 - start - step * (middle + right) / 2))
  for count, position in ((n_low, first_pixel), (n_high, last_pixel)):
    total += count * jnp.maximum(1 - jnp.abs(position - cell), 0)
  return total / jnp.maximum(n, 1)
