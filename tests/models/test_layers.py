"""Layers and mixers against plain numpy, written from the papers' equations."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.models import activations, layers, mixers, norms
from metaformer_jax.ops import activations as activation_ops

# All sizes differ, so that mixed-up axes are noticed.
SHAPE = (2, 5, 7, 64)


def normal(shape, seed=0, mean=0.0):
  return np.random.default_rng(seed).normal(mean, 1, shape).astype(np.float32)


def apply(module, x, *, perturb=True, **kwargs):
  """Applies a module with parameters moved away from 0 and 1."""
  variables = module.init(jax.random.key(0), x)
  if perturb:
    leaves, tree = jax.tree.flatten(variables)
    leaves = [leaf + 0.3 * normal(leaf.shape, i)
              for i, leaf in enumerate(leaves)]
    variables = jax.tree.unflatten(tree, leaves)
  params = jax.tree.map(np.asarray, variables.get("params", {}))
  return np.asarray(module.apply(variables, x, **kwargs)), params


def valid_mask(shape, height, width):
  mask = np.zeros(shape[:3], bool)
  mask[:, :height, :width] = True
  return mask


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_pooling_is_the_mean_of_the_valid_window_minus_the_input(size):
  x = normal(SHAPE)
  y, _ = apply(mixers.Pooling(64, pool_size=size), x)
  r = size // 2
  for i, j in itertools.product(range(5), range(7)):
    window = x[:, max(i - r, 0):i + r + 1, max(j - r, 0):j + r + 1]
    np.testing.assert_allclose(
        y[:, i, j], window.mean((1, 2)) - x[:, i, j], atol=2e-6)


def test_pooling_gradient_is_that_of_the_linear_map():
  x, dy = normal((1, 4, 5, 2)), normal((1, 4, 5, 2), 1)

  def pool(x):
    return mixers.Pooling(2).apply({}, x)

  gradient = jax.grad(lambda x: (pool(x) * dy).sum())(x)
  # The map is linear: its values at unit vectors are its matrix.
  units = np.eye(x.size, dtype=np.float32).reshape(x.size, *x.shape[1:])
  matrix = np.asarray(pool(units)).reshape(x.size, x.size)
  np.testing.assert_allclose(
      gradient.ravel(), matrix @ dy.ravel(), atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_group_norm_normalises_over_the_whole_image(mean):
  x = normal(SHAPE, mean=mean)
  y, params = apply(norms.GroupNorm(eps=1e-3), x)
  z = x.astype(np.float64)
  z = (z - z.mean((1, 2, 3), keepdims=True)) / np.sqrt(
      z.var((1, 2, 3), keepdims=True) + 1e-3)
  # At a mean of 1000 float32 itself carries an error of 6e-5 in x.
  np.testing.assert_allclose(y, z * params["scale"] + params["bias"],
                             atol=1e-5 if mean == 0 else 5e-4)


def test_layer_norm_normalises_each_pixel():
  x = normal(SHAPE)
  y, params = apply(norms.LayerNorm(eps=1e-3), x)
  z = (x - x.mean(-1, keepdims=True)) / np.sqrt(
      x.var(-1, keepdims=True) + 1e-3)
  np.testing.assert_allclose(y, z * params["scale"] + params["bias"],
                             atol=1e-5)


def test_attention_is_softmax_of_scaled_products_by_head():
  x = normal(SHAPE)
  y, params = apply(mixers.Attention(64), x)
  tokens = x.reshape(2, 35, 64).astype(np.float64)
  q, k, v = np.split(tokens @ params["qkv"]["kernel"], 3, axis=-1)
  heads = []
  for h in range(2):
    part = slice(32 * h, 32 * h + 32)
    logits = q[..., part] @ k[..., part].swapaxes(1, 2) / math.sqrt(32)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads.append(weights @ v[..., part])
  want = np.concatenate(heads, -1) @ params["proj"]["kernel"]
  want = (want + params["proj"]["bias"]).reshape(SHAPE)
  np.testing.assert_allclose(y, want, atol=1e-4)


@pytest.mark.parametrize("dim,n_heads", [(16, 1), (48, 1), (80, 2)])
def test_attention_has_whole_heads_whatever_the_channels(dim, n_heads):
  _, params = apply(mixers.Attention(dim), normal((1, 2, 2, dim)))
  assert params["qkv"]["kernel"].shape == (dim, 3 * 32 * n_heads)
  assert params["proj"]["kernel"].shape == (32 * n_heads, dim)


def test_gelu_is_exact_and_so_is_its_gradient():
  x = np.linspace(-12, 12, 24001).astype(np.float32)
  cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
  pdf = np.exp(-0.5 * x.astype(np.float64)**2) / math.sqrt(2 * math.pi)
  gelu = activation_ops.gelu
  gradient = jax.vmap(jax.grad(gelu))
  np.testing.assert_allclose(gelu(x), x * cdf, rtol=0, atol=1.3e-6)
  np.testing.assert_allclose(gradient(x), cdf + x * pdf, rtol=0, atol=1e-6)
  # Of bfloat16, only the result is rounded.
  coarse = jnp.asarray(x, jnp.bfloat16)
  x = np.asarray(coarse, np.float32)
  for fn in (gelu, gradient):
    np.testing.assert_allclose(fn(coarse).astype(jnp.float32), fn(x),
                               rtol=2**-8, atol=1e-7)


def test_mlp_is_two_dense_layers_around_the_activation():
  x = normal(SHAPE)
  y, p = apply(layers.Mlp(96, activation=functools.partial(
      activations.Elementwise, jnp.tanh)), x)
  hidden = np.tanh(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
  np.testing.assert_allclose(
      y, hidden @ p["fc2"]["kernel"] + p["fc2"]["bias"], atol=2e-5)


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
  x = np.ones((4000, 2, 3), np.float32)
  y = np.asarray(layers.DropPath(0.3).apply(
      {}, x, train=True, rngs={"drop_path": jax.random.key(1)}))
  kept = y[:, 0, 0] > 0
  assert np.array_equal(y, np.where(kept[:, None, None], x / np.float32(0.7),
                                    0))
  # Four standard deviations of a binomial.
  assert abs(kept.mean() - 0.7) < 4 * math.sqrt(0.3 * 0.7 / 4000)
  assert np.array_equal(layers.DropPath(0.3).apply({}, x, train=False), x)


def test_scale_multiplies_each_channel():
  x = normal(SHAPE)
  y, params = apply(layers.Scale(0.5), x)
  np.testing.assert_allclose(y, x * params["scale"], rtol=1e-6)
  assert params["scale"].shape == (64,)


@pytest.mark.parametrize("kernel,stride,padding", [
    (7, 4, 2), (3, 2, 1), (4, 4, 0), (3, 1, 1), (2, 2, 1)])
@pytest.mark.parametrize("height,width", [(13, 17), (16, 18)])
def test_downsample_pads_as_pytorch_and_follows_the_mask(
    kernel, stride, padding, height, width):
  x = normal((2, height, width, 3))
  module = layers.Downsample(8, kernel, stride, padding)
  variables = module.init(jax.random.key(0), x)
  alone, no_mask = module.apply(variables, x)
  assert no_mask is None
  # Against a loop over the windows of the zero-padded image.
  weights = jax.tree.map(np.asarray, variables["params"]["conv"])
  p = padding
  around = np.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
  for i, j in itertools.product(*map(range, alone.shape[1:3])):
    window = around[:, stride * i:stride * i + kernel,
                    stride * j:stride * j + kernel]
    want = np.einsum("bhwc,hwcd->bd", window, weights["kernel"])
    np.testing.assert_allclose(alone[:, i, j], want + weights["bias"],
                               atol=2e-5)
  canvas = np.full((2, 32, 32, 3), 9.0, np.float32)
  canvas[:, :height, :width] = x
  padded, mask = module.apply(
      variables, canvas, mask=valid_mask(canvas.shape, height, width))
  h, w = alone.shape[1:3]
  assert np.array_equal(mask, valid_mask(mask.shape, h, w))
  np.testing.assert_allclose(padded[:, :h, :w], alone, atol=1e-5)


def test_global_average_pool_counts_valid_pixels():
  x = normal(SHAPE)
  mask = valid_mask(SHAPE, 3, 4)
  np.testing.assert_allclose(layers.global_average_pool(x, mask),
                             x[:, :3, :4].mean((1, 2)), atol=1e-6)
  np.testing.assert_allclose(layers.global_average_pool(x, None),
                             x.mean((1, 2)), atol=1e-6)


def test_convolutions_start_as_pytorchs():
  module = layers.Downsample(256, 7, 4, 2)
  params = module.init(jax.random.key(0), normal((1, 16, 16, 8)))["params"]
  bound = 1 / math.sqrt(7 * 7 * 8)
  for values in (params["conv"]["kernel"], params["conv"]["bias"]):
    assert np.abs(values).max() <= bound
    # A uniform distribution's standard deviation; 256 biases are the fewest.
    assert abs(np.std(values) / (bound / math.sqrt(3)) - 1) < 0.1
