"""PVT: attention, blocks, positions against plain numpy; masks, the table."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from metaformer_jax.models import layers, norms, pvt, pyramids

NAMES = [name for name in pyramids.MODELS if name.startswith("pvt")]
# Small enough to run at many sizes.
SMALL = {"depths": (1, 2, 1, 1), "dims": (8, 12, 16, 24),
         "n_heads": (1, 2, 2, 3), "mlp_ratios": (2, 2, 3, 3),
         "sr_ratios": (8, 4, 2, 1), "num_classes": 5}


@functools.partial(jax.jit, static_argnums=0,
                   static_argnames=("method", "train"))
def apply(model, variables, x, mask=None, **kwargs):
  return model.apply(variables, x, mask=mask, **kwargs)


def perturbed(model, x, *args, seed=0, scale=0.2):
  """Variables other than 0 and 1; drawn by numpy, to compile nothing."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = path[-1].key
    std = np.prod(leaf.shape[:-1])**-0.5 if name == "kernel" else scale
    return rng.normal(name == "scale", std, leaf.shape).astype(leaf.dtype)

  shapes = jax.eval_shape(
      lambda x: model.init(jax.random.key(0), x, *args), x)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def images(n=2, height=64, width=64, seed=0):
  return np.random.default_rng(seed).normal(
      size=(n, height, width, 3)).astype(np.float32)


def tokens(n, dim, seed=1):
  return np.random.default_rng(seed).normal(size=(2, n, dim)).astype(np.float32)


def on_canvas(x, height=96, width=128, fill=5.0):
  """The images at the top left of a canvas, and their mask."""
  n, h, w, dim = x.shape
  canvas = np.full((n, height, width, dim), fill, np.float32)
  canvas[:, :h, :w] = x
  mask = np.zeros((n, height, width), bool)
  mask[:, :h, :w] = True
  return canvas, mask


def dense(x, p):
  return x @ p["kernel"] + p["bias"]


def layer_norm(x, p, eps):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)
  return x * p["scale"] + p["bias"]


def patches(x, p, size):
  """A convolution with kernel and stride `size`; the rest is ignored."""
  n, h, w, dim = x.shape
  h, w = h // size, w // size
  x = x[:, :h * size, :w * size].reshape(n, h, size, w, size, dim)
  return np.einsum("bhiwjc,ijcd->bhwd", x, p["kernel"]) + p["bias"]


def attention(x, grid, p, n_heads, sr_ratio):
  """Equations 1 to 3 of arXiv 2102.12122, head by head."""
  reduced, dim = x, x.shape[-1]
  if sr_ratio > 1:
    reduced = patches(x.reshape(2, *grid, dim), p["sr"], sr_ratio)
    reduced = layer_norm(reduced.reshape(2, -1, dim), p["norm"], 1e-5)
  qkv = dense(x, p["q"]), *np.split(dense(reduced, p["kv"]), 2, axis=-1)
  heads = []
  for q, k, v in zip(*(np.split(y, n_heads, axis=-1) for y in qkv)):
    weights = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(dim / n_heads))
    heads.append(weights / weights.sum(-1, keepdims=True) @ v)
  return dense(np.concatenate(heads, -1), p["proj"])


def gelu(x):
  return np.asarray(jax.nn.gelu(x, approximate=False))


def bilinear(grid, height, width):
  """Bilinear as F.interpolate: pixel centres at halves, borders repeated."""

  def line(n_old, n_new):
    at = (np.arange(n_new) + 0.5) * n_old / n_new - 0.5
    at = np.clip(at, 0, n_old - 1)
    low = np.floor(at).astype(int)
    return low, np.minimum(low + 1, n_old - 1), at - low

  i, i1, s = line(grid.shape[0], height)
  j, j1, t = line(grid.shape[1], width)
  s, t = s.reshape(-1, 1, 1), t.reshape(1, -1, 1)
  return ((grid[i][:, j] * (1 - t) + grid[i][:, j1] * t) * (1 - s)
          + (grid[i1][:, j] * (1 - t) + grid[i1][:, j1] * t) * s)


