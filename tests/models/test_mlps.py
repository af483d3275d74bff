"""MLP-Mixer and ResMLP against their equations, at one image size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_layers as plain
import parity_cases
import pytest
from flax import linen as nn

from metaformer_jax.models import layers, mlp_mixer, resmlp

images = functools.partial(parity_cases.images, 2)

MODELS = pytest.mark.parametrize("make", [
    functools.partial(cls, **{"patch_size": 8, "dim": 16, "depth": 2,
                              "num_classes": 5, **settings})
    for cls, settings in ((mlp_mixer.MlpMixer, {"mlp_ratio": (0.5, 2.0)}),
                          (resmlp.ResMLP, {"layer_scale_init": 0.1}))],
    ids=["mixer", "resmlp"])


def norm(p, x):
  return p["alpha"] * x + p["beta"] if "alpha" in p else plain.layer_norm(p, x)


def block(p, x):
  """One image, [N, C]."""
  s1, s2 = (p[f"ls{i}"]["scale"] if f"ls{i}" in p else 1 for i in (1, 2))
  across = norm(p["norm1"], x).T
  if "linear_tokens" in p:
    across = plain.dense(p["linear_tokens"], across)
  else:
    across = plain.mlp(p["mlp_tokens"], across)
  y = x + s1 * across.T
  return y + s2 * plain.mlp(p["mlp_channels"], norm(p["norm2"], y))


@MODELS
def test_model_is_the_papers_equations(make):
  """Patches row by row, blocks, norm, mean, head."""
  model = make()
  x = images(32, 24)
  variables = plain.drawn(model, x)
  p = jax.tree.map(lambda v: np.asarray(v, np.float64), variables["params"])
  features, pooled = [], []
  for image in x:
    y = plain.patches(p["patch_embed"], image, 8)
    for i in (1, 2):
      y = block(p[f"block{i}"], y)
    features.append(y.reshape(4, 3, 16))
    pooled.append(norm(p["norm"], y).mean(0))
  logits, got = plain.run(model, variables, x)
  np.testing.assert_allclose(logits, plain.dense(p["head"], np.stack(pooled)),
                             atol=1e-4)
  np.testing.assert_allclose(got, features, atol=1e-4)
  bare, _ = plain.run(make(num_classes=0), variables, x)
  np.testing.assert_allclose(bare, pooled, atol=1e-4)


@MODELS
def test_images_of_another_size_and_masks_are_refused_in_one_line(make):
  model = make()
  x = images(32, 32)
  variables = plain.drawn(model, x)
  for method in ("__call__", "features"):
    apply = functools.partial(jax.eval_shape, functools.partial(
        model.apply, method=method), variables)
    with pytest.raises(ValueError, match="16 patches cannot mix 4 x 5") as e:
      apply(images(32, 40))
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="cannot ignore padding") as e:
      apply(x, mask=np.ones((2, 32, 32), bool))
    assert "\n" not in str(e.value)


def names(model):
  shapes = plain.shapes(plain.drawn(model, images(32, 32))["params"])
  return {k: v for k, v in shapes.items() if not k.startswith("block1")}


def test_names_are_the_checkpoint_format():
  stem = {"patch_embed/kernel": (8, 8, 3, 12), "patch_embed/bias": (12,)}
  head = {"head/kernel": (12, 5), "head/bias": (5,)}
  channels = {"fc1/kernel": (12, 48), "fc1/bias": (48,),
              "fc2/kernel": (48, 12), "fc2/bias": (12,)}
  channels = {f"block2/mlp_channels/{k}": v for k, v in channels.items()}
  settings = {"patch_size": 8, "dim": 12, "depth": 2, "num_classes": 5}
  assert names(mlp_mixer.MlpMixer(**settings)) == stem | head | channels | {
      f"{norm}/{v}": (12,) for norm in ("block2/norm1", "block2/norm2", "norm")
      for v in ("scale", "bias")} | {
          "block2/mlp_tokens/fc1/kernel": (16, 6),
          "block2/mlp_tokens/fc1/bias": (6,),
          "block2/mlp_tokens/fc2/kernel": (6, 16),
          "block2/mlp_tokens/fc2/bias": (16,)}
  assert names(resmlp.ResMLP(**settings)) == stem | head | channels | {
      f"{norm}/{v}": (12,) for norm in ("block2/norm1", "block2/norm2", "norm")
      for v in ("alpha", "beta")} | {
          "block2/linear_tokens/kernel": (16, 16),
          "block2/linear_tokens/bias": (16,),
          "block2/ls1/scale": (12,), "block2/ls2/scale": (12,)}


def test_first_values_of_mixer():
  params = plain.initial(mlp_mixer.MlpMixer(
      patch_size=8, dim=256, depth=1, num_classes=10),
                   images(64, 64))
  assert not any(np.any(v) for v in params["head"].values())
  for module, fan_in in (
      (params["patch_embed"], 3 * 8 * 8),
      (params["block1"]["mlp_tokens"]["fc1"], 64),
      (params["block1"]["mlp_channels"]["fc2"], 1024)):
    np.testing.assert_allclose(module["kernel"].std(), fan_in**-0.5, rtol=0.1)
    assert not np.any(module["bias"])


def test_first_values_of_resmlp():
  params = plain.initial(resmlp.ResMLP(
      patch_size=8, dim=256, depth=1, layer_scale_init=0.1),
                   images(64, 64))
  for module in (params["head"], params["block1"]["linear_tokens"],
                 params["block1"]["mlp_channels"]["fc1"]):
    np.testing.assert_allclose(module["kernel"].std(), 0.02, rtol=0.1)
    assert not np.any(module["bias"])
  assert np.all(params["block1"]["ls1"]["scale"] == np.float32(0.1))
  bound = (3 * 8 * 8) ** -0.5
  for v in params["patch_embed"].values():
    assert 0.95 * bound < np.abs(v).max() <= bound


@pytest.mark.parametrize("cls,want", [
    (mlp_mixer.MlpMixer, [0, 0.1, 0.2, 0.3]), (resmlp.ResMLP, [0.3] * 4)],
    ids=["mixer", "resmlp"])
def test_drop_path_grows_in_mixer_and_is_one_rate_in_resmlp(cls, want):
  rates = []

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.append(context.module.rate)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    model = cls(patch_size=8, dim=16, depth=4, drop_path_rate=0.3)
    jax.eval_shape(model.init, jax.random.key(0), images(32, 32))
  np.testing.assert_allclose(rates, np.repeat(want, 2))


@MODELS
def test_training_draws_other_paths_for_every_key(make):
  x = images(32, 32)
  variables = plain.drawn(make(), x)
  train = plain.training(make(drop_path_rate=0.9), variables, x, "drop_path")
  assert np.array_equal(train(0), train(0))
  assert any(not np.allclose(train(0), train(seed)) for seed in (1, 2, 3))
  np.testing.assert_allclose(
      plain.training(make(), variables, x, "drop_path")(0),
      plain.run(make(), variables, x)[0], atol=1e-5)


@MODELS
def test_bfloat16_computes_near_float32_with_float32_parameters(make):
  x = images(32, 32)
  variables = plain.drawn(make(), x, scale=0.05)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(
      jax.eval_shape(make(dtype=jnp.bfloat16).init, jax.random.key(0), x)))
  got, features = plain.run(make(dtype=jnp.bfloat16), variables, x)
  assert got.dtype == features.dtype == jnp.bfloat16
  want, _ = plain.run(make(), variables, x)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05)
  assert not np.array_equal(got.astype(jnp.float32), want)
