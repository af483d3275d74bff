"""Operations of automatic augmentation on one image, on the device.

Each computes what Pillow's does on the host (`data.augment.pixels`), with the
same roundings. Coordinates are float32 here and float64 there, so that a value
can differ by 1 where it is cut to an integer, and a point on the image's border
can be on its other side.

Images are uint8 [H, W, 3]. An argument is a float32 scalar: of rotate in
degrees, of shears and translations relative to the image's side, of the
enhancements the factor, for which 1 changes nothing.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

# The mean of a gray image is computed from a sum in 32 bits.
MAX_SIDE = 4096

# Side of a tile of points, and of the square of pixels that are the neighbours
# of such a tile however it is turned: 31 sqrt(2) + 5, in eights.
_TILE, _SQUARE = 32, 56

# The largest radius of `blur`: its boxes have at most 5 pixels.
MAX_BLUR = 2.0


def apply(image: jax.Array, number: jax.Array, argument: jax.Array,
          bicubic: jax.Array, fill: tuple[int, ...]) -> jax.Array:
  """Applies an operation to one image; a batch of them is for `lax.map`.

  `jax.vmap` would compute all operations for every image.

  Args:
    image: uint8 [H, W, 3], with sides of at most `MAX_SIDE`.
    number: int32, of the operation in `NAMES`.
    argument: float32; see above.
    bicubic: bool, the filter of operations that move pixels; else bilinear.
    fill: the colour of pixels from outside the image.

  Returns:
    uint8 [H, W, 3].
  """
  # Three arrays [H, W] fill a TPU's registers; three channels of 128 do not.
  planes = image.transpose(2, 0, 1).astype(jnp.int32)
  colour = jnp.array(fill, jnp.int32).reshape(3, 1, 1)
  branches = [functools.partial(f, fill=colour) if f in _MOVING else
              functools.partial(_still, f) for f in _OPERATIONS.values()]
  planes = lax.switch(number, branches, planes, argument, bicubic)
  return planes.transpose(1, 2, 0).astype(jnp.uint8)


def _still(operation: Callable[..., jax.Array], planes: jax.Array,
           argument: jax.Array, bicubic: jax.Array) -> jax.Array:
  del bicubic
  return operation(planes, argument)


# Operations on values: int32 [3, H, W], argument -> int32 [3, H, W].


def _cut(values: jax.Array) -> jax.Array:
  """To integers from 0 to 255, towards zero."""
  return values.clip(0, 255).astype(jnp.int32)


def _blend(one: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
  """`one` at factor 0, `other` at 1; also beyond."""
  one, other = one.astype(jnp.float32), other.astype(jnp.float32)
  return _cut(one + factor * (other - one))


def _none(v, argument):
  del argument
  return v


def _auto_contrast(v, argument):
  """Maps the range of each channel to 0 to 255."""
  del argument
  least, most = (f(v, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
  spread = jnp.maximum(most - least, 1)
  scaled = (v - least) * 255
  quotient = (scaled.astype(jnp.float32) / spread.astype(jnp.float32)
              ).astype(jnp.int32)
  # A device's quotient may be inexact.
  rest = scaled - quotient * spread
  quotient += (rest >= spread).astype(jnp.int32) - (rest < 0)
  return jnp.where(most > least, quotient, v)


def _equalize(v, argument):
  """Makes each channel's histogram uniform.

  The histogram and the look-up are matrix products over the two hexadecimal
  digits of a value, exact in any precision: a TPU has no fast scatter or
  gather.
  """
  del argument
  digits = jnp.arange(16).reshape(1, 1, 16)
  high, low = ((x.reshape(3, -1, 1) == digits).astype(jnp.float32)
               for x in (v >> 4, v & 15))
  counts = jnp.einsum("cni,cnj->cij", high, low).reshape(3, 256)
  counts = counts.astype(jnp.int32)
  n = v.shape[1] * v.shape[2]
  most = v.max(axis=(1, 2))
  last = jnp.take_along_axis(counts, most[:, None], 1)
  step = (n - last) // 255
  before = jnp.cumsum(counts, 1) - counts
  table = jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255)
  table = jnp.where(step > 0, table, jnp.arange(256)[None])
  rows = jnp.einsum("cni,cij->cnj", high,
                    table.astype(jnp.float32).reshape(3, 16, 16))
  return (rows * low).sum(-1).astype(jnp.int32).reshape(v.shape)


def _invert(v, argument):
  del argument
  return 255 - v


def _posterize(v, bits):
  """Keeps this many bits; with 0, black."""
  return v & (0xFF00 >> bits.astype(jnp.int32))


def _solarize(v, threshold):
  """Inverts values from the threshold on."""
  return jnp.where(v < threshold, v, 255 - v)


def _solarize_add(v, added):
  return jnp.where(v < 128, jnp.minimum(v + added.astype(jnp.int32), 255), v)


def _gray(v):
  """BT.601's luma [H, W], rounded as in Pillow."""
  return (v[0] * 19595 + v[1] * 38470 + v[2] * 7471 + 0x8000) >> 16


