"""Self-attention among the pixels of an image, of which no weight is in HBM.

  y = softmax(q k^T / sqrt(D)) v

for each head. Of an image, the kernel reads queries, keys and values and writes
y; backward, it reads these and dy, computes the weights again, and writes the
gradient.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from metaformer_jax.kernels import branch, grid
from metaformer_jax.ops import attention, platforms

Array = jax.Array
F32 = jnp.float32
# Images of a step, at most: so that blocks are not too small to be moved fast.
_IMAGES = 8


class Settings(NamedTuple):
  """What does not change with the data.

  Attributes:
    n_heads: the number of heads.
    interpret: whether the kernels run interpreted, on any platform.
    mesh: over whose axes the batch is split; None for one device.
  """

  n_heads: int
  interpret: bool
  mesh: AbstractMesh | None = None


def problem(shape: Sequence[int], dtype: DTypeLike, n_heads: int) -> str | None:
  """Why qkv [B, N, 3 heads D] cannot use the kernels; None if it can."""
  if dtype not in (jnp.float32, jnp.bfloat16):
    return f"there is no kernel for {jnp.dtype(dtype)}"
  return grid.too_large(*(call(shape, dtype, n_heads)
                          for call in (forward_call, backward_call)))


def problem_of_batch(shape: Sequence[int], dtype: DTypeLike,
                     n_heads: int) -> str | None:
  """As `problem`, of qkv of all devices."""
  return branch.problem(
      shape, functools.partial(problem, dtype=dtype, n_heads=n_heads))


def self_attention(qkv: Array, n_heads: int, *,
                   interpret: bool = False) -> Array:
  """`ops.attention.self_attention`, by kernels in a program for a TPU.

  Elsewhere, and for what has a `problem`, it is the plain function.

  Args:
    qkv: [B, N, 3 heads D], ordered (q k v, head, channel of the head), float32
      or bfloat16.
    n_heads: the number of heads.
    interpret: runs the kernels interpreted, for tests.

  Returns:
    [B, N, heads D], in the dtype of qkv.
  """
  if not interpret and problem_of_batch(qkv.shape, qkv.dtype, n_heads):
    return attention.self_attention(qkv, n_heads)
  return _attention(Settings(n_heads, interpret, branch.mesh()), qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings, qkv):
  return _choose(settings, _plain, _forward, qkv)


def _attention_fwd(settings, qkv):
  return _attention(settings, qkv), qkv


def _attention_bwd(settings, qkv, dy):
  return (_choose(settings, _plain_backward, _backward, qkv, dy),)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _plain(settings, qkv):
  return attention.self_attention(qkv, settings.n_heads)


def _plain_backward(settings, qkv, dy):
  dqkv, = jax.vjp(functools.partial(_plain, settings), qkv)[1](dy)
  return dqkv


def _choose(settings, plain, kernel, *images):
  plain, kernel = (functools.partial(fn, settings) for fn in (plain, kernel))
  if settings.mesh is not None:
    split = P(settings.mesh.axis_names)
    kernel = jax.shard_map(kernel, mesh=settings.mesh, in_specs=split,
                           out_specs=split, check_vma=False)
  if settings.interpret:
    return kernel(*images)
  return platforms.choose(plain, *images, tpu=kernel)


def _call(shape, dtype, n_heads, products, widths):
  """A call with arrays of these channels; all but the last are inputs."""
  batch, n, channels = shape
  size = channels // (3 * n_heads)
  n_images = next(k for k in range(min(batch, _IMAGES), 0, -1)
                  if batch % k == 0)
  arrays = [grid.Array((batch, n, width), dtype, rows=n_images, axis=0)
            for width in widths]
  weights = batch * n_heads * n * n
  return grid.Call(
      batch // n_images, tuple(arrays[:-1]), tuple(arrays[-1:]),
      values=6 * grid.padded_bytes((n, n), F32)
      + 8 * grid.padded_bytes((n, size), F32),
      flops=2 * products * weights * size, transcendentals=weights)


def forward_call(shape: Sequence[int], dtype: DTypeLike,
                 n_heads: int) -> grid.Call:
  """The grid of the forward kernel, for qkv of this shape."""
  wide = shape[-1]
  return _call(shape, dtype, n_heads, 2, (wide, wide // 3))


def backward_call(shape: Sequence[int], dtype: DTypeLike,
                  n_heads: int) -> grid.Call:
  """The grid of the backward kernel."""
  wide = shape[-1]
  return _call(shape, dtype, n_heads, 5, (wide, wide // 3, wide))


def _forward(settings, qkv):
  kernel = functools.partial(_forward_kernel, settings.n_heads)
  y, = forward_call(qkv.shape, qkv.dtype, settings.n_heads)(
      kernel, qkv, interpret=settings.interpret)
  return y


def _backward(settings, qkv, dy):
  kernel = functools.partial(_backward_kernel, settings.n_heads)
  dqkv, = backward_call(qkv.shape, qkv.dtype, settings.n_heads)(
      kernel, qkv, dy, interpret=settings.interpret)
  return dqkv


def _heads(n_heads: int, channels: int) -> Iterator[tuple[slice, ...]]:
  """The channels of q, k and v of each head; those of q are also y's."""
  size = channels // (3 * n_heads)
  for head in range(n_heads):
    yield tuple(slice(start, start + size) for start in (
        (part * n_heads + head) * size for part in range(3)))


def _dot(a, b, contracted):
  return lax.dot_general(a, b, ((contracted[:1], contracted[1:]), ((), ())),
                         preferred_element_type=F32)


def _weights(q, k):
  """Scaled queries, and the softmax over the keys: [queries, keys]."""
  q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
  logits = _dot(q, k, (1, 1))
  weights = jnp.exp(logits - logits.max(1, keepdims=True))
  return q, weights / weights.sum(1, keepdims=True)


def _for_each_image(n_images, body):
  def call(i, carry):
    body(i)
    return carry

  lax.fori_loop(0, n_images, call, 0)


def _forward_kernel(n_heads, qkv_ref, y_ref):

  @functools.partial(_for_each_image, len(qkv_ref))
  def _(i):
    for q, k, v in _heads(n_heads, qkv_ref.shape[-1]):
      _, weights = _weights(qkv_ref[i, :, q], qkv_ref[i, :, k])
      y = _dot(weights.astype(qkv_ref.dtype), qkv_ref[i, :, v], (1, 0))
      y_ref[i, :, q] = y.astype(y_ref.dtype)


def _backward_kernel(n_heads, qkv_ref, dy_ref, dqkv_ref):
  dtype = qkv_ref.dtype

  @functools.partial(_for_each_image, len(qkv_ref))
  def _(i):
    for q, k, v in _heads(n_heads, qkv_ref.shape[-1]):
      keys, dy = qkv_ref[i, :, k], dy_ref[i, :, q]
      queries, weights = _weights(qkv_ref[i, :, q], keys)
      slopes = _dot(dy, qkv_ref[i, :, v], (1, 1))
      mean = (weights * slopes).sum(1, keepdims=True)
      dlogits = (weights * (slopes - mean)).astype(dtype)
      dq = _dot(dlogits, keys, (1, 0)) * queries.shape[-1] ** -0.5
      dqkv_ref[i, :, q] = dq.astype(dtype)
      dqkv_ref[i, :, k] = _dot(dlogits, queries, (0, 0)).astype(dtype)
      dqkv_ref[i, :, v] = _dot(weights.astype(dtype), dy, (0, 0)).astype(dtype)
