"""ViT and DeiT against their equations: tokens, positions, heads, masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_layers as plain
import parity_cases
import pytest
from flax import linen as nn

from metaformer_jax.models import layers, positions, vit

images = parity_cases.images


def make(**settings):
  return vit.VisionTransformer(**{
      "patch_size": 8, "dim": 16, "depth": 2, "n_heads": 4, "num_classes": 5,
      **settings})


def numpy_params(variables):
  return jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])


def attention(p, x, n_heads):
  """One image, [N, C]; head by head."""
  dim = x.shape[1]
  q, k, v = np.split(plain.dense(p["qkv"], x), 3, axis=1)
  heads = []
  for i in range(n_heads):
    at = slice(i * dim // n_heads, (i + 1) * dim // n_heads)
    weights = np.exp(q[:, at] @ k[:, at].T / (dim / n_heads) ** 0.5)
    heads.append(weights / weights.sum(1, keepdims=True) @ v[:, at])
  return plain.dense(p["proj"], np.concatenate(heads, axis=1))


def block(p, x, n_heads):
  y = x + attention(p["attn"], plain.layer_norm(p["norm1"], x), n_heads)
  return y + plain.mlp(p["mlp"], plain.layer_norm(p["norm2"], y))


@pytest.mark.parametrize("distilled", [False, True])
def test_model_is_the_papers_equations(distilled):
  """Tokens in the order class, distillation, patches row by row."""
  model = make(distilled=distilled)
  x = images(2, 32, 32)
  variables = plain.drawn(model, x)
  p = numpy_params(variables)
  prefix = [p[name][0] for name in ("cls_token", "dist_token")[:1 + distilled]]
  n = len(prefix)
  logits, pooled, features = [], [], []
  for image in x:
    y = np.concatenate([*prefix, plain.patches(p["patch_embed"], image, 8)])
    y = y + p["pos_embed"][0]
    for i in (1, 2):
      y = block(p[f"block{i}"], y, n_heads=4)
    features.append(y[n:].reshape(4, 4, 16))
    y = plain.layer_norm(p["norm"], y)
    heads = [p["head"], p["head_dist"]] if distilled else [p["head"]]
    logits.append(np.mean(
        [plain.dense(h, y[i]) for i, h in enumerate(heads)], 0))
    pooled.append(y[:n].mean(0))
  got = plain.run(model, variables, x)
  np.testing.assert_allclose(got[0], logits, atol=1e-4)
  np.testing.assert_allclose(got[1], features, atol=1e-4)
  bare = make(distilled=distilled, num_classes=0)
  np.testing.assert_allclose(plain.run(bare, variables, x)[0], pooled,
                             atol=1e-4)
  # Without dropout, training computes the same function.
  np.testing.assert_allclose(
      plain.training(model, variables, x, "drop_path")(0), logits, atol=1e-4)


def test_names_are_the_checkpoint_format():
  variables = plain.drawn(make(distilled=True), images(1, 32, 24))
  got = plain.shapes(variables["params"])
  assert {k: v for k, v in got.items() if not k.startswith("block")} == {
      "patch_embed/kernel": (8, 8, 3, 16), "patch_embed/bias": (16,),
      "cls_token": (1, 1, 16), "dist_token": (1, 1, 16),
      "pos_embed": (1, 14, 16), "norm/scale": (16,), "norm/bias": (16,),
      "head/kernel": (16, 5), "head/bias": (5,),
      "head_dist/kernel": (16, 5), "head_dist/bias": (5,)}
  assert {k for k in got if k.startswith("block2")} == {
      f"block2/{name}" for name in (
          "norm1/scale", "norm1/bias", "attn/qkv/kernel", "attn/qkv/bias",
          "attn/proj/kernel", "attn/proj/bias", "norm2/scale", "norm2/bias",
          "mlp/fc1/kernel", "mlp/fc1/bias", "mlp/fc2/kernel", "mlp/fc2/bias")}


def test_first_values_are_deits():
  params = plain.initial(make(dim=256, distilled=True), images(1, 128, 128))
  for name in ("cls_token", "dist_token", "pos_embed"):
    np.testing.assert_allclose(params[name].std(), 0.02, rtol=0.15)
  for p in (params["head"], params["head_dist"],
            params["block1"]["attn"]["qkv"], params["block2"]["mlp"]["fc2"]):
    np.testing.assert_allclose(p["kernel"].std(), 0.02, rtol=0.1)
    assert not np.any(p["bias"])
  bound = (3 * 8 * 8) ** -0.5
  for v in params["patch_embed"].values():
    assert 0.95 * bound < np.abs(v).max() <= bound


def cubic_matrix(n_in, n_out):
  """Antialiased bicubic interpolation along one axis, [n_out, n_in].

  Keys' kernel with a = -0.5, as wide as an output pixel where that is wider;
  weights beyond the border are dropped and the rest normalised.
  """
  scale = n_in / n_out
  matrix = np.zeros((n_out, n_in))
  for i in range(n_out):
    for j in range(n_in):
      d = abs((i + 0.5) * scale - (j + 0.5)) / max(scale, 1)
      if d < 1:
        matrix[i, j] = 1.5 * d**3 - 2.5 * d**2 + 1
      elif d < 2:
        matrix[i, j] = -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
  return matrix / matrix.sum(1, keepdims=True)


@pytest.mark.parametrize("height,width", [(40, 64), (24, 16), (16, 72)])
def test_positions_are_resized_by_antialiased_bicubic(height, width):
  model = make(depth=0, distilled=True)
  variables = plain.drawn(model, images(1, 40, 40))
  p = numpy_params(variables)
  x = images(1, height, width)
  h, w = height // 8, width // 8
  resized = np.einsum("ia,jb,abc->ijc", cubic_matrix(5, h), cubic_matrix(5, w),
                      p["pos_embed"][0, 2:].reshape(5, 5, 16))
  want = plain.patches(p["patch_embed"], x[0], 8).reshape(h, w, 16) + resized
  _, got = plain.run(model, variables, x)
  np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_positions_of_the_own_size_are_taken_as_they_are():
  grid = vit.position_grid(jnp.arange(32.0).reshape(16, 2), 4, 4)
  assert grid[1, 2, 0] == 2 * (1 * 4 + 2)
  np.testing.assert_array_equal(positions.resize(grid, 4, 4), grid)
  whole = jnp.ones((1, 4, 4), bool)
  np.testing.assert_allclose(
      jax.jit(positions.resize_to_mask)(grid, whole)[0], grid, atol=1e-5)


def test_positions_of_as_many_patches_on_another_grid_are_resized():
  """4 x 4 and 2 x 8 patches are as many, and not alike."""
  assert vit.position_grid(jnp.zeros((16, 2)), 2, 8).shape == (4, 4, 2)


def test_positions_that_are_no_square_serve_their_own_size_only():
  model = make()
  x = images(1, 32, 24)
  variables = plain.drawn(model, x)
  assert plain.run(model, variables, x)[1].shape == (1, 4, 3, 16)
  with pytest.raises(ValueError, match="12 patches, not a square number"):
    plain.run(model, variables, images(1, 32, 32))


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
  model = make()
  x = images(2, 39, 47)
  variables = plain.drawn(model, images(1, 32, 32))
  for got, want in zip(plain.run(model, variables, x),
                       plain.run(model, variables, x[:, :32, :40])):
    np.testing.assert_allclose(got, want, atol=1e-6)


# In the corner, and at a multiple of the patch; some sides have a remainder.
@pytest.mark.parametrize("height,width,top,left", [
    (32, 32, 0, 0), (61, 50, 0, 0), (24, 64, 0, 0), (40, 33, 16, 24)])
def test_padding_changes_no_valid_output(height, width, top, left):
  model = make(distilled=True)
  x = images(2, height, width)
  variables = plain.drawn(model, images(1, 32, 32))
  canvas = np.zeros((2, 64, 80, 3), np.float32)
  mask = np.zeros((2, 64, 80), bool)
  canvas[:, top:top + height, left:left + width] = x
  mask[:, top:top + height, left:left + width] = True
  logits, want = plain.run(model, variables, x)
  for padding in (np.nan, 5.0):
    canvas[~mask] = padding
    padded, got = plain.run(model, variables, canvas, mask=mask)
    np.testing.assert_allclose(padded, logits, atol=1e-5)
  h, w, i, j = height // 8, width // 8, top // 8, left // 8
  np.testing.assert_allclose(got[:, i:i + h, j:j + w], want, atol=1e-5)
  rest = np.array(got)
  rest[:, i:i + h, j:j + w] = 0
  assert not np.any(rest)
  # Otherwise the lines above would prove nothing.
  unmasked, _ = plain.run(model, variables, canvas)
  assert np.abs(unmasked - logits).max() > 1e-2


def test_images_of_a_batch_have_masks_of_their_own():
  model = make()
  variables = plain.drawn(model, images(1, 32, 32))
  canvas, mask = np.zeros((2, 48, 48, 3), np.float32), np.zeros((2, 48, 48))
  sizes = ((48, 24), (16, 40))
  for i, (h, w) in enumerate(sizes):
    canvas[i, :h, :w], mask[i, :h, :w] = images(1, h, w)[0], 1
  got, _ = plain.run(model, variables, canvas, mask=mask)
  for i, (h, w) in enumerate(sizes):
    want, _ = plain.run(model, variables, images(1, h, w))
    np.testing.assert_allclose(got[i], want[0], atol=1e-5)


def test_drop_path_grows_from_nothing_to_its_rate():
  model = make(depth=4, drop_path_rate=0.3)
  rates = []

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.append(context.module.rate)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), images(1, 32, 32))
  np.testing.assert_allclose(rates, np.repeat([0, 0.1, 0.2, 0.3], 2))


@pytest.mark.parametrize("rates,collection", [
    ({"drop_path_rate": 0.9}, "drop_path"), ({"drop_rate": 0.5}, "dropout")])
def test_training_draws_differently_for_every_key(rates, collection):
  model = make(**rates)
  x = images(2, 32, 32)
  train = plain.training(model, plain.drawn(model, x), x, collection)
  assert np.array_equal(train(0), train(0))
  assert any(not np.allclose(train(0), train(seed)) for seed in (1, 2, 3))


def test_heads_must_divide_the_channels():
  with pytest.raises(ValueError, match="16 channels are not divisible by 3"):
    plain.initial(make(n_heads=3), images(1, 32, 32))


@pytest.mark.slow
def test_bfloat16_computes_near_float32_with_float32_parameters():
  make_one = functools.partial(make, distilled=True)
  half = make_one(dtype=jnp.bfloat16)
  x = images(2, 40, 40)
  variables = plain.drawn(half, images(1, 32, 32), scale=0.05)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(
      jax.eval_shape(half.init, jax.random.key(0), x)))
  want, _ = plain.run(make_one(), variables, x)
  for kwargs in ({}, {"mask": np.ones((2, 40, 40), bool)}):
    got, features = plain.run(half, variables, x, **kwargs)
    assert got.dtype == features.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)
    assert not np.array_equal(got.astype(jnp.float32), want)