def _color(v, factor):
  return _blend(jnp.broadcast_to(_gray(v), v.shape), v, factor)


def _contrast(v, factor):
  """Blends with the rounded mean of the gray image."""
  n = jnp.uint32(v.shape[1] * v.shape[2])
  total = _gray(v).astype(jnp.uint32).sum()
  return _blend(((total + n // 2) // n).astype(jnp.int32), v, factor)


def _brightness(v, factor):
  return _blend(jnp.int32(0), v, factor)


def _sharpness(v, factor):
  """Blends with the smoothed image: 5/13 of a pixel, 1/13 of neighbours."""
  height, width = v.shape[1:]
  if min(height, width) < 3:
    return v
  rows = v[:, :-2] + v[:, 1:-1] + v[:, 2:]
  inner = v[:, 1:-1, 1:-1]
  total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
  # Rounds to the nearest: no quotient is within 1/26 of a half.
  smooth = ((total.astype(jnp.float32) + 6.5) * jnp.float32(1 / 13)
            ).astype(jnp.int32)
  return v.at[:, 1:-1, 1:-1].set(_blend(smooth, inner, factor))


def _blur(v, radius):
  """Pillow's Gaussian: three boxes in each direction, rounded after each.

  A box has a fractional radius, and its weights 24 bits (libImaging/BoxBlur.c;
  Gwosdek et al., 2011, "Theoretical foundations of Gaussian convolution by
  extended box filtering").
  """
  variance = radius * radius / 3
  whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
  box = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (
      6 * (variance - (whole + 1) ** 2))
  weight = (2.0 ** 24 / (2 * box + 1)).astype(jnp.uint32)
  wide = box >= 1
  n = jnp.where(wide, 3, 1).astype(jnp.uint32)
  edge = (jnp.uint32(2 ** 24) - n * weight) // 2
  weights = (weight, jnp.where(wide, weight, edge),
             jnp.where(wide, edge, 0).astype(jnp.uint32))

  def along(axis, v):
    size = v.shape[axis]
    padded = jnp.pad(v, [(2, 2) if i == axis else (0, 0) for i in range(3)],
                     mode="edge")
    taps = [lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(5)]
    return (taps[2] * weights[0] + (taps[1] + taps[3]) * weights[1]
            + (taps[0] + taps[4]) * weights[2] + jnp.uint32(2 ** 23)) >> 24

  v = v.astype(jnp.uint32)
  for axis in (2, 1):
    # In a loop, as a compiler that fused it would compute pixels many times.
    v = lax.fori_loop(0, 3, lambda _, v, axis=axis: along(axis, v), v)
  return v.astype(jnp.int32)


# Operations that move pixels. Three values are one integer while they move.


def _packed(v: jax.Array) -> jax.Array:
  """int32 [3, H, W] -> [H, W]."""
  return v[0] | v[1] << 8 | v[2] << 16


def _unpacked(x: jax.Array) -> jax.Array:
  """int32 [...] -> float32 [3, ...]."""
  return jnp.stack([x & 255, x >> 8 & 255, x >> 16]).astype(jnp.float32)


def _interpolate(v: list[jax.Array], d: jax.Array,
                 bicubic: jax.Array) -> jax.Array:
  """Interpolates at a distance d from the second of four neighbours.

  The cubic is Keys' with a = -1, as in Pillow's affine maps.
  """
  v1, v2, v3, v4 = v
  cubic = v2 + d * (v3 - v1 + d * (
      2 * (v1 - v2) + v3 - v4 + d * (v2 - v1 + v4 - v3)))
  return jnp.where(bicubic, cubic, v2 + (v3 - v2) * d)


def _shift_rows(v, shift, bicubic, fill):
  """The pixel at x of row y becomes that at x + shift[y], of int32 [3, H, W].

  Rows are rolled by the bits of their shift, one after the other, because a TPU
  has no fast gather. A point is inside the image if it is in a pixel.
  """
  width = v.shape[2]
  whole = jnp.floor(shift)
  point = _centres(width)[None] + shift[:, None]
  inside = (point >= 0) & (point < width)
  n = width + 4
  rows = jnp.pad(_packed(v), ((0, 0), (2, 2)), mode="edge")
  # Rows that are shifted further have no point inside.
  places = (whole.clip(-n, n).astype(jnp.int32) % n)[:, None]
  rows = lax.fori_loop(
      0, (n - 1).bit_length(), lambda bit, rows: jnp.where(
          places >> bit & 1, jnp.roll(rows, -(1 << bit), 1), rows), rows)
  taps = [_unpacked(rows[:, i:i + width]) for i in range(1, 5)]
  d = (shift - whole).reshape(1, -1, 1)
  return jnp.where(inside[None], _cut(_interpolate(taps, d, bicubic)), fill)


def _centres(n: int) -> jax.Array:
  return jnp.arange(n, dtype=jnp.float32) + 0.5


def _shear_x(v, value, bicubic, fill):
  return _shift_rows(v, value * _centres(v.shape[1]), bicubic, fill)


def _translate_x(v, value, bicubic, fill):
  shift = jnp.full(v.shape[1], value * v.shape[2])
  return _shift_rows(v, shift, bicubic, fill)


def _along_y(operation):
  """The same for columns."""

  def transposed(v, value, bicubic, fill):
    return operation(v.swapaxes(1, 2), value, bicubic, fill).swapaxes(1, 2)

  return transposed


_shear_y, _translate_y = _along_y(_shear_x), _along_y(_translate_x)


def _rotate(v, degrees, bicubic, fill):
  """Rotates counter-clockwise about the centre."""
  height, width = v.shape[1:]
  angle = -degrees * (jnp.pi / 180)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  x, y = width / 2, height / 2
  matrix = (cos, sin, x - x * cos - y * sin, -sin, cos, y + x * sin - y * cos)
  found = lax.platform_dependent(v, matrix, bicubic, tpu=turned_by_products,
                                 default=turned_by_gathers)
  column, row = _points(matrix, _centres(width)[None],
                        _centres(height)[:, None])
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  return jnp.where(inside[None], found, fill)


def _points(matrix, x, y):
  a, b, c, d, e, f = matrix
  return a * x + b * y + c, d * x + e * y + f


def turned_by_gathers(v: jax.Array, matrix: tuple[jax.Array, ...],
                      bicubic: jax.Array) -> jax.Array:
  """The pixel at (x, y) becomes that at (a x + b y + c, d x + e y + f).

  Args:
    v: int32 [3, H, W], from 0 to 255.
    matrix: (a, b, c, d, e, f); a pixel's centre is at its index + 0.5.
    bicubic: the filter of Pillow's affine maps; else bilinear.

  Returns:
    int32 [3, H, W]; meaningless where the point is outside the image.
  """
  height, width = v.shape[1:]
  column, row = _points(matrix, _centres(width)[None],
                        _centres(height)[:, None])
  left, top = jnp.floor(column - 0.5), jnp.floor(row - 0.5)
  dx, dy = column - 0.5 - left, row - 0.5 - top
  first = ((top.astype(jnp.int32) + 2) * (width + 4)
           + left.astype(jnp.int32) + 2)
  pixels = jnp.pad(_packed(v), 2, mode="edge").reshape(-1)
  steps = jnp.arange(-1, 3)
  at = first[None, None] + ((width + 4) * steps[:, None] + steps[None])[
      ..., None, None]
  # [3, 4, 4, H, W]: rows and columns of neighbours.
  taps = _unpacked(pixels.at[at].get(mode="clip"))
  rows = _interpolate([taps[:, :, i] for i in range(4)], dx[None, None],
                      bicubic)
  return _cut(_interpolate([rows[:, i] for i in range(4)], dy[None], bicubic))


def turned_by_products(v: jax.Array, matrix: tuple[jax.Array, ...],
                       bicubic: jax.Array) -> jax.Array:
  """As `turned_by_gathers`, for a matrix that only turns and moves.

  A TPU gathers one value after the other. Here each tile of points takes the
  square of pixels that holds its neighbours, and weighs its rows by a matrix
  product, and then its columns.
  """
  height, width = v.shape[1:]
  n_y, n_x = -(-height // _TILE), -(-width // _TILE)
  image = jnp.pad(v.astype(jnp.float32), [(0, 0)] + [
      (2, 2 + max(0, _SQUARE - n)) for n in (height, width)], mode="edge")
  around = _centres(_TILE) - _TILE / 2
  turned = _points((*matrix[:2], 0, *matrix[3:5], 0), around[None],
                   around[:, None])

  def weights(centre, offsets, n):
    """The first of the pixels, and their weights for each point of a tile."""
    # As an index into the padded image.
    first = jnp.floor(centre + (1.5 - _SQUARE / 2)).clip(0, n - _SQUARE)
    points = offsets.reshape(-1, 1) + (centre + 1.5 - first)
    d = jnp.abs(points - jnp.arange(_SQUARE, dtype=jnp.float32)[None])
    cubic = jnp.where(d < 1, (d - 2) * d * d + 1, ((5 - d) * d - 8) * d + 4)
    return first.astype(jnp.int32), jnp.where(
        bicubic, jnp.where(d < 2, cubic, 0), jnp.maximum(1 - d, 0))

  def tile(i):
    x, y = ((n * _TILE + _TILE / 2).astype(jnp.float32)
            for n in (i % n_x, i // n_x))
    (left, across), (top, down) = map(
        weights, _points(matrix, x, y), turned, image.shape[:0:-1])
    square = lax.dynamic_slice(image, (0, top, left), (3, _SQUARE, _SQUARE))
    rows = jnp.einsum("pv,cvu->cpu", down, square,
                      precision=lax.Precision.HIGHEST)
    return i + 1, (rows * across[None]).sum(-1)

  _, found = lax.scan(lambda i, _: tile(i), 0, length=n_y * n_x)
  found = found.reshape(n_y, n_x, 3, _TILE, _TILE).transpose(2, 0, 3, 1, 4)
  found = found.reshape(3, n_y * _TILE, n_x * _TILE)[:, :height, :width]
  # The weights' sum is rounded, and so are integers that it should give.
  return _cut(found + 1e-3)


_OPERATIONS = {
    "none": _none, "auto_contrast": _auto_contrast, "equalize": _equalize,
    "invert": _invert, "rotate": _rotate, "posterize": _posterize,
    "solarize": _solarize, "solarize_add": _solarize_add, "color": _color,
    "contrast": _contrast, "brightness": _brightness, "sharpness": _sharpness,
    "shear_x": _shear_x, "shear_y": _shear_y, "translate_x": _translate_x,
    "translate_y": _translate_y, "blur": _blur}
_MOVING = (_rotate, _shear_x, _shear_y, _translate_x, _translate_y)

# By the numbers that `apply` takes; the first changes nothing.
NAMES = tuple(_OPERATIONS)