@pytest.mark.parametrize("sr_ratio", [1, 2, 3])
def test_attention_is_softmax_over_the_reduced_image(sr_ratio):
  x, grid = tokens(35, 12), (5, 7)
  module = pvt.Attention(3, sr_ratio)
  variables = perturbed(module, x, grid)
  assert ("sr" in variables["params"]) == (sr_ratio > 1)
  np.testing.assert_allclose(
      module.apply(variables, x, grid),
      attention(x, grid, variables["params"], 3, sr_ratio), atol=2e-5)


def test_attention_without_bias_has_none():
  p = perturbed(pvt.Attention(3, 2, qkv_bias=False), tokens(35, 12),
                (5, 7))["params"]
  assert {name for name in p if "bias" not in p[name]} == {"q", "kv"}


def test_block_is_its_equations():
  x, grid = tokens(35, 12), (5, 7)
  block = pvt.Block(functools.partial(pvt.Attention, 3, 2), mlp_ratio=2,
                    norm_eps=1e-2)
  variables = perturbed(block, x, grid)
  p = variables["params"]
  y = x + attention(layer_norm(x, p["norm1"], 1e-2), grid, p["attn"], 3, 2)
  hidden = gelu(dense(layer_norm(y, p["norm2"], 1e-2), p["mlp"]["fc1"]))
  z = y + dense(hidden, p["mlp"]["fc2"])
  assert p["mlp"]["fc1"]["kernel"].shape == (12, 24)
  np.testing.assert_allclose(block.apply(variables, x, grid), z, atol=3e-5)


@pytest.mark.parametrize("height,width", [(4, 4), (6, 3), (9, 13), (2, 8)])
def test_positions_are_resized_bilinearly(height, width):
  embedding = tokens(16, 6)[0]
  want = bilinear(embedding.reshape(4, 4, 6), height, width)
  got = pvt.on_grid(embedding, height, width)
  np.testing.assert_allclose(got, want[None], atol=1e-6)
  if (height, width) == (4, 4):
    np.testing.assert_array_equal(got, want[None])
  _, mask = on_canvas(np.zeros((2, height, width, 1)), 10, 14)
  want, _ = on_canvas(np.stack([want] * 2), 10, 14, fill=0)
  np.testing.assert_allclose(pvt.on_grid(embedding, 10, 14, mask), want,
                             atol=1e-6)


def test_positions_of_no_square_stay_at_their_size():
  embedding = tokens(12, 6)[0]
  np.testing.assert_array_equal(pvt.on_grid(embedding, 3, 4)[0],
                                embedding.reshape(3, 4, 6))
  message = ("12 patches, not a square number, cannot be resized to 3 x 5: "
             "initialise with square images")
  with pytest.raises(ValueError, match=message):
    pvt.on_grid(embedding, 3, 5)


@pytest.mark.parametrize("height,width", [(8, 8), (15, 12)])
@pytest.mark.parametrize("class_token", [False, True])
def test_stage_embeds_patches_and_positions(class_token, height, width):
  stage = pvt.Stage(6, 2, [], class_token)
  variables = perturbed(stage, images(2, 8, 8))
  p, x = variables["params"], images(2, height, width)
  assert p["pos_embed"].shape == (1, 16 + class_token, 6)
  embed = p["patch_embed"]
  want = layer_norm(patches(x, embed["conv"], 2), embed["norm"], 1e-5)
  h, w = want.shape[1:3]
  positions = p["pos_embed"][0, int(class_token):]
  want = want + bilinear(positions.reshape(4, 4, 6), h, w)
  got, mask, token = stage.apply(variables, x)
  assert mask is None and token.shape == (2, int(class_token), 6)
  np.testing.assert_allclose(got, want, atol=1e-5)
  if class_token:
    want = p["cls_token"] + p["pos_embed"][:, :1]
    np.testing.assert_allclose(token, np.concatenate([want] * 2), atol=1e-6)


