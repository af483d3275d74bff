"""Sums of windows in either form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import platform_forms
import pytest
from flax import linen as nn
from jax import lax

from metaformer_jax.ops import pooling


def plain(x, size):
  return lax.reduce_window(x, np.zeros((), x.dtype), lax.add,
                           (1, size, size, 1), (1, 1, 1, 1), "SAME")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_values_and_gradients_are_the_same(size, dtype):
  for shape in ((2, 7, 10, 5), (1, 3, 2, 4)):  # Windows beyond the image, too.
    x = np.random.default_rng(size).normal(size=shape)
    platform_forms.assert_same(
        functools.partial(pooling.window_sum, size=size),
        functools.partial(plain, size=size), jnp.asarray(x, dtype))


def test_other_platforms_reduce_windows():
  x = jnp.ones((2, 6, 6, 3), jnp.bfloat16)
  sums = functools.partial(pooling.window_sum, size=3)
  assert platform_forms.operations(sums, x) == (
      platform_forms.operations(functools.partial(plain, size=3), x))
  gradient = jax.vjp(sums, x)[1]
  assert platform_forms.operations(gradient, x) == (
      platform_forms.operations(sums, x))


def test_sums_for_a_gpu_are_computed_once():
  x = jnp.ones((2, 6, 6, 3), jnp.bfloat16)
  sums = functools.partial(pooling.window_sum, size=3)
  on_gpu = platform_forms.operations(sums, x, platform="cuda")
  assert on_gpu == sorted([
      *platform_forms.operations(sums, x, platform="cpu"),
      "optimization_barrier"])
  assert platform_forms.operations(
      jax.vjp(sums, x)[1], x, platform="cuda") == on_gpu


@pytest.mark.parametrize("shape", [(2, 9, 12, 3), (1, 16, 7, 2)])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 3, 2)])
def test_maxima_and_their_gradients_are_flaxs(shape, window):
  size, stride, padding = window

  def flax(x):
    return nn.max_pool(x, (size, size), (stride, stride),
                       ((padding, padding),) * 2)

  # Of few different values, many are equal: the first one gets the gradient.
  x = np.random.default_rng(size).integers(0, 3, shape).astype(np.float32)
  platform_forms.assert_same(lambda x: pooling.max_pool(x, *window), flax,
                             jnp.asarray(x))
