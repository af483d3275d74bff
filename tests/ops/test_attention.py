"""Attention in either form."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import platform_forms
import pytest

from metaformer_jax.ops import attention


def plain(q, k, v, mask=None):
  """The definition, in the dtype of its arguments."""
  logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
  if mask is not None:
    logits = jnp.where(mask[:, None, None], logits, -1e30)
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  weights = weights / weights.sum(-1, keepdims=True)
  return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def arrays(queries, keys, heads=3, dim=8, batch=2, dtype="float32"):
  rng = np.random.default_rng(queries)
  return [jnp.asarray(rng.normal(size=(batch, n, heads, dim)), dtype)
          for n in (queries, keys, keys)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries,keys", [(7, 7), (1, 1), (50, 50), (12, 5)])
def test_values_and_gradients_are_the_same(queries, keys, dtype):
  platform_forms.assert_same(
      attention.dot_product_attention, plain,
      *arrays(queries, keys, dtype=dtype))


@pytest.mark.parametrize("queries,keys", [(9, 9), (12, 9)])
def test_keys_are_ignored(queries, keys):
  mask = np.random.default_rng(0).random((2, keys)) < 0.5
  mask[:, 0] = True
  platform_forms.assert_same(
      functools.partial(attention.dot_product_attention, mask=mask),
      functools.partial(plain, mask=mask), *arrays(queries, keys))


def test_an_image_without_keys_has_the_mean_of_all():
  q, k, v = arrays(6, 6)
  mask = jnp.zeros((2, 6), bool)

  def attend(q, k, v):
    return attention.dot_product_attention(q, k, v, mask=mask)

  y, pull = jax.vjp(attend, q, k, v)
  np.testing.assert_allclose(
      y, np.broadcast_to(v.mean(1, keepdims=True), v.shape), atol=1e-6)
  dq, dk, _ = pull(jnp.cos(y))
  assert not dq.any()
  assert not dk.any()


def test_other_platforms_have_one_form():
  x = arrays(16, 16, dtype="bfloat16")
  only = functools.partial(attention._plain, mask=None)
  assert platform_forms.operations(
      attention.dot_product_attention, *x) == platform_forms.operations(
          only, *x)

  def operations(fn):
    return collections.Counter(platform_forms.operations(
        lambda *x: jax.vjp(fn, *x)[1](x[0]), *x))

  # Zeros, which nothing reads, in place of what the other form keeps.
  assert operations(attention.dot_product_attention) - operations(only) == (
      collections.Counter({"broadcast_in_dim": 1}))
  assert not operations(only) - operations(attention.dot_product_attention)


def test_many_tokens_have_one_form():
  most = attention._MOST_TOKENS
  for n, n_forms in ((most, 2), (most + 1, 1)):
    jaxpr = str(jax.make_jaxpr(attention.dot_product_attention)(
        *arrays(n, n, heads=1, batch=1)))
    assert ("platform_index" in jaxpr) == (n_forms == 2)


@pytest.mark.parametrize("tokens", [(6, 6), (7, 7), (8, 5), (4, 6)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_form_for_gpus_is_the_same(tokens, dtype, monkeypatch):
  # Of the two functions by jax that are one: cuDNN needs a GPU.
  monkeypatch.setattr(attention, "_flash", jax.nn.dot_product_attention)
  platform_forms.assert_same(
      functools.partial(attention._for_cuda, mask=None), plain,
      *arrays(*tokens, dtype=dtype))


def test_gpus_have_cudnns_attention_for_what_it_can(monkeypatch):
  calls = []

  def flash(q, k, v, implementation):
    calls.append(implementation)
    return jnp.zeros_like(q)

  def called(*args, mask=None):
    calls.clear()
    jax.eval_shape(
        functools.partial(attention.dot_product_attention, mask=mask), *args)
    return calls

  monkeypatch.setattr(jax.nn, "dot_product_attention", flash)
  args = arrays(64, 65, dtype="bfloat16")
  assert not called(*args)  # There is no GPU.
  monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
  assert called(*args) == ["cudnn"]
  assert not called(*args, mask=jnp.ones((2, 65), bool))
  assert not called(*arrays(64, 65))
  assert not called(*arrays(64, 63, dtype="bfloat16"))
  assert not called(*arrays(64, 64, dim=12, dtype="bfloat16"))
  assert not called(*arrays(64, 64, dim=136, dtype="bfloat16"))