def test_class_token_attends_and_is_attended_to():
  stage = pvt.Stage(6, 2, [functools.partial(
      pvt.Block, functools.partial(pvt.Attention, 3), mlp_ratio=4.0)], True)
  x = images(2, 8, 8)
  variables = perturbed(stage, x)
  p = variables["params"]
  bare = pvt.Stage(6, 2, [], True)
  grid, _, token = bare.apply(variables, x)
  both = jnp.concatenate([token, grid.reshape(2, 16, 6)], 1)
  want = stage.blocks[0]().apply({"params": p["block1"]}, both, (4, 4))
  got, _, token = stage.apply(variables, x)
  np.testing.assert_allclose(token, want[:, :1], atol=1e-5)
  np.testing.assert_allclose(got.reshape(2, 16, 6), want[:, 1:], atol=1e-5)


def test_head_is_the_normed_class_token():
  model = pvt.PyramidVisionTransformer(**SMALL)
  x = images()
  variables = perturbed(model, x)
  p = variables["params"]
  *_, (_, _, token) = apply(
      model, variables, x, method=lambda m, x, mask: list(
          m._stages(x, mask, train=False)))
  want = layer_norm(np.asarray(token)[:, 0], p["norm"], 1e-6)
  bare = pvt.PyramidVisionTransformer(**{**SMALL, "num_classes": 0})
  np.testing.assert_allclose(apply(bare, variables, x), want, atol=1e-5)
  np.testing.assert_allclose(apply(model, variables, x),
                             dense(want, p["head"]), atol=1e-5)


@pytest.mark.slow
def test_without_a_class_token_the_head_sees_the_mean():
  """The token's position is there, and nothing uses it."""
  model = pvt.PyramidVisionTransformer(**SMALL, class_token=False)
  x = images()
  variables = perturbed(model, x)
  p = variables["params"]
  whole = pvt.PyramidVisionTransformer(**SMALL)
  shapes = jax.tree.map(jnp.shape, perturbed(whole, x)["params"])
  assert shapes["stage4"].pop("cls_token") == (1, 1, 24)
  assert jax.tree.map(jnp.shape, p) == shapes
  features = apply(model, variables, x, method="features")["stage4"]
  want = layer_norm(np.asarray(features), p["norm"], 1e-6).mean((1, 2))
  logits = apply(model, variables, x)
  np.testing.assert_allclose(logits, dense(want, p["head"]), atol=1e-5)
  p["stage4"]["pos_embed"][:, 0] += 1
  np.testing.assert_array_equal(apply(model, variables, x), logits)
  p["stage4"]["pos_embed"][:, 1] += 1
  assert not np.array_equal(apply(model, variables, x), logits)


def test_features_have_the_strides_and_channels_of_the_stages():
  model = pvt.PyramidVisionTransformer(**SMALL)
  x = images(1, 110, 64)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  features = jax.eval_shape(functools.partial(model.apply, method="features"),
                            variables, x)
  assert {k: v.shape for k, v in features.items()} == {
      "stage1": (1, 27, 16, 8), "stage2": (1, 13, 8, 12),
      "stage3": (1, 6, 4, 16), "stage4": (1, 3, 2, 24)}


@pytest.mark.slow
@pytest.mark.parametrize("height,width", [(61, 50), (64, 96), (33, 75)])
def test_padding_changes_no_valid_output(height, width):
  model = pvt.PyramidVisionTransformer(**SMALL)
  variables = perturbed(model, images())
  x = images(2, height, width)
  canvas, mask = on_canvas(x)
  alone = apply(model, variables, x, method="features")
  padded = apply(model, variables, canvas, mask=mask, method="features")
  for name, want in alone.items():
    h, w = want.shape[1:3]
    got = padded[name]
    np.testing.assert_allclose(got[:, :h, :w], want, atol=1e-5)
    assert not np.any(got[:, h:]) and not np.any(got[:, :, w:])
  logits = apply(model, variables, x)
  np.testing.assert_allclose(apply(model, variables, canvas, mask=mask), logits,
                             atol=1e-5)
  # Otherwise the lines above would prove nothing.
  assert np.abs(apply(model, variables, canvas) - logits).max() > 1e-2


