"""The kernels of attention, interpreted, against the plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
  SingleDeviceSharding,
)

from metaformer_jax.kernels import attention as kernel
from metaformer_jax.ops import attention
from metaformer_jax.preflight import topologies

# Rounding of both, relative to the largest value.
TOLERANCES = {"float32": 1e-5, "bfloat16": 2e-2}


def values(shape, dtype, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(qkv, n_heads):
  """In float64, by definition, head by head."""
  b, n, channels = qkv.shape
  size = channels // (3 * n_heads)
  y = np.zeros((b, n, n_heads * size))
  for head in range(n_heads):
    q, k, v = (np.asarray(qkv, np.float64)[
        :, :, (part * n_heads + head) * size:][:, :, :size]
               for part in range(3))
    logits = np.einsum("bqd,bkd->bqk", q, k) / np.sqrt(size)
    weights = np.exp(logits - logits.max(2, keepdims=True))
    weights /= weights.sum(2, keepdims=True)
    y[:, :, head * size:][:, :, :size] = weights @ v
  return y


def differentiated(fn, qkv, dy):
  y, pull = jax.vjp(fn, qkv)
  return y, pull(dy)[0]


@pytest.mark.parametrize("shape,n_heads,dtype", [
    ((3, 7, 24), 2, "float32"), ((16, 49, 192), 2, "bfloat16"),
    ((2, 1, 12), 1, "float32"),
    pytest.param((5, 196, 960), 10, "float32", marks=pytest.mark.slow)])
def test_values_and_gradients(shape, n_heads, dtype):
  qkv = values(shape, dtype)
  dy = values((*shape[:2], shape[2] // 3), dtype, seed=1)
  y, dqkv = differentiated(
      lambda x: kernel.self_attention(x, n_heads, interpret=True), qkv, dy)
  assert y.dtype == dqkv.dtype == qkv.dtype
  np.testing.assert_allclose(np.asarray(y, np.float64), exact(qkv, n_heads),
                             rtol=0, atol=TOLERANCES[dtype] * np.abs(y).max())
  _, want = differentiated(lambda x: attention.self_attention(x, n_heads),
                           qkv.astype(jnp.float32), dy.astype(jnp.float32))
  np.testing.assert_allclose(np.asarray(dqkv, np.float32), want, rtol=0,
                             atol=TOLERANCES[dtype] * np.abs(want).max())


def test_large_logits():
  qkv = values((2, 9, 24), "float32") * 1000
  y = kernel.self_attention(qkv, 2, interpret=True)
  np.testing.assert_allclose(y, exact(qkv, 2), rtol=0, atol=1e-2)


def test_devices_share_a_batch():
  devices = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
  qkv, dy = values((8, 5, 12), "float32"), values((8, 5, 4), "float32", 1)
  split = NamedSharding(devices, PartitionSpec(("data", "fsdp")))

  @jax.jit
  def both(qkv, dy):
    with jax.sharding.use_abstract_mesh(devices.abstract_mesh):
      return differentiated(
          lambda x: kernel.self_attention(x, 2, interpret=True), qkv, dy)

  got = both(*jax.device_put((qkv, dy), split))
  want = differentiated(lambda x: attention.self_attention(x, 2), qkv, dy)
  jax.tree.map(lambda g, w: np.testing.assert_allclose(
      g, w, rtol=0, atol=1e-5), got, want)


def test_only_a_tpus_program_has_the_kernels():
  qkv = jax.ShapeDtypeStruct((8, 49, 192), jnp.bfloat16)
  dy = jax.ShapeDtypeStruct((8, 49, 64), jnp.bfloat16)
  traced = jax.jit(lambda qkv, dy: differentiated(
      lambda x: kernel.self_attention(x, 2), qkv, dy)).trace(qkv, dy)
  for platform, kernels in {"tpu": 2, "cpu": 0, "cuda": 0}.items():
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert text.count("@tpu_custom_call") == kernels


def test_what_does_not_fit_has_a_reason():
  assert "float16" in kernel.problem((8, 49, 96), jnp.float16, 1)
  assert "VMEM" in kernel.problem((8, 4096, 96), jnp.bfloat16, 1)


@pytest.mark.slow
@pytest.mark.parametrize("n,n_heads", [(196, 10), (49, 16), (196, 12),
                                       (576, 10), (144, 24)])
def test_compiles_for_a_v5e(n, n_heads, monkeypatch):
  """With the VMEM that is counted as the kernels' limit."""
  for key, value in topologies.ENVIRONMENT.items():
    monkeypatch.setenv(key, value)
  device, = topologies.devices(topologies.parse("v5e-1"))
  qkv, dy = (jax.ShapeDtypeStruct((16, n, parts * n_heads * 32), jnp.bfloat16,
                                  sharding=SingleDeviceSharding(device))
             for parts in (3, 1))
  compiled = jax.jit(lambda qkv, dy: differentiated(
      lambda x: kernel.self_attention(x, n_heads), qkv, dy)
  ).lower(qkv, dy).compile()
  assert compiled.as_text().count('"tpu_custom_call"') == 2
