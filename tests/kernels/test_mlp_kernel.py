"""The kernels of the MLP branch, interpreted, against the modules."""

import functools

import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from metaformer_jax.kernels import mlp


def assert_same(shape, hidden, dtype="float32", activation="gelu", bias=True,
                **changes):
  p = cases.parameters(shape[-1], hidden, bias=bias) | changes
  kernel, modules = (
      functools.partial(branch, activation=activation)
      for branch in (cases.mlp_kernel, cases.mlp_modules))
  cases.assert_same(kernel, modules, cases.images(shape, dtype),
                    cases.keep(shape[0]), p)


@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
@pytest.mark.parametrize("shape,hidden", [
    ((3, 7, 9, 24), 40), ((2, 14, 13, 16), 64), ((4, 1, 1, 8), 8)])
def test_any_shape_and_activation(shape, hidden, activation):
  assert_same(shape, hidden, activation=activation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape,hidden", [
    ((2, 56, 4, 64), 256), ((16, 7, 3, 128), 640), ((16, 14, 2, 320), 1280),
    ((4, 28, 8, 96), 384)])
def test_groups_of_pixels_and_parts_of_the_hidden_channels(shape, hidden,
                                                           dtype):
  assert_same(shape, hidden, dtype)


def test_without_biases_and_layer_scale():
  assert_same((2, 5, 6, 8), 24, bias=False)
  assert_same((2, 5, 6, 8), 24, layer_scale=None)


def test_an_image_that_is_not_finite_does_not_spread():
  x = cases.images((4, 7, 6, 64), "float32").at[1, 3, 2, 5].set(np.nan)
  y = cases.mlp_kernel(x, None, cases.parameters(64, 128))
  assert np.isnan(y[1]).any()
  assert np.isfinite(np.delete(y, 1, 0)).all()


def test_other_platforms_compute_the_plain_form():
  shape = (16, 7, 8, 64)
  assert mlp.problem(shape, jnp.float32, 256, "gelu") is None
  cases.assert_same(
      functools.partial(cases.mlp_kernel, interpret=False), cases.mlp_modules,
      cases.images(shape, "float32"), cases.keep(16), cases.parameters(64, 256))


def test_what_does_not_fit_has_a_reason():
  assert "rows" in mlp.problem((3, 7, 8, 64), jnp.float32, 256, "gelu")
  assert "lanes" in mlp.problem((8, 7, 7, 64), jnp.float32, 256, "gelu")
  assert "hidden" in mlp.problem((8, 7, 8, 64), jnp.float32, 200, "gelu")
  assert "silu" in mlp.problem((8, 7, 8, 64), jnp.float32, 256, "silu")
  assert "VMEM" in mlp.problem((8, 8, 8, 2048), jnp.float32, 8192, "gelu")
