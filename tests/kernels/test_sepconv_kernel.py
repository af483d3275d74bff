"""The kernels of separable convolutions, interpreted, against the modules."""

import functools

import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from metaformer_jax.kernels import norms, sepconv


def assert_same(shape, hidden, size=7, dtype="float32", activation="star_relu",
                norm="layer_norm", bias=False, **changes):
  p = cases.sepconv_parameters(shape[-1], hidden, size, bias=bias,
                               star=activation == "star_relu") | changes
  kernel, modules = (
      functools.partial(branch, activation=activation, norm=norm)
      for branch in (cases.sepconv_kernel, cases.sepconv_modules))
  cases.assert_same(kernel, modules, cases.images(shape, dtype),
                    cases.keep(shape[0]), p)


@pytest.mark.parametrize("shape,hidden,size,activation,norm,bias", [
    pytest.param((3, 7, 9, 24), 48, 7, "star_relu", "layer_norm", False,
                 marks=pytest.mark.slow),
    ((2, 5, 6, 8), 16, 3, "gelu", "group_norm", True),
    # A kernel that is larger than the image.
    ((2, 2, 1, 8), 12, 7, "star_relu", "group_norm", False),
    pytest.param((2, 11, 3, 16), 24, 1, "relu", "layer_norm", True,
                 marks=pytest.mark.slow),
    pytest.param((3, 16, 13, 8), 16, 5, "squared_relu", "layer_norm", False,
                 marks=pytest.mark.slow)])
def test_any_shape_size_activation_and_norm(shape, hidden, size, activation,
                                            norm, bias):
  assert_same(shape, hidden, size, activation=activation, norm=norm, bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("shape,hidden,dtype", [
    # Groups of two columns; two tiles of hidden channels, the last one ragged.
    ((16, 8, 4, 64), 192, "float32"),
    ((8, 14, 2, 320), 256, "bfloat16"), ((16, 28, 2, 128), 256, "bfloat16"),
    ((8, 7, 7, 512), 1024, "float32")])
def test_groups_of_columns_and_tiles_of_the_hidden_channels(shape, hidden,
                                                            dtype):
  assert_same(shape, hidden, dtype=dtype)


@pytest.mark.slow
def test_without_scales():
  assert_same((2, 5, 6, 8), 16, activation="squared_relu", layer_scale=None,
              res_scale=None)


def test_an_image_that_is_not_finite_does_not_spread():
  x = cases.images((4, 7, 6, 64), "float32").at[1, 3, 2, 5].set(np.nan)
  y = cases.sepconv_kernel(x, None, cases.sepconv_parameters(64, 128, 7))
  assert np.isnan(y[1]).any()
  assert np.isfinite(np.delete(y, 1, 0)).all()


def test_other_platforms_compute_the_plain_form():
  shape = (8, 7, 8, 64)
  assert sepconv.problem(shape, jnp.float32, 128, 7, "star_relu") is None
  cases.assert_same(
      functools.partial(cases.sepconv_kernel, interpret=False),
      cases.sepconv_modules, cases.images(shape, "float32"), cases.keep(8),
      cases.sepconv_parameters(64, 128, 7))


def test_what_does_not_fit_has_a_reason():
  problem = functools.partial(sepconv.problem, hidden=128, kernel=7,
                              activation="star_relu")
  assert problem((8, 7, 7, 64), jnp.float32) is None
  assert "images" in problem((3, 7, 8, 64), jnp.float32)
  assert "float16" in problem((8, 7, 8, 64), jnp.float16)
  assert "silu" in problem((8, 7, 8, 64), jnp.float32, activation="silu")
  for norm in norms.NORMS:
    assert "VMEM" in problem((8, 128, 128, 64), jnp.float32, norm=norm)


def test_devices_share_a_batch():
  cases.assert_devices_share_a_batch(
      cases.sepconv_kernel, cases.sepconv_modules,
      cases.sepconv_parameters(8, 16, 3))
