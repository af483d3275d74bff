"""Gradients of activations and scales: numeric, and in bfloat16."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax
from metaformer_jax.models import activations, layers, positions


def gelu(x, p):
  return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x, p):
  return x / (1 + np.exp(-x))


def relu(x, p):
  return np.maximum(x, 0)


def squared_relu(x, p):
  return np.maximum(x, 0)**2


def star_relu(x, p):
  return p["scale"] * np.maximum(x, 0)**2 + p["bias"]


@pytest.mark.parametrize("fn", [gelu, relu, silu, squared_relu, star_relu])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_activations_are_the_numeric(fn, dtype):
  module = activations.ACTIVATIONS[fn.__name__]()
  # Exact in bfloat16, and away from 0, where relu has no derivative.
  x = np.arange(-33, 34, 2).reshape(2, 17) / 8
  dy = np.random.default_rng(0).choice([-1.0, 0.5, 2.0], x.shape)
  p = {"scale": np.array([0.75]), "bias": np.array([-0.5])}
  variables = {"params": p if fn is star_relu else {}}
  variables = jax.tree.map(lambda v: v.astype(np.float32), variables)

  def apply(variables, x):
    return module.apply(variables, x)

  y, pull = jax.vjp(apply, variables, jnp.asarray(x, dtype))
  found, dx = pull(jnp.asarray(dy, dtype))
  assert y.dtype == dx.dtype == dtype
  h, rtol = 1e-5, 1e-5 if dtype == jnp.float32 else 0.02
  # GELU is wrong by up to 1.3e-6, as PyTorch's (test_layers.py).
  atol = 1.3e-6 if fn is gelu else rtol / 100
  np.testing.assert_allclose(y, fn(x, p), rtol=rtol, atol=atol)
  np.testing.assert_allclose(
      dx, dy * (fn(x + h, p) - fn(x - h, p)) / (2 * h), rtol=rtol, atol=rtol)
  for key, value in found["params"].items():
    assert value.dtype == jnp.float32
    up, down = ({**p, key: p[key] + step} for step in (h, -h))
    want = (dy * (fn(x, up) - fn(x, down)) / (2 * h)).sum()
    np.testing.assert_allclose(value, [want], rtol=rtol)


@pytest.mark.parametrize("module", [
    activations.StarReLU(), layers.Scale(1.0, dtype=jnp.bfloat16),
    positions.PositionEmbedding(dtype=jnp.bfloat16)],
    ids=lambda m: type(m).__name__)
def test_bfloat16_gradients_of_parameters_are_float32_sums(module):
  """In bfloat16, a sum of ones stops growing at 256."""
  x = jnp.ones((1024, 1, 1, 1), jnp.bfloat16)
  variables = module.init(jax.random.key(0), x[:1])
  y, pull = jax.vjp(lambda v: module.apply(v, x), variables)
  for gradient in jax.tree.leaves(pull(jnp.ones_like(y))):
    assert gradient.dtype == jnp.float32 and gradient.item() == 1024


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same():
  """Custom gradients, statistics, frozen matrices work in jax.checkpoint."""
  model = metaformer_jax.create_model(
      "poolformerv2_s12", num_classes=5, depths=(1, 1), dims=(32, 64),
      token_mixers=("random", "sepconv"), norm="batch_norm",
      res_scale_init=(1.0, 0.0), head="mlp")
  x = np.random.default_rng(0).standard_normal((4, 32, 32, 3), np.float32)
  variables = jax.jit(model.init)(jax.random.key(0), x)

  def loss(params, x):
    logits, state = model.apply({**variables, "params": params}, x, train=True,
                                mutable=["batch_stats"])
    return jnp.square(logits).mean(), state

  found, want = (
      jax.jit(jax.grad(fn, has_aux=True))(variables["params"], x)
      for fn in (jax.checkpoint(loss), loss))
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6 * max(1, np.abs(b).max()))


# Settings of PoolFormer-S12: all operations with a gradient of their own.
SECOND_ORDER = {
    "pooling": {},
    "convolutions, attention": {
        "token_mixers": ("sepconv", "attention"), "norm": "layer_norm",
        "activation": "star_relu"},
    "ResNet": None,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SECOND_ORDER)
def test_hessians_are_symmetric(name):
  """<u, H v> = <v, H u>, by reverse mode twice; forward mode is refused."""
  settings = SECOND_ORDER[name]
  model = metaformer_jax.create_model(
      "resnet18" if settings is None else "poolformer_s12", num_classes=5,
      **({} if settings is None else {
          "depths": (1, 1), "dims": (32, 64),
          "token_mixers": ("pooling",) * 2} | settings))
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(2, 64, 64, 3)))
  first = jax.jit(model.init)(jax.random.key(1), x)

  def random(params, scale):
    return jax.tree.map(
        lambda v: np.float32(rng.normal(scale=scale, size=v.shape)), params)

  def loss(params):
    return jnp.cos(model.apply({**first, "params": params}, x)).sum()

  def dot(a, b):
    return sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))

  @jax.jit
  def hessian_times(params, v):
    return jax.grad(lambda params: dot(jax.grad(loss)(params), v))(params)

  params = jax.tree.map(jnp.add, first["params"], random(first["params"], 0.1))
  u, v = random(params, 1), random(params, 1)
  got, want = hessian_times(params, u), hessian_times(params, v)
  np.testing.assert_allclose(
      dot(v, got), dot(u, want), rtol=0,
      atol=1e-6 * float(dot(got, got) * dot(v, v))**0.5)
  assert abs(dot(v, got)) > 1e-4 * float(dot(got, got) * dot(v, v))**0.5
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(loss, (params,), (u,))
