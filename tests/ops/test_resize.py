"""Resizing and pooling against plain NumPy, on canvases of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metaformer_jax.ops import resize

# Height and width of an image, and of the result.
PAIRS = (((1, 1), (3, 5)), ((9, 7), (5, 14)), ((6, 8), (12, 16)),
         ((8, 6), (8, 6)), ((16, 3), (31, 5)), ((13, 2), (1, 1)),
         ((2, 5), (5, 11)))
CANVAS, TO_CANVAS = (16, 8), (32, 16)


def image(height, width, seed=0):
  return np.random.default_rng(seed).standard_normal(
      (height, width, 3)).astype(np.float32)


def on_canvases(images, fill=7.0):
  x = np.full((len(images), *CANVAS, 3), fill, np.float32)
  for place, one in zip(x, images):
    place[:one.shape[0], :one.shape[1]] = one
  return x


def bilinear_line(x, n):
  """Along the first axis: pixel centres at halves, borders repeated."""
  at = (np.arange(n) + 0.5) * len(x) / n - 0.5
  at = np.clip(at, 0, len(x) - 1)
  low = np.floor(at).astype(int)
  part = (at - low)[:, None, None]
  return x[low] * (1 - part) + x[np.minimum(low + 1, len(x) - 1)] * part


def nearest_line(x, n):
  return x[[i * len(x) // n for i in range(n)]]


def pooled_line(x, n):
  """Means of PyTorch's adaptive bins."""
  return np.stack([x[i * len(x) // n:-((i + 1) * len(x) // -n)].mean(0)
                   for i in range(n)])


LINES = {"bilinear": bilinear_line, "nearest": nearest_line}


def both(line, x, height, width):
  y = line(np.asarray(x, np.float64), height)
  return line(y.swapaxes(0, 1), width).swapaxes(0, 1)


@pytest.mark.parametrize("method", LINES)
def test_an_image_alone(method):
  for (h, w), to in PAIRS:
    x = image(h, w)
    np.testing.assert_allclose(
        jax.jit(lambda x, to=to: resize.resize(x[None], to, method=method))(
            x)[0],
        both(LINES[method], x, *to), atol=1e-6, err_msg=f"{h} x {w} to {to}")


@pytest.mark.parametrize("method", LINES)
def test_images_of_many_sizes_share_a_canvas(method):
  """The sizes are traced: one program for all."""
  images = [image(*size, seed=i) for i, (size, _) in enumerate(PAIRS)]
  run = jax.jit(lambda x, a, b: resize.resize(x, TO_CANVAS, a, b,
                                              method=method))
  got = np.array(run(on_canvases(images), *map(jnp.array, zip(*PAIRS))))
  for y, x, (_, to) in zip(got, images, PAIRS):
    np.testing.assert_allclose(y[:to[0], :to[1]],
                               both(LINES[method], x, *to), atol=1e-6)
    y[:to[0], :to[1]] = 0
    assert not y.any()


@pytest.mark.parametrize("factor", [
    3, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
def test_enlarging_is_bilinear_resizing(factor):
  sizes = jnp.array([size for size, _ in PAIRS])
  images = [image(*size, seed=i) for i, size in enumerate(sizes)]
  x, mask = on_canvases(images), resize.mask(sizes, *CANVAS)
  run = jax.jit(resize.enlarge, static_argnames="factor")
  got, got_mask = run(x, mask, factor=factor)
  assert np.array_equal(resize.sizes(got_mask), factor * sizes)
  for y, one in zip(got, images):
    h, w = factor * one.shape[0], factor * one.shape[1]
    np.testing.assert_allclose(y[:h, :w], both(bilinear_line, one, h, w),
                               atol=1e-6)
  alone, none = run(x[:1], factor=factor)
  assert none is None
  to = [factor * n for n in CANVAS]
  want = both(bilinear_line, x[0], *to)
  np.testing.assert_allclose(alone[0], want, atol=3e-6)
  np.testing.assert_array_equal(resize.resize(x[:1], to), alone)


@pytest.mark.slow
def test_doubling_and_resizing_at_once_is_one_after_the_other():
  sizes = jnp.array([size for size, _ in PAIRS])
  x = on_canvases([image(*size, seed=i) for i, size in enumerate(sizes)])
  mask, to_mask = resize.mask(sizes, *CANVAS), resize.mask(
      2 * sizes - 1, *TO_CANVAS)
  np.testing.assert_allclose(
      jax.jit(resize.double_to, static_argnums=2)(x, mask, TO_CANVAS, to_mask),
      resize.by_masks(*resize.enlarge(x, mask), TO_CANVAS, to_mask), atol=2e-6)


@pytest.mark.parametrize("side", [
    *(pytest.param(side, marks=pytest.mark.slow) for side in (1, 2)), 3, 6])
def test_adaptive_pooling_has_pytorchs_bins(side):
  sizes = jnp.array([size for size, _ in PAIRS])
  images = [image(*size, seed=i) for i, size in enumerate(sizes)]
  pool = jax.jit(resize.adaptive_average_pool, static_argnums=1)
  for y, x in zip(pool(on_canvases(images), side, sizes), images):
    np.testing.assert_allclose(y, both(pooled_line, x, side, side), atol=1e-6)
  np.testing.assert_allclose(
      pool(images[1][None], side)[0],
      both(pooled_line, images[1], side, side), atol=1e-6)


def test_an_example_without_an_image_gives_zeros():
  x, none = on_canvases([image(1, 1)]), jnp.zeros((1, 2), int)
  some = jnp.array([[4, 4]])
  run = jax.jit(resize.resize, static_argnums=1)
  for from_sizes, to_sizes in ((none, some), (some, none), (none, none)):
    assert not run(x, TO_CANVAS, from_sizes, to_sizes).any()
  assert not resize.adaptive_average_pool(x, 3, none).any()


def test_padding_gets_no_gradient():
  size = jnp.array([[5, 3]])

  def loss(x):
    y, mask = resize.enlarge(x, resize.mask(size, *CANVAS))
    y = resize.by_masks(y, mask, TO_CANVAS, resize.mask(size + 4, *TO_CANVAS))
    return jnp.square(y).sum()

  gradient = np.array(jax.jit(jax.grad(loss))(on_canvases([image(5, 3)])))
  assert np.all(gradient[0, :5, :3])
  gradient[0, :5, :3] = 0
  assert not gradient.any()


def test_positions_are_exact_where_float32_is_not():
  """In float32, 41 * (2 / 82) is below 1."""
  assert np.float32(41) * (np.float32(2) / np.float32(82)) < 1
  np.testing.assert_array_equal(resize.nearest_weights(2, 82)[41], [0, 1])


@pytest.mark.slow
def test_bfloat16_is_rounded_once_or_not_at_all():
  x = image(9, 7)[None].astype(jnp.bfloat16)
  np.testing.assert_array_equal(
      resize.resize(x, (18, 7), method="nearest"), x.repeat(2, 1))
  want = resize.resize(x.astype(np.float32), (31, 5)).astype(jnp.bfloat16)
  got = resize.resize(x, (31, 5))
  assert got.dtype == jnp.bfloat16 and np.array_equal(got, want)


def test_an_unknown_method_is_named():
  with pytest.raises(ValueError, match=r"'linear'.*bilinear"):
    resize.resize(image(2, 2)[None], (4, 4), method="linear")
