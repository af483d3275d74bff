"""The kernels of the pooling branch, interpreted, against the modules."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from metaformer_jax.kernels import pooling


def assert_same(shape, dtype="float32", size=3, subtract=True, **changes):
  p = cases.pooling_parameters(shape[-1]) | changes
  kernel, modules = (
      functools.partial(branch, size=size, subtract=subtract)
      for branch in (cases.pooling_kernel, cases.pooling_modules))
  cases.assert_same(kernel, modules, cases.images(shape, dtype),
                    cases.keep(shape[0]), p)


@pytest.mark.parametrize("shape,size,subtract", [
    ((3, 7, 9, 24), 3, True), ((2, 14, 13, 16), 5, False),
    ((4, 1, 1, 8), 3, True),
    pytest.param((2, 3, 2, 8), 9, False, marks=pytest.mark.slow),
    pytest.param((2, 4, 5, 8), 1, True, marks=pytest.mark.slow)])
def test_any_shape_and_window(shape, size, subtract):
  assert_same(shape, size=size, subtract=subtract)


@pytest.mark.parametrize("shape,dtype", [
    ((16, 6, 4, 64), "float32"), ((8, 5, 2, 320), "bfloat16"),
    pytest.param((16, 56, 8, 64), "bfloat16", marks=pytest.mark.slow),
    pytest.param((16, 7, 7, 128), "float32", marks=pytest.mark.slow),
    pytest.param((8, 28, 8, 96), "float32", marks=pytest.mark.slow)])
def test_several_blocks_and_groups_of_columns(shape, dtype):
  """Of these shapes, each needs another of the ways to fill the tiles."""
  assert_same(shape, dtype)


@pytest.mark.parametrize("changes", [
    {"norm_bias": None, "res_scale": None},
    {"subtract": False, "layer_scale": None}])
def test_without_norm_bias_and_scales(changes):
  assert_same((2, 5, 6, 8), **changes)


def test_the_norms_bias_cancels_exactly():
  x, p = cases.images((2, 5, 6, 8), "float32"), cases.pooling_parameters(8)

  def loss(p):
    return jnp.square(cases.pooling_kernel(x, None, p, 3)).sum()

  assert not np.any(jax.grad(loss)(p)["norm_bias"])


def test_an_image_that_is_not_finite_does_not_spread():
  x = cases.images((4, 7, 6, 64), "float32").at[1, 3, 2, 5].set(np.nan)
  y = cases.pooling_kernel(x, None, cases.pooling_parameters(64), 3)
  assert np.isnan(y[1]).any()
  assert np.isfinite(np.delete(y, 1, 0)).all()


def test_other_platforms_compute_the_plain_form():
  shape = (8, 7, 8, 64)
  assert pooling.problem(shape, jnp.float32, 3) is None
  branch = functools.partial(cases.pooling_kernel, size=3, interpret=False)
  cases.assert_same(
      branch, functools.partial(cases.pooling_modules, size=3),
      cases.images(shape, "float32"), cases.keep(8),
      cases.pooling_parameters(64))


def test_what_does_not_fit_has_a_reason():
  assert "images" in pooling.problem((3, 7, 8, 64), jnp.float32, 3)
  assert "lanes" in pooling.problem((8, 7, 7, 64), jnp.float32, 3)
  assert "float16" in pooling.problem((8, 7, 8, 64), jnp.float16, 3)
  assert "VMEM" in pooling.problem((8, 256, 256, 64), jnp.float32, 3)
