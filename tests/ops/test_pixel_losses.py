"""Losses and predictions of pixels against plain NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import plain_segmentation as plain
import pytest

from metaformer_jax.ops import pixels, resize

# Sizes of logits, of their images and of label maps: odd, of one pixel, larger
# and smaller.
SIZES = (((5, 8), (20, 32), (37, 50)), ((1, 3), (4, 12), (1, 9)),
         ((8, 2), (29, 7), (13, 5)), ((3, 1), (12, 4), (64, 1)))
N_CLASSES = 7


def canvases(rng, sizes, height=8, width=8):
  """Logits of these sizes; the padding is anything."""
  logits = rng.normal(0, 3, (len(sizes), height, width, N_CLASSES))
  return jnp.array(logits, jnp.float32), jnp.array(sizes, jnp.int32)


def top_left(x, size):
  return np.asarray(x)[:size[0], :size[1]]


@pytest.mark.parametrize("block", (None, 1))
def test_cross_entropy_and_its_gradient(block, monkeypatch):
  if block:  # A row at a time.
    monkeypatch.setattr(pixels, "_BLOCK", block)
  rng = np.random.default_rng(0)
  logits, logit_sizes = canvases(rng, [s[0] for s in SIZES])
  sizes = [s[1] for s in SIZES]
  label = np.full((4, 33, 35), 255, np.uint8)
  for i, (h, w) in enumerate(sizes):
    label[i, :h, :w] = rng.choice([*range(N_CLASSES), 255], (h, w))
  label[3] = 255  # Nothing counts.

  def loss(logits):
    return pixels.cross_entropy(logits, logit_sizes, jnp.array(label),
                                jnp.array(sizes), 255)

  (found, accuracy), gradient = jax.jit(
      jax.value_and_grad(loss, has_aux=True))(logits)
  losses, right, counts = 0, 0, 0
  for i, (h, w) in enumerate(sizes):
    resized = plain.resize(top_left(logits[i], SIZES[i][0]), h, w)
    losses += plain.pixel_losses(resized, label[i, :h, :w]).sum()
    right += (resized.argmax(-1) == label[i, :h, :w]).sum()
    counts += (label[i] != 255).sum()
  np.testing.assert_allclose(found, losses / label.size, rtol=1e-5)
  np.testing.assert_allclose(accuracy, right / counts, rtol=1e-6)

  step = rng.normal(size=logits.shape)
  slope = (loss(logits + 1e-2 * step)[0] - loss(logits - 1e-2 * step)[0]) / 2e-2
  np.testing.assert_allclose((gradient * step).sum(), slope, rtol=2e-3)
  valid = resize.mask(logit_sizes, 8, 8)[..., None]
  assert not np.where(valid, 0, gradient).any()
  assert not np.asarray(gradient[3]).any()


@pytest.mark.parametrize("n_maps", (1, 3))
def test_classes(n_maps):
  rng = np.random.default_rng(n_maps)
  maps = []
  for _ in range(n_maps):
    logits, sizes = canvases(rng, [s[0] for s in SIZES])
    maps.append((logits, sizes, jnp.array([s[1] for s in SIZES])))
  label_sizes = jnp.array([s[2] for s in SIZES])
  found = jax.jit(lambda maps: pixels.classes(
      [pixels.Logits(*m, (33, 35)) for m in maps], label_sizes, (64, 51)))(maps)
  assert found.shape == (4, 64, 51) and found.dtype == jnp.uint8
  for i, (small, image, size) in enumerate(SIZES):
    total = 0
    for logits, *_ in maps:
      resized = plain.resize(plain.resize(
          top_left(logits[i], small), *image), *size)
      total += plain.softmax(resized)
    best = np.sort(total, -1)
    clear = best[..., -1] - best[..., -2] > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(top_left(found[i], size)[clear],
                                  total.argmax(-1)[clear])
