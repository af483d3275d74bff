"""Scaled dot-product attention."""

import jax
import jax.numpy as jnp


def dot_product_attention(q: jax.Array, k: jax.Array, v: jax.Array, *,
                          mask: jax.Array | None = None) -> jax.Array:
  """softmax(q k^T / sqrt(D)) v, the softmax in float32.

  Args:
    q: [B, queries, heads, D].
    k, v: [B, keys, heads, D].
    mask: [B, keys], false for keys to ignore.
  """
  scale = q.shape[-1] ** -0.5
  logits = jnp.einsum("bqhd,bkhd->bhqk", q * scale, k,
                      preferred_element_type=jnp.float32)
  if mask is not None:
    valid = mask[:, None, None, :].astype(bool)
    logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def self_attention(qkv: jax.Array, n_heads: int, *,
                   mask: jax.Array | None = None) -> jax.Array:
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
