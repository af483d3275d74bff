"""Activations, and what a CPU keeps of them for the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import platform_forms
import pytest

from metaformer_jax.ops import activations

VALUES = np.concatenate([
    np.random.default_rng(0).normal(size=(6, 7)).ravel() * 3,
    [0.0, -0.0, 1e-30, -1e18, 1e3, -12, 12]])


def gelu(x):
  return x * jax.scipy.stats.norm.cdf(x)


def star_relu(x, scale, bias):
  return scale * jax.nn.relu(x) ** 2 + bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_and_its_gradient(dtype):
  platform_forms.assert_same(activations.gelu, gelu,
                             jnp.asarray(VALUES).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_star_relu_and_its_gradients(dtype):
  x = jnp.asarray(VALUES).astype(dtype)
  platform_forms.assert_same(
      activations.star_relu, star_relu, x, jnp.full_like(x, 0.9),
      jnp.full_like(x, -0.4))


@pytest.mark.parametrize(("fn", "plain"), [
    (activations.gelu, gelu),
    (lambda x: activations.star_relu(x, jnp.sin(x), x),
     lambda x: star_relu(x, jnp.sin(x), x))])
def test_second_derivatives(fn, plain):
  x = jnp.asarray(VALUES[:42], jnp.float32)
  got, want = (jax.vmap(jax.grad(jax.grad(f)))(x) for f in (fn, plain))
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_other_platforms_have_no_trace_of_the_forms_for_a_cpu():
  def gradients(x, dy):
    return (jax.vjp(activations.gelu, x)[1](dy),
            jax.vjp(activations.star_relu, x, 0.9 * x, x)[1](dy))

  x = jnp.asarray(VALUES, jnp.float32)
  cpu, *others = (set(platform_forms.operations(gradients, x, x, platform=p))
                  for p in ("cpu", "tpu", "cuda"))
  own = {"compare", "optimization_barrier", "select"}
  assert cpu >= own
  assert not any(operations & own for operations in others)


@pytest.mark.parametrize("activation", [
    activations.gelu,
    lambda x: activations.star_relu(
        x, jnp.full_like(x, 0.9), jnp.full_like(x, -0.4))])
def test_a_gradient_keeps_one_array_of_an_activation(activation):
  """Besides the result, which the next layer's gradient needs."""
  shape, n_layers = (512, 256), 8
  weights = [np.eye(256, dtype=np.float32) for _ in range(n_layers)]

  def loss(weights, x):
    for w in weights:
      x = activation(x @ w)
    return x.sum()

  compiled = jax.jit(jax.grad(loss)).lower(
      weights, np.zeros(shape, np.float32)).compile()
  kept = compiled.memory_analysis().temp_size_in_bytes / np.prod(shape) / 4
  assert 2 * n_layers - 2 < kept < 2.5 * n_layers
