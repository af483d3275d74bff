"""Resizing and pooling of the valid part of each canvas, at static shapes.

An image lies at the top left of its canvas; its size may differ from image to
image and may be traced. Both axes are done one after the other, as products
with matrices of weights, which are zero for the padding. The functions equal
PyTorch's F.interpolate (bilinear with align_corners=False, nearest) and
AdaptiveAvgPool2d on the image alone.

Positions are computed in integers. PyTorch rounds i * (n_in / n_out) to float32
before it takes the nearest pixel, and so misses some that are on the boundary.
"""

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax import errors

Size = int | jax.Array


def sizes(mask: jax.Array) -> jax.Array:
  """Height and width of each valid part: bool [B, H, W] -> int32 [B, 2]."""
  mask = mask.astype(bool)
  return jnp.stack([mask.any(2).sum(1), mask.any(1).sum(1)], 1).astype(
      jnp.int32)


def mask(to_sizes: jax.Array, height: int, width: int) -> jax.Array:
  """Inverse of `sizes`: int32 [B, 2] -> bool [B, height, width]."""
  rows, columns = (
      jnp.arange(n)[None] < to_sizes[:, axis, None]
      for axis, n in enumerate((height, width)))
  return rows[:, :, None] & columns[:, None, :]


def linear_weights(n_in: int, n_out: int, from_size: Size | None = None,
                   to_size: Size | None = None) -> jax.Array:
  """Weights of bilinear resizing along one axis.

  Args:
    n_in, n_out: pixels of the canvases.
    from_size, to_size: pixels of the images, int32 [...]; by default the
      canvases'.

  Returns:
    float32 [..., n_out, n_in]; rows beyond to_size and columns beyond from_size
    are zero. The other rows add up to 1.
  """
  m, n, i, inside = _axis(n_in, n_out, from_size, to_size)
  # (i + 1/2) m / n - 1/2, but not below the first pixel's centre, in units of
  # 1 / (2 n).
  position = jnp.maximum((2 * i + 1) * m - n, 0)
  low = jnp.minimum(position // (2 * n), m - 1)
  part = (position - 2 * n * low).astype(jnp.float32) / (2 * n)
  high = jnp.minimum(low + 1, m - 1)
  weights = ((1 - part) * _one_hot(low, n_in)
             + part * _one_hot(high, n_in))
  return jnp.where(inside, weights, 0)


def nearest_weights(n_in: int, n_out: int, from_size: Size | None = None,
                    to_size: Size | None = None) -> jax.Array:
  """As `linear_weights`, but each pixel has one source, floor(i m / n)."""
  m, n, i, inside = _axis(n_in, n_out, from_size, to_size)
  return jnp.where(inside, _one_hot(i * m // n, n_in), 0)


def pool_weights(n_in: int, n_out: int,
                 from_size: Size | None = None) -> jax.Array:
  """Weights of adaptive average pooling along one axis: [..., n_out, n_in].

  Bin i is the mean of the pixels floor(i m / n) to ceil((i + 1) m / n), of an
  image of m; bins overlap if n does not divide m. The mean of no image is 0.
  """
  m, n, i, _ = _axis(n_in, n_out, from_size, None)
  first, end = i * m // n, -((i + 1) * -m // n)
  pixel = _along(-1, n_in, m.ndim)
  inside = (pixel >= first) & (pixel < end)
  return inside / jnp.maximum(end - first, 1).astype(jnp.float32)


WEIGHTS = {"bilinear": linear_weights, "nearest": nearest_weights}


def _axis(n_in, n_out, from_size, to_size):
  """Sizes [..., 1, 1], output pixels, and which of these are in the image.

  The second size is at least 1, to be divided by.
  """
  m, n = jnp.broadcast_arrays(*(
      jnp.asarray(canvas if size is None else size, jnp.int32)
      for canvas, size in ((n_in, from_size), (n_out, to_size))))
  m, n = m[..., None, None], n[..., None, None]
  i = _along(-2, n_out, m.ndim)
  return m, jnp.maximum(n, 1), i, (i < n) & (m > 0)


def _along(axis, n, ndim):
  """0 to n - 1 along one axis of an array with `ndim` axes."""
  shape = [1] * ndim
  shape[axis] = n
  return jnp.arange(n).reshape(shape)


def _one_hot(index, n):
  return (index == _along(-1, n, index.ndim)).astype(jnp.float32)


def apply_weights(x: jax.Array, rows: jax.Array,
                  columns: jax.Array) -> jax.Array:
  """Multiplies both axes by weights, in the weights' dtype.

  Args:
    x: [B, H, W, C]; finite.
    rows, columns: [H', H] and [W', W]; or with a first axis B, one per image.

  Returns:
    [B, H', W', C] of x's dtype.
  """
  y = x.astype(rows.dtype)
  b = "b" if rows.ndim == 3 else ""
  y = jnp.einsum(f"{b}ih,bhwc->biwc", rows, y, precision=lax.Precision.HIGHEST)
  b = "b" if columns.ndim == 3 else ""
  y = jnp.einsum(f"{b}jw,biwc->bijc", columns, y,
                 precision=lax.Precision.HIGHEST)
  return y.astype(x.dtype)


def resize(x: jax.Array, shape: tuple[int, int],
           from_sizes: jax.Array | None = None,
           to_sizes: jax.Array | None = None, *,
           method: str = "bilinear") -> jax.Array:
  """Resizes the valid part of each canvas.

  Args:
    x: [B, H, W, C]; the padding is ignored, but must be finite.
    shape: height and width of the result's canvas.
    from_sizes: height and width of the valid parts, int32 [B, 2]; None: H, W.
    to_sizes: their height and width in the result; None: `shape`.
    method: "bilinear" or "nearest".

  Returns:
    [B, *shape, C] of x's dtype, zero in the padding; bilinear is computed in
    float32, nearest is exact.
  """
  if method not in WEIGHTS:
    raise ValueError(f"unknown method {method!r}"
                     f"{errors.did_you_mean(method, WEIGHTS)}")
  if from_sizes is None and to_sizes is None:
    if x.shape[1:3] == tuple(shape):
      return x
    factor = shape[0] // x.shape[1]
    if method == "bilinear" and tuple(shape) == (factor * x.shape[1],
                                                 factor * x.shape[2]):
      return enlarge(x, factor=factor)[0]
  weights = [WEIGHTS[method](*axis) for axis in zip(
      x.shape[1:3], shape, _axes(from_sizes), _axes(to_sizes))]
  if method == "nearest":  # One product for a pixel, with 1: no rounding.
    weights = [w.astype(x.dtype) for w in weights]
  return apply_weights(x, *weights)


def _axes(sizes):
  """Sizes [B, 2] as those of both axes, [B] each; None as two."""
  return (None, None) if sizes is None else sizes.T


def by_masks(x: jax.Array, from_mask: jax.Array | None, shape: tuple[int, int],
             to_mask: jax.Array | None, *,
             method: str = "bilinear") -> jax.Array:
  """`resize`, with masks [B, H, W] and [B, *shape], or None, for the sizes."""
  return resize(x, shape, *(None if m is None else sizes(m)
                            for m in (from_mask, to_mask)), method=method)


def enlarge(x: jax.Array, mask: jax.Array | None = None, *, factor: int = 2,
            ) -> tuple[jax.Array, jax.Array | None]:
  """Bilinear resizing by a whole factor, without products of matrices.

  Args:
    x: [B, H, W, C]; its padding must be finite.
    mask: bool [B, H, W], of the valid parts; None if all is valid.
    factor: of height and width.

  Returns:
    [B, factor H, factor W, C] of x's dtype, computed in float32, undefined in
    the padding; and its mask.
  """
  y = x.astype(jnp.float32)
  for axis in (1, 2):
    y = _enlarge_axis(y, axis, mask, factor)
    mask = None if mask is None else mask.repeat(factor, axis)
  return y.astype(x.dtype), mask


def double_to(x: jax.Array, mask: jax.Array | None, shape: tuple[int, int],
              to_mask: jax.Array | None) -> jax.Array:
  """`enlarge` by 2, then `by_masks`: with masks, in one product an axis."""
  if mask is None:
    return by_masks(*enlarge(x), shape, to_mask)
  weights = []
  for n, to_n, size, to_size in zip(x.shape[1:3], shape, _axes(sizes(mask)),
                                    _axes(sizes(to_mask))):
    weights.append(jnp.matmul(
        linear_weights(2 * n, to_n, 2 * size, to_size),
        linear_weights(n, 2 * n, size, 2 * size),
        precision=lax.Precision.HIGHEST))
  return apply_weights(x, *weights)


def _enlarge_axis(x, axis, mask, factor):
  """Each pixel becomes `factor` ones, towards the one before and after it."""
  n = x.shape[axis]

  def at(first):  # Pixels from `first` on; those at the border are repeated.
    edges = [(0, 0)] * x.ndim
    edges[axis] = (1, 1)
    return lax.slice_in_dim(jnp.pad(x, edges, mode="edge"), first, first + n,
                            axis=axis)

  before, after = at(0), at(2)
  if mask is not None:
    edges = [(0, 0)] * mask.ndim
    edges[axis] = (0, 1)
    valid = lax.slice_in_dim(jnp.pad(mask, edges), 1, n + 1, axis=axis)
    after = jnp.where(valid[..., None], after, x)
  made = []
  for i in range(factor):  # From the pixel's centre, in pixels of x.
    offset = (i + 0.5) / factor - 0.5
    other = before if offset < 0 else after
    made.append((1 - abs(offset)) * x + abs(offset) * other)
  shape = list(x.shape)
  shape[axis] *= factor
  return jnp.stack(made, axis + 1).reshape(shape)


def adaptive_average_pool(x: jax.Array, side: int,
                          from_sizes: jax.Array | None = None) -> jax.Array:
  """Means over a grid of side x side bins, as PyTorch's AdaptiveAvgPool2d.

  [B, H, W, C], of valid sizes [B, 2] -> [B, side, side, C], in float32 and
  returned in x's dtype.
  """
  return apply_weights(x, *(
      pool_weights(n, side, size)
      for n, size in zip(x.shape[1:3], _axes(from_sizes))))
