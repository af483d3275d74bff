"""Matrix products over the channels, with a gradient that is fast on a CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import platforms


def dot_general(lhs: jax.Array, rhs: jax.Array, dimension_numbers,
                precision=None, preferred_element_type=None,
                **kwargs) -> jax.Array:
  """As `lax.dot_general`, for which it stands in `nn.Dense`.

  Args:
    lhs: x [..., C].
    rhs: the kernel [C, C'].
    dimension_numbers, precision, preferred_element_type, **kwargs: see there.

  Returns:
    [..., C'].
  """
  over_channels = (((lhs.ndim - 1,), (0,)), ((), ()))
  if rhs.ndim == 2 and dimension_numbers == over_channels and all(
      v is None for v in (precision, preferred_element_type,
                          *kwargs.values())):
    forms = platforms.Platforms(cpu=platforms.Forms(kernel_gradient=outer))
    return platforms.bilinear(_plain, forms, lhs, rhs)
  return lax.dot_general(lhs, rhs, dimension_numbers, precision,
                         preferred_element_type, **kwargs)


def _plain(x, kernel):
  return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def outer(x: jax.Array, dy: jax.Array,
          shape: tuple[int, ...]) -> jax.Array:
  """The sum of x[i] dy[i]^T over all pixels i, as a CPU computes it best.

  XLA transposes the first of two matrices whose rows are summed: here it is the
  smaller one. In JAX's own gradient of a product with [B, H, W, C], it
  transposes both.

  Args:
    x: [..., C].
    dy: [..., C'], of the same pixels.
    shape: of the result; of C x C' values.

  Returns:
    The sums, of float32, in the dtype of x.
  """
  x, dy = (v.reshape(-1, v.shape[-1]) for v in (x, dy))

  def product(a, b):
    return lax.dot_general(a, b, (((0,), (0,)), ((), ())),
                           preferred_element_type=jnp.float32)

  if x.shape[1] <= dy.shape[1]:
    total = product(x, dy)
  else:  # Without the barrier, XLA exchanges the two.
    total = lax.optimization_barrier(product(dy, x)).T
  return total.reshape(shape).astype(x.dtype)
