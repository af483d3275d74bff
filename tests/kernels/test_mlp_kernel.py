"""The kernels of the MLP branch, interpreted, against the modules."""

import functools

import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from metaformer_jax.kernels import mlp, norms


def assert_same(shape, hidden, dtype="float32", activation="gelu", bias=True,
                norm="group_norm", **changes):
  p = cases.parameters(shape[-1], hidden, bias=bias,
                       star=activation == "star_relu") | changes
  kernel, modules = (
      functools.partial(branch, activation=activation, norm=norm)
      for branch in (cases.mlp_kernel, cases.mlp_modules))
  cases.assert_same(kernel, modules, cases.images(shape, dtype),
                    cases.keep(shape[0]), p)


@pytest.mark.parametrize("shape,hidden,activation,norm", [
    ((3, 7, 9, 24), 40, "gelu", "group_norm"),
    ((3, 7, 5, 24), 40, "star_relu", "layer_norm"),
    ((4, 1, 1, 8), 8, "squared_relu", "group_norm"),
    pytest.param((4, 1, 1, 8), 8, "gelu", "layer_norm", marks=pytest.mark.slow),
    pytest.param((2, 5, 6, 8), 16, "star_relu", "group_norm",
                 marks=pytest.mark.slow),
    pytest.param((2, 14, 13, 16), 64, "relu", "group_norm",
                 marks=pytest.mark.slow)])
def test_any_shape_activation_and_norm(shape, hidden, activation, norm):
  assert_same(shape, hidden, activation=activation, norm=norm)


@pytest.mark.parametrize("shape,hidden,dtype", [
    ((16, 30, 2, 64), 640, "float32"), ((8, 4, 2, 320), 256, "bfloat16"),
    pytest.param((16, 7, 3, 128), 640, "bfloat16", marks=pytest.mark.slow),
    pytest.param((8, 14, 2, 320), 1280, "float32", marks=pytest.mark.slow),
    pytest.param((8, 28, 8, 96), 384, "bfloat16", marks=pytest.mark.slow)])
def test_groups_of_columns_and_parts_of_the_hidden_channels(shape, hidden,
                                                            dtype):
  assert_same(shape, hidden, dtype)


@pytest.mark.parametrize("shape,hidden,dtype", [
    # One block a height, three blocks; the last is one ragged group.
    ((16, 3, 4, 64), 256, "float32"),
    pytest.param((72, 2, 4, 32), 128, "bfloat16", marks=pytest.mark.slow),
    pytest.param((8, 3, 3, 40), 128, "float32", marks=pytest.mark.slow),
    pytest.param((16, 3, 7, 576), 2304, "bfloat16", marks=pytest.mark.slow),
    pytest.param((128, 2, 8, 128), 512, "float32", marks=pytest.mark.slow)])
def test_rows_of_images_with_a_layer_norm(shape, hidden, dtype):
  assert_same(shape, hidden, dtype, "star_relu", False, "layer_norm",
              layer_scale=None)


@pytest.mark.parametrize("norm", ["group_norm", "layer_norm"])
def test_without_biases_and_scales(norm):
  assert_same((2, 5, 6, 8), 24, bias=False, norm=norm, layer_scale=None,
              res_scale=None)


def test_an_image_that_is_not_finite_does_not_spread():
  x = cases.images((4, 7, 6, 64), "float32").at[1, 3, 2, 5].set(np.nan)
  y = cases.mlp_kernel(x, None, cases.parameters(64, 128))
  assert np.isnan(y[1]).any()
  assert np.isfinite(np.delete(y, 1, 0)).all()


def test_other_platforms_compute_the_plain_form():
  shape = (8, 7, 8, 64)
  assert mlp.problem(shape, jnp.float32, 256, "gelu") is None
  cases.assert_same(
      functools.partial(cases.mlp_kernel, interpret=False), cases.mlp_modules,
      cases.images(shape, "float32"), cases.keep(8), cases.parameters(64, 256))


def test_what_does_not_fit_has_a_reason():
  assert "images" in mlp.problem((3, 7, 8, 64), jnp.float32, 256, "gelu")
  assert mlp.problem((8, 7, 7, 64), jnp.float32, 256, "gelu") is None
  assert "float16" in mlp.problem((8, 7, 8, 64), jnp.float16, 256, "gelu")
  assert "hidden" in mlp.problem((8, 7, 8, 64), jnp.float32, 200, "gelu")
  assert "silu" in mlp.problem((8, 7, 8, 64), jnp.float32, 256, "silu")
  for norm in norms.NORMS:
    assert "VMEM" in mlp.problem((8, 8, 8, 2048), jnp.float32, 8192, "gelu",
                                 norm)


def test_devices_share_a_batch():
  cases.assert_devices_share_a_batch(
      cases.mlp_kernel, cases.mlp_modules, cases.parameters(8, 16))
