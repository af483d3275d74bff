"""Scaled dot-product attention, in the form that is fast on the platform."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import platforms

Array = jax.Array
# With more, or with fewer keys than queries, XLA's own form is as fast.
_MOST_TOKENS = 576
# With fewer, cuDNN is not faster than XLA's own form.
_FEWEST_CUDNN_TOKENS = 64
# The logit of a key that is ignored.
_IGNORED = float(jnp.finfo(jnp.float32).min)


def dot_product_attention(q: Array, k: Array, v: Array, *,
                          mask: Array | None = None) -> Array:
  """softmax(q k^T / sqrt(D)) v, the softmax in float32.

  In a program for an NVIDIA GPU, traced where there is one, it is cuDNN's flash
  attention (arXiv 2205.14135) for half precision without a mask. This has no
  second derivative.

  Args:
    q: [B, queries, heads, D].
    k, v: [B, keys, heads, D].
    mask: [B, keys], false for keys to ignore.
  """
  if mask is not None:
    mask = mask.astype(bool)
  fast = q.shape == k.shape and q.shape[1] <= _MOST_TOKENS
  return platforms.choose(
      _plain, q, k, v, mask, cpu=_for_cpu if fast else None,
      cuda=_for_cuda if mask is None and _fits_cudnn(q, k) else None)


def _plain(q, k, v, mask):
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k,
                      preferred_element_type=jnp.float32)
  if mask is not None:
    logits = jnp.where(mask[:, None, None, :], logits, _IGNORED)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


@jax.custom_vjp
def _for_cpu(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
  """The same; keys lie along rows, over which XLA sums by vectors.

  Heads come first, as the products want them, and the sums divide the result
  instead of the weights. The barriers keep a product's operand from being
  computed within the product.
  """
  return _cpu_fwd(q, k, v, mask)[0]


def _cpu_fwd(q, k, v, mask):
  queries, keys, values = map(_heads_first, (q, k, v))
  logits = jnp.einsum("bhkd,bhqd->bhkq", keys, queries * q.shape[-1] ** -0.5)
  if mask is not None:
    logits = jnp.where(mask[:, None, :, None], logits, _IGNORED)
  weights = lax.optimization_barrier(
      jnp.exp(logits - logits.max(2, keepdims=True)))
  total = platforms.unfused(weights.sum(2))[..., None]
  y = jnp.einsum("bhkq,bhkd->bhqd", weights, values) / total
  return _heads_last(y, v), (q, k, v, mask, weights, total, y)


def _cpu_bwd(kept, dy):
  q, k, v, mask, weights, total, y = kept
  queries, keys, values = map(_heads_first, (q, k, v))
  dy = _heads_first(dy) / total
  dv = jnp.einsum("bhkq,bhqd->bhkd", weights, dy)
  dlogits = jnp.einsum("bhkd,bhqd->bhkq", values, dy)
  dlogits = weights * (dlogits - (dy * y).sum(3)[:, :, None])
  if mask is not None:
    dlogits = jnp.where(mask[:, None, :, None], dlogits, 0)
  dlogits, scale = lax.optimization_barrier(dlogits), q.shape[-1] ** -0.5
  dq = jnp.einsum("bhkq,bhkd->bhqd", dlogits, keys) * scale
  dk = jnp.einsum("bhkq,bhqd->bhkd", dlogits, queries * scale)
  return _heads_last(dq, q), _heads_last(dk, k), _heads_last(dv, v), None


_for_cpu.defvjp(_cpu_fwd, _cpu_bwd)


def _heads_first(x):
  """[B, N, heads, D] -> [B, heads, N, D], in float32."""
  return x.transpose(0, 2, 1, 3).astype(jnp.float32)


def _heads_last(x, like):
  return x.transpose(0, 2, 1, 3).astype(like.dtype)


@functools.cache
def _has_cudnn() -> bool:
  """Whether the GPUs of this process, if any, have flash attention.

  jax refuses to trace it elsewhere, whatever the program is compiled for.
  """
  try:
    device, *_ = jax.local_devices(backend="cuda")
  except RuntimeError:
    return False
  return float(device.compute_capability) >= 8


def _fits_cudnn(q, k) -> bool:
  """Whether cuDNN computes it, and faster than XLA."""
  return (q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
          and q.shape[-1] <= 128
          and min(q.shape[1], k.shape[1]) >= _FEWEST_CUDNN_TOKENS
          and _has_cudnn())


def _flash(q, k, v):
  return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


@jax.custom_vjp
def _for_cuda(q: Array, k: Array, v: Array, mask: None) -> Array:
  """The same by cuDNN; with its gradient for even numbers of tokens alone."""
  del mask
  return _flash(q, k, v)


def _cuda_fwd(q, k, v, mask):
  even = q.shape[1] % 2 == k.shape[1] % 2 == 0
  form = _flash if even else functools.partial(_plain, mask=mask)
  return jax.vjp(form, q, k, v)


def _cuda_bwd(pull, dy):
  return *pull(dy), None


_for_cuda.defvjp(_cuda_fwd, _cuda_bwd)


def self_attention(qkv: Array, n_heads: int, *,
                   mask: Array | None = None) -> Array:
  """Attention among the pixels of an image.

  Args:
    qkv: [B, N, 3 heads D], ordered (q k v, head, channel of the head).
    n_heads: the number of heads.
    mask: [B, N], false for pixels to ignore.

  Returns:
    [B, N, heads D].
  """
  b, n, channels = qkv.shape
  qkv = qkv.reshape(b, n, 3, n_heads, channels // (3 * n_heads))
  q, k, v = (qkv[:, :, i] for i in range(3))
  return dot_product_attention(q, k, v, mask=mask).reshape(b, n, -1)
