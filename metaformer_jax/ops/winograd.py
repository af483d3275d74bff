"""3x3 convolutions at stride 1 by Winograd's F(2x2, 3x3), for CPUs.

Two by two pixels of y depend on four by four of x, a tile. A transform of the
tile, times one of the kernel, element by element, is one of the result: 16
products for each pair of channels in place of 36. With all tiles of a batch,
each of the 16 is a matrix product. In the notation of Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks" (arXiv 1509.09308), 4.1,

    Y = A^T [(G g G^T) * (B^T d B)] A

and the gradients are the same products in another order. All sums are of
float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array
Padding = tuple[tuple[int, int], tuple[int, int]]

_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]], np.float32)
_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.float32) / 2


def forward(x: Array, kernel: Array, padding: Padding) -> Array:
  """The convolution.

  Args:
    x: [B, H, W, C].
    kernel: [3, 3, C, C'].
    padding: ((top, bottom), (left, right)).

  Returns:
    [B, H + top + bottom - 2, W + left + right - 2, C'], in the dtype of x.
  """
  return _convolve(x, kernel, padding, over=2)


def input_gradient(dy: Array, kernel: Array, padding: Padding) -> Array:
  """The gradient of x: the convolution of dy with the flipped kernel."""
  padding = tuple(tuple(2 - pad for pad in pads) for pads in padding)
  return _convolve(dy, kernel[::-1, ::-1], padding, over=3)


def kernel_gradient(x: Array, dy: Array, padding: Padding) -> Array:
  """The gradient of the kernel, [3, 3, C, C'], in the dtype of x."""
  size, channels = dy.shape[1:3], dy.shape[-1]
  rows, columns = _tiles(size)
  odd = [(0, n % 2) for n in size]
  dy = jnp.pad(dy, ((0, 0), *odd, (0, 0)))
  dy = dy.reshape(-1, rows, 2, columns, 2, channels).transpose(2, 4, 0, 1, 3, 5)
  dy = _transformed(_A, dy).reshape(16, -1, channels)
  products = lax.dot_general(_transformed_input(x, size, padding), dy,
                             (((1,), (1,)), ((0,), (0,))))
  gradient = _transformed(_G.T, products.reshape(4, 4, *products.shape[1:]))
  return gradient.astype(x.dtype)


def _convolve(x, kernel, padding, over):
  """`over`: the axis of the kernel that is summed."""
  size = tuple(n + sum(pads) - 2 for n, pads in zip(x.shape[1:3], padding))
  rows, columns = _tiles(size)
  weights = _transformed(_G, kernel).reshape(16, *kernel.shape[2:])
  products = lax.dot_general(
      _transformed_input(x, size, padding), weights,
      (((2,), (over - 1,)), ((0,), (0,))))
  y = _transformed(_A.T, products.reshape(4, 4, len(x), rows, columns, -1))
  y = y.transpose(2, 3, 0, 4, 1, 5).reshape(
      len(x), 2 * rows, 2 * columns, y.shape[-1])
  return y[:, :size[0], :size[1]].astype(x.dtype)


def _tiles(size):
  return tuple(-(-n // 2) for n in size)


def _transformed(matrix, x):
  """matrix x matrix^T, where x [i, j, ...] are matrices: [i', j', ...]."""
  both = jnp.asarray(np.kron(matrix, matrix))
  x = x.astype(jnp.float32)
  y = lax.dot_general(both, x.reshape(both.shape[1], *x.shape[2:]),
                      (((1,), (0,)), ((), ())))
  return y.reshape(len(matrix), len(matrix), *x.shape[2:])


def _transformed_input(x, size, padding):
  """B^T d B of all tiles, for an output of this size: [16, tiles, C].

  Tiles overlap by two pixels: sums of rows, then of columns, in place of a
  product with B, which would need a copy of each tile.
  """
  rows, columns = _tiles(size)
  edges = [(before, 2 * n + 2 - length - before, 0) for n, length, (before, _)
           in zip((rows, columns), x.shape[1:3], padding)]
  x = lax.pad(x.astype(jnp.float32), jnp.float32(0),
              [(0, 0, 0), *edges, (0, 0, 0)])
  x = _sums([x[:, i:i + 2 * rows:2] for i in range(4)], 0)
  x = _sums([x[..., j:j + 2 * columns:2, :] for j in range(4)], 1)
  return x.reshape(16, -1, x.shape[-1])


def _sums(pixels, axis):
  """B^T, along one direction; computed once, not again for each use."""
  a, b, c, d = pixels
  return lax.optimization_barrier(
      jnp.stack([a - c, b + c, c - b, b - d], axis))
