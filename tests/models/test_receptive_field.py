"""Effective receptive fields against finite differences, and known windows."""

import functools

import jax
import numpy as np
import pytest
import small_models
from flax import linen as nn

from metaformer_jax.models import receptive_field


class Windows(nn.Module):
  """Two convolutions with known kernels: 3x3 at stride 2, then 1x3."""

  def setup(self):
    self.stage1 = nn.Conv(2, (3, 3), strides=2, padding="SAME")
    self.stage2 = nn.Conv(1, (1, 3), padding="SAME")

  def features(self, x):
    y = self.stage1(x)
    return {"stage1": y, "stage2": self.stage2(y)}

  def __call__(self, x):
    return self.features(x)["stage2"].mean((1, 2))


@pytest.mark.parametrize("layer", ["stage1", None])
def test_a_window_of_known_weights(layer):
  model, rng = Windows(), np.random.default_rng(0)
  x = rng.normal(size=(2, 9, 11, 1)).astype(np.float32)
  variables = model.init(jax.random.key(0), x)
  found = receptive_field.field(model, variables, x, layer)
  first, second = (np.asarray(variables["params"][stage]["kernel"])
                   for stage in ("stage1", "stage2"))
  want = np.zeros((9, 11))
  # Stride 2 of 9 x 11 is 5 x 6; the place (2, 3) begins at pixel (3, 5).
  if layer == "stage1":
    want[3:6, 5:8] = abs(first.sum((2, 3)))
  else:
    signed = np.zeros((9, 11))
    for i in range(3):
      signed[3:6, 3 + 2 * i:6 + 2 * i] += first[:, :, 0] @ second[0, i, :, 0]
    want = abs(signed)
  np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("name,layer", [
    ("poolformer_s12", "stage1/block1/mlp"),
    ("deit_base_distilled_patch16_224", None)])
def test_gradients_are_those_of_finite_differences(name, layer):
  """One channel; the sum of a place's channels, by moving single pixels."""
  model, variables = small_models.drawn(name, channels=1)
  x = small_models.images(1, 32, 40, channels=1)
  found = np.asarray(jax.jit(functools.partial(
      receptive_field.field, model, layer=layer))(variables, x))
  assert found.shape == (32, 40)

  @jax.jit
  def centre(x):
    if layer is None:
      y = model.apply(variables, x, method="features")["stage4"]
    else:
      _, state = model.apply(variables, x, capture_intermediates=True)
      y = state["intermediates"]["stage1"]["block1"]["mlp"]["__call__"][0]
    return y[:, y.shape[1] // 2, y.shape[2] // 2].sum(-1)

  step = 1e-2
  for row, column in [(16, 20), (17, 22), (3, 5), (30, 38)]:
    moved = np.repeat(x, 2, 0)
    moved[0, row, column] += step
    moved[1, row, column] -= step
    up, down = np.asarray(centre(moved), np.float64)
    want = abs(up - down) / (2 * step)
    np.testing.assert_allclose(found[row, column], want, rtol=0,
                               atol=2e-3 * found.max())


def test_shares_are_of_the_largest_pixels():
  field = np.array([[0, 6], [1, 3]])
  assert receptive_field.share(field, 0.5) == 0.25
  assert receptive_field.share(field, 0.6) == 0.25
  assert receptive_field.share(field, 0.7) == 0.5
  assert receptive_field.share(field, 0.95) == 0.75
  assert receptive_field.share(field, 1.0) == 0.75
  assert receptive_field.share(np.ones((3, 7)), 1.0) == 1
  assert receptive_field.share(np.zeros((2, 2)), 0.5) == 0