@pytest.mark.slow
def test_an_image_too_small_for_a_key_is_refused_or_gets_nothing():
  """Below 32 pixels: an error if alone; on a canvas, padding is ignored."""
  model = pvt.PyramidVisionTransformer(**SMALL)
  variables = perturbed(model, images())
  x = images(2, 20, 40)
  with pytest.raises(ValueError, match="5 x 10 tokens are too few to reduce by "
                     "8: the images are too small"):
    apply(model, variables, x)
  one, other = (
      apply(model, variables, *on_canvas(x, *size, fill), method="features")
      for *size, fill in ((64, 96, 5.0), (96, 64, -1.0)))
  for stage, got in one.items():
    assert np.all(np.isfinite(got))
    h, w = np.minimum(got.shape[1:3], other[stage].shape[1:3])
    np.testing.assert_allclose(got[:, :h, :w], other[stage][:, :h, :w],
                               atol=1e-5)


def noted(model, kind, key):
  """Returns key(module) of each module of a kind, by its path, in order."""
  found = {}

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, kind):
      found["/".join(context.module.path)] = key(context.module)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(model.init, jax.random.key(0), images())
  return found


def test_drop_path_grows_from_nothing_to_its_rate():
  model = pvt.PyramidVisionTransformer(**SMALL, drop_path_rate=0.4)
  rates = noted(model, layers.DropPath, lambda m: m.rate)
  np.testing.assert_allclose(list(rates.values()),
                             np.repeat(np.linspace(0, 0.4, 5), 2), rtol=1e-6)


def test_epsilons_are_those_of_the_official_code():
  model = pvt.PyramidVisionTransformer(**SMALL)
  for path, eps in noted(model, norms.LayerNorm, lambda m: m.eps).items():
    outer = path.endswith(("patch_embed/norm", "attn/norm"))
    assert eps == (1e-5 if outer else 1e-6), path


@pytest.mark.parametrize("setting,key", [
    pytest.param({"drop_path_rate": 0.5}, "drop_path", marks=pytest.mark.slow),
    ({"drop_rate": 0.5}, "dropout")])
def test_training_draws_differently_for_every_key(setting, key):
  model = pvt.PyramidVisionTransformer(**SMALL, **setting)
  x = images(8)
  variables = perturbed(model, x)

  def run(seed):
    return apply(model, variables, x, train=True,
                 rngs={key: jax.random.key(seed)})

  assert np.array_equal(run(0), run(0))
  assert not np.allclose(run(0), run(1))


@pytest.mark.slow
def test_bfloat16_computes_near_float32_with_float32_parameters():
  x = images()
  half = pvt.PyramidVisionTransformer(**SMALL, dtype=jnp.bfloat16)
  variables = perturbed(half, x)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  got = apply(half, variables, x)
  assert got.dtype == jnp.bfloat16
  want = apply(pvt.PyramidVisionTransformer(**SMALL), variables, x)
  got = got.astype(jnp.float32)
  np.testing.assert_allclose(got, want, atol=0.05, rtol=0.05)
  assert not np.array_equal(got, want)


@pytest.mark.parametrize("setting,message", [
    ({"depths": (1, 1)}, "depths: has 2 stages"),
    ({"sr_ratios": (8, 4, 2, 2)}, "must end with 1")])
def test_wrong_settings_are_named(setting, message):
  model = pvt.PyramidVisionTransformer(**{**SMALL, **setting})
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(model.init, jax.random.key(0), images())


@pytest.mark.parametrize("name", NAMES)
def test_table_holds_the_built_model(name):
  spec = pyramids.MODELS[name]
  model = spec.load_class()(**vars(spec.settings))
  params = jax.eval_shape(model.init, jax.random.key(0),
                          images(1, 224, 224))["params"]
  assert sum(x.size for x in jax.tree.leaves(params)) == spec.n_params
