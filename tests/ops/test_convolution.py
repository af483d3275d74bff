"""Convolutions in the forms for CPUs against `lax.conv_general_dilated`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import platform_forms
import pytest
from jax import lax

from metaformer_jax.models import cost, layers
from metaformer_jax.ops import convolution

NUMBERS = ("NHWC", "HWIO", "NHWC")
NONE = ((0, 0), (0, 0))
KINDS = ("pointwise", "strided", "winograd", "depthwise")


def plain(x, kernel, window):
  return lax.conv_general_dilated(
      x, kernel, *window[:2], dimension_numbers=NUMBERS,
      feature_group_count=window.groups)


def case(kind, rng):
  """Shapes of x and of the kernel, and the window, at random."""
  b, h, w = rng.integers(1, 4), *rng.integers(7, 24, 2)
  c_in, c_out = rng.integers(4, 8, 2)
  strides = tuple(int(v) for v in rng.integers(1, 4, 2))
  size = tuple(int(v) for v in rng.choice([1, 2, 3, 4, 5, 7], 2))
  padding = tuple(tuple(int(v) for v in pair)
                  for pair in rng.integers(0, 4, (2, 2)))
  groups = 1
  if kind == "pointwise":
    size, padding = (1, 1), NONE
  elif kind == "strided":
    size, strides = (size[0], max(size[1], 2)), (strides[0], 2)
  elif kind == "winograd":
    size, strides = (3, 3), (1, 1)
    c_in, c_out = rng.integers(32, 40, 2)
  else:
    c_out = groups = int(c_in)
    strides, w = (1, 1), rng.choice([7, 20, 63, 64, 65, 130])
  return ((b, h, w, c_in), (*size, c_in // groups, c_out),
          convolution.Window(strides, padding, groups))


def arrays(shapes, dtype, seed=0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_same(kind, dtype):
  rng = np.random.default_rng(1)
  for seed in range(6 if dtype == "float32" else 3):
    *shapes, window = case(kind, rng)
    assert any(convolution.cpu_forms(shapes[1], window))
    platform_forms.assert_same(
        functools.partial(convolution.conv, window=window),
        functools.partial(plain, window=window), *arrays(shapes, dtype, seed))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shapes", "window"), [
    (((2, 23, 9, 4), (3, 2, 4, 5)), ((2, 2), ((1, 2), (0, 1)), 1)),
    (((2, 40, 32, 3), (7, 7, 3, 8)), ((4, 4), ((2, 2), (2, 2)), 1))])
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_a_strided_kernels_gradient_is_the_sum_of_bands(
    rows, shapes, window, dtype, monkeypatch):
  """Of 12 and 10 rows: in some cases, the last band is smaller."""
  window = convolution.Window(*window)
  x, kernel = arrays(shapes, dtype)
  y = jax.eval_shape(lambda: plain(x, kernel, window))
  row_bytes = 4 * y.shape[0] * y.shape[2] * kernel[..., 0].size
  monkeypatch.setattr(convolution, "_BAND_BYTES", rows * row_bytes)
  platform_forms.assert_same(
      functools.partial(convolution.conv, window=window),
      functools.partial(plain, window=window), x, kernel)


def test_other_platforms_compute_what_flax_computes():
  for kind in KINDS:
    *shapes, window = case(kind, np.random.default_rng(2))
    x, kernel = arrays(shapes, "bfloat16")

    def gradients(fn, x, kernel):
      return jax.grad(lambda *v: fn(*v).astype(jnp.float32).sum(),
                      argnums=(0, 1))(x, kernel)

    ours, flax = (functools.partial(fn, window=window)
                  for fn in (convolution.conv, plain))
    assert platform_forms.operations(ours, x, kernel) == (
        platform_forms.operations(flax, x, kernel))
    assert platform_forms.operations(
        functools.partial(gradients, ours), x, kernel) == (
            platform_forms.operations(functools.partial(gradients, flax), x,
                                    kernel))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("side", "size", "padding"), [
    ((7, 7), (7, 7), ((3, 3), (3, 3))), ((3, 12), (7, 5), ((3, 3), (2, 2))),
    ((20, 4), (3, 5), ((1, 1), (2, 1))), ((1, 1), (3, 3), ((1, 1), (1, 1))),
    ((9, 8), (5, 7), ((0, 0), (0, 0)))])
def test_gradients_of_depthwise_kernels_for_gpus(side, size, padding, dtype):
  window = convolution.Window((1, 1), padding, 6)
  x, kernel = arrays(((2, *side, 6), (*size, 1, 6)), dtype)
  form = convolution.cuda_forms(x.shape, kernel.shape, window).kernel_gradient
  exact = functools.partial(plain, x.astype(jnp.float32), window=window)
  y, pull = jax.vjp(exact, kernel.astype(jnp.float32))
  dy, = arrays((y.shape,), dtype, seed=1)
  want, = pull(dy.astype(jnp.float32))
  found = form(x, dy, shape=kernel.shape, window=window)
  assert found.dtype == x.dtype
  np.testing.assert_allclose(
      found.astype(jnp.float32), want, rtol=0,
      atol=platform_forms.TOLERANCES[dtype] * np.abs(want).max())


@pytest.mark.parametrize(("side", "padded"), [(7, True), (8, False)])
def test_only_small_images_have_a_form_for_gpus(side, padded):
  window = convolution.Window((1, 1), ((3, 3), (3, 3)), 4)
  x, kernel = arrays([(2, side, 8, 4), (7, 7, 1, 4)], "bfloat16")

  def operations(fn):
    return platform_forms.operations(
        jax.grad(lambda kernel: fn(x, kernel, window).sum()), kernel,
        platform="cuda")

  ours, flax = map(operations, (convolution.conv, plain))
  assert (ours.count("pad") > flax.count("pad")) == padded
  assert ours.count("convolution") == flax.count("convolution")


@pytest.mark.parametrize(("size", "kwargs"), [
    ((3, 3), {}), ((1, 1), {"padding": ((1, 1), (0, 0))}),
    ((3, 3), {"strides": 2, "kernel_dilation": 2}),
    ((3, 3), {"strides": 2, "feature_group_count": 2}),
    ((3, 3), {"feature_group_count": 4, "strides": 2}),
    ((1, 1), {"input_dilation": 2, "padding": ((0, 1), (0, 0))}),
    ((3, 3), {"strides": 2}),
    ((1, 1), {"strides": (2, 1)}), ((5, 3), {"feature_group_count": 4}),
    ((3, 3), {"feature_group_count": 4, "padding": "VALID"}),
    ((2, 2), {"strides": 2, "padding": "VALID"}), ((3,), {"strides": 2}),
    ((1, 1), {"precision": "highest"})])
def test_a_layer_is_flaxs(size, kwargs):
  x, = arrays([(2, *(9, 12)[:len(size)], 4)], "float32")
  ours = layers.Conv(8, size, **kwargs)
  flax = layers.Conv.func(8, size, **kwargs)
  variables = jax.jit(ours.init)(jax.random.key(0), x)
  np.testing.assert_allclose(
      jax.jit(ours.apply)(variables, x), jax.jit(flax.apply)(variables, x),
      rtol=0, atol=2e-6)


def test_the_gradient_of_images_is_neither_computed_nor_counted():
  x, kernel = arrays([(2, 28, 28, 4), (7, 7, 4, 8)], "float32")
  window = convolution.Window((4, 4), ((2, 2), (2, 2)), 1)

  def loss(fn):
    return jax.jit(jax.grad(
        lambda kernel: (fn(x, kernel, window)**2).sum()))

  counted = [cost.count_macs(loss(fn), kernel)
             for fn in (convolution.conv, plain)]
  assert counted[0] == counted[1]
  np.testing.assert_allclose(*(loss(fn)(kernel) for fn in (
      convolution.conv, plain)), rtol=1e-5, atol=1e-3)


def test_under_vmap_and_in_a_loop():
  x, kernel = arrays([(3, 9, 11, 4), (3, 3, 1, 4)], "float32")
  window = convolution.Window((1, 1), ((1, 1), (1, 1)), 4)
  want = plain(x, kernel, window)
  each = jax.jit(jax.vmap(
      lambda x: convolution.conv(x[None], kernel, window)[0]))(x)
  np.testing.assert_allclose(each, want, atol=2e-6)

  def total(kernel):
    return lax.scan(lambda sum_, x: (
        sum_ + jax.checkpoint(convolution.conv, static_argnums=2)(
            x[None], kernel, window).sum(), None), 0.0, x)[0]

  np.testing.assert_allclose(
      jax.jit(jax.grad(total))(kernel), jax.jit(jax.grad(
          lambda kernel: plain(x, kernel, window).sum()))(kernel),
      rtol=1e-5, atol=1e-5)
