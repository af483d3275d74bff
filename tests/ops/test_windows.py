"""Sliding windows and mirrored images against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_segmentation as plain
import pytest

from metaformer_jax.ops import resize, windows

SIZES = ((13, 21), (5, 4), (6, 22), (23, 7), (1, 1), (11, 5))


def batch(rng, height=23, width=22):
  """Images at the top left of canvases, zero in the padding."""
  images = rng.normal(size=(len(SIZES), height, width, 3)).astype(np.float32)
  valid = resize.mask(jnp.array(SIZES), height, width)
  return np.where(valid[..., None], images, 0)


@pytest.mark.parametrize(("window", "stride"), (
    ((6, 5), (4, 3)), ((6, 5), (6, 5)), ((30, 4), (1, 1)), ((23, 22), (7, 7))))
def test_average_equals_slide_inference(window, stride):
  images = batch(np.random.default_rng(0))

  def of_window(x):  # Depends on the place in the window, and on its size.
    h, w, _ = x.shape
    return np.concatenate([x * np.arange(1, h + 1)[:, None, None],
                           x.sum((0, 1), keepdims=True) + 0 * x], -1) + w

  def fn(x, sizes):
    valid = resize.mask(sizes, *x.shape[1:3])[..., None]
    x = jnp.where(valid, x, 0)
    rows = jnp.arange(1, x.shape[1] + 1)[None, :, None, None]
    found = jnp.concatenate(
        [x * rows, x.sum((1, 2), keepdims=True) + 0 * x], -1)
    # What is in the padding must not matter.
    return jnp.where(valid, found + sizes[:, 1, None, None, None], jnp.nan)

  found = jax.jit(lambda x, s: windows.average(fn, x, s, window, stride))(
      images, jnp.array(SIZES))
  for x, y, (h, w) in zip(images, np.asarray(found), SIZES):
    np.testing.assert_allclose(
        y[:h, :w], plain.slide(of_window, x[:h, :w], window, stride),
        rtol=1e-5, atol=1e-5)
    assert not y[h:].any() and not y[:, w:].any()


def test_mirrored_images_stay_at_the_left():
  images = batch(np.random.default_rng(1))
  found = np.asarray(windows.mirrored(images, jnp.array(SIZES)[:, 1]))
  for x, y, (_, w) in zip(images, found, SIZES):
    np.testing.assert_array_equal(y[:, :w], x[:, :w][:, ::-1])
    assert not y[:, w:].any()
