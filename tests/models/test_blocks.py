"""Blocks, with every setting, against the equations in plain numpy."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import metaformer_jax
from metaformer_jax.models import positions

# Multiples of a head's channels, and different in each stage.
SMALL = {"depths": (1, 1), "dims": (32, 64), "num_classes": 5,
         "token_mixers": ("pooling", "pooling")}


def small(**overrides):
  return metaformer_jax.create_model(
      "poolformer_s12", **{**SMALL, **overrides})


def images(n=2, height=24, width=20, seed=0):
  return np.random.default_rng(seed).normal(
      size=(n, height, width, 3)).astype(np.float32)


def perturbed(model, x, seed=0):
  """Variables away from 0 and 1; variances stay positive, matrices frozen."""
  rng = np.random.default_rng(seed)

  def change(path, leaf):
    if leaf.dtype == jnp.int32 or path[0].key == "frozen":
      return leaf
    if path[-1].key == "var":
      return rng.uniform(0.5, 2, leaf.shape).astype(np.float32)
    return leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(
      change, model.init(jax.random.key(seed), x))


def trace(model, variables, x):
  """Inputs and outputs of modules, {path: (x, y)}, and the logits."""
  calls = {}

  def note(next_fn, args, kwargs, context):
    y = next_fn(*args, **kwargs)
    if context.method_name == "__call__" and args:
      calls["/".join(context.module.path)] = args[0], y
    return y

  with nn.intercept_methods(note):
    logits = model.apply(variables, x)
  return calls, logits


def windows(x, size, reduce):
  """reduce([B, h, w, C] of the window around a pixel, its kernel's part)."""
  _, height, width, _ = x.shape
  r, y = size // 2, np.zeros_like(x)
  for i, j in itertools.product(range(height), range(width)):
    rows = slice(max(i - r, 0), min(i + r + 1, height))
    columns = slice(max(j - r, 0), min(j + r + 1, width))
    y[:, i, j] = reduce(x[:, rows, columns], (
        slice(rows.start - i + r, rows.stop - i + r),
        slice(columns.start - j + r, columns.stop - j + r)))
  return y


def pooling(x, p, size=3, subtract=True):
  y = windows(x, size, lambda window, _: window.mean((1, 2)))
  return y - x if subtract else y


def convolution(x, conv):
  kernel = conv["kernel"][:, :, 0]
  return windows(x, len(kernel), lambda window, part: np.einsum(
      "bhwc,hwc->bc", window, kernel[part])) + conv.get("bias", 0)


def mix(matrix, x):
  """y[m] = sum over n of matrix[m, n] x[n]."""
  b, h, w, c = x.shape
  y = np.zeros((b, h * w, c))
  for m, n in itertools.product(range(h * w), repeat=2):
    y[:, m] += matrix[m, n] * x[:, n // w, n % w]
  return y.reshape(x.shape)


def star(x, p):
  return p["scale"] * np.maximum(x, 0)**2 + p["bias"]


def sepconv(x, p, act=star):
  hidden = act(x @ p["pwconv1"]["kernel"], p.get("act1"))
  return convolution(hidden, p["dwconv"]) @ p["pwconv2"]["kernel"]


def gelu(x, p):
  return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(x, v, *, mixer=pooling, norm="group_norm", act=gelu, residual=True,
          eps=1e-5):
  """Y = r X + s TokenMixer(Norm(X)); Z = r Y + s MLP(Norm(Y))."""
  p = v["params"]

  def normed(name, x):
    if norm == "none":
      return x
    if norm == "batch_norm":
      stats = v["batch_stats"][name]
      x = (x - stats["mean"]) / np.sqrt(stats["var"] + eps)
    else:
      axes = -1 if norm == "layer_norm" else (1, 2, 3)
      x = (x - x.mean(axes, keepdims=True)) / np.sqrt(
          x.var(axes, keepdims=True) + eps)
    return x * p[name]["scale"] + p[name].get("bias", 0)

  def add(i, x, y):
    y = p.get(f"layer_scale{i}", {}).get("scale", 1) * y
    return y + residual * p.get(f"res_scale{i}", {}).get("scale", 1) * x

  x = add(1, x, mixer(normed("norm1", x), p.get("token_mixer")
                      or v.get("frozen", {}).get("token_mixer")))
  if "mlp" not in p:
    return x
  fc1, fc2 = p["mlp"]["fc1"], p["mlp"]["fc2"]
  hidden = act(normed("norm2", x) @ fc1["kernel"] + fc1.get("bias", 0),
               p["mlp"].get("act"))
  return add(2, x, hidden @ fc2["kernel"] + fc2.get("bias", 0))


def two(name, **settings):
  return {"token_mixers": (name,) * 2, **settings}


def squared(x, p):
  return np.maximum(x, 0)**2


EQUATIONS = {
    "baseline": ({}, {}),
    "identity": (two("identity"), {"mixer": lambda x, p: x}),
    "pool 1": ({"pool_size": 1},
               {"mixer": functools.partial(pooling, size=1)}),
    "pool 5": ({"pool_size": 5},
               {"mixer": functools.partial(pooling, size=5)}),
    "pool 9": ({"pool_size": 9},
               {"mixer": functools.partial(pooling, size=9)}),
    "no subtraction": ({"pool_subtract": False},
                       {"mixer": functools.partial(pooling, subtract=False)}),
    "depthwise conv": (
        two("depthwise_conv"),
        {"mixer": lambda x, p: convolution(x, p["conv"])}),
    "depthwise conv 5": (
        two("depthwise_conv", conv_kernel_size=5),
        {"mixer": lambda x, p: convolution(x, p["conv"])}),
    "random": (two("random"),
               {"mixer": lambda x, p: mix(p["random_matrix"], x)}),
    "spatial fc": (two("spatial_fc"),
                   {"mixer": lambda x, p: mix(p["kernel"].T, x)}),
    "sepconv": (two("sepconv", conv_kernel_size=7, activation="star_relu"),
                {"mixer": sepconv, "act": star}),
    "sepconv of gelu": (two("sepconv", conv_kernel_size=3),
                        {"mixer": functools.partial(sepconv, act=gelu)}),
    "layer norm": ({"norm": "layer_norm"}, {"norm": "layer_norm"}),
    "batch norm": ({"norm": "batch_norm"}, {"norm": "batch_norm"}),
    "no norm": ({"norm": "none"}, {"norm": "none"}),
    "epsilon": ({"norm_eps": 0.1}, {"eps": 0.1}),
    "no norm bias": ({"norm_bias": False}, {}),
    "relu": ({"activation": "relu"},
             {"act": lambda x, p: np.maximum(x, 0)}),
    "silu": ({"activation": "silu"},
             {"act": lambda x, p: x / (1 + np.exp(-x))}),
    "squared relu": ({"activation": "squared_relu"}, {"act": squared}),
    "star relu": ({"activation": "star_relu"}, {"act": star}),
    "no residual": ({"residual": False}, {"residual": False}),
    "no mlp": ({"mlp_ratio": 0.0}, {}),
    "narrow mlp": ({"mlp_ratio": 0.5, "mlp_bias": False}, {}),
    "no layer scale": ({"layer_scale_init": 0.0}, {}),
    "no layer scale, as None": ({"layer_scale_init": None}, {}),
    "res scale": ({"res_scale_init": (0.0, 1.0)}, {}),
}


@pytest.mark.parametrize("row", EQUATIONS)
def test_blocks_are_the_equations(row):
  overrides, equations = EQUATIONS[row]
  model = small(**overrides)
  x = images()
  variables = perturbed(model, x)
  calls, logits = trace(model, variables, x)
  assert logits.shape == (2, 5)
  for i in (1, 2):
    path = f"stage{i}/block1"
    x, y = calls[path]
    v = {name: tree[f"stage{i}"].get("block1", {})
         for name, tree in variables.items() if f"stage{i}" in tree}
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), v)
    want = block(np.asarray(x, np.float64), v, **equations)
    np.testing.assert_allclose(y, want, rtol=1e-5,
                               atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("overrides,present,absent", [
    ({}, ["norm1", "norm2", "layer_scale1", "layer_scale2", "mlp"],
     ["res_scale1", "res_scale2", "token_mixer"]),
    ({"mlp_ratio": 0.0}, ["norm1", "layer_scale1"],
     ["norm2", "layer_scale2", "mlp"]),
    ({"norm": "none", "layer_scale_init": 0.0}, ["mlp"],
     ["norm1", "norm2", "layer_scale1", "layer_scale2"]),
    ({"res_scale_init": (0.0, 2.0)}, ["res_scale1", "res_scale2"], []),
    ({"res_scale_init": (0.0, 2.0), "residual": False}, [],
     ["res_scale1", "res_scale2"]),
])
def test_settings_make_no_parameters_that_do_nothing(
    overrides, present, absent):
  params = jax.eval_shape(small(**overrides).init, jax.random.key(0),
                          images())["params"]
  names = params["stage2"]["block1"].keys()
  assert names >= set(present) and not names & set(absent)
  assert "res_scale1" not in params["stage1"]["block1"]


def test_stem_is_as_wide_and_fast_as_set():
  model = small(in_patch_size=4, in_stride=2, in_pad=0)
  variables = jax.eval_shape(model.init, jax.random.key(0), images())
  features = jax.eval_shape(
      functools.partial(model.apply, method="features"), variables, images())
  stem = variables["params"]["stage1"]["downsample"]["conv"]["kernel"]
  assert stem.shape == (4, 4, 3, 32)
  assert features["stage1"].shape == (2, 11, 9, 32)


def test_position_embeddings_are_added_before_the_first_block():
  model = small(position_embeddings=(2,))
  x = images()
  variables = perturbed(model, x)
  assert "pos_embed" not in variables["params"]["stage1"]
  grid = variables["params"]["stage2"]["pos_embed"]["embedding"]
  assert grid.shape == (3, 3, 64)
  for other in (x, images(1, 48, 32)):
    calls, _ = trace(model, variables, other)
    before, after = calls["stage2/downsample"][1][0], calls["stage2/block1"][0]
    added = positions.resize(jnp.asarray(grid), *before.shape[1:3])
    np.testing.assert_allclose(after, before + added[None], atol=1e-6)


class Gate(nn.Module):
  """A user's mixer: the mean over the pixels times a learned gate."""

  dim: int
  first: float = 1.0
  dtype: object = None

  @nn.compact
  def __call__(self, x, *, mask=None, train=False):
    gate = self.param("gate", nn.initializers.constant(self.first),
                      (1, 1, 1, self.dim))
    return gate * x.mean((1, 2), keepdims=True)


def test_a_mixer_of_ones_own_is_a_factory():
  model = small(token_mixers=("pooling", functools.partial(Gate, first=0.5)))
  x = images()
  variables = perturbed(model, x)
  assert variables["params"]["stage2"]["block1"]["token_mixer"][
      "gate"].shape == (1, 1, 1, 64)
  calls, _ = trace(model, variables, x)
  x, y = calls["stage2/block1"]
  v = jax.tree.map(np.asarray, variables["params"]["stage2"]["block1"])
  np.testing.assert_allclose(y, block(
      np.asarray(x, np.float64), {"params": v}, mixer=lambda x, p: (
          p["gate"] * x.mean((1, 2), keepdims=True))), rtol=1e-5, atol=1e-4)
  gradient = jax.grad(lambda params: model.apply(
      {"params": params}, images()).sum())(variables["params"])
  assert np.abs(gradient["stage2"]["block1"]["token_mixer"]["gate"]).min() > 0


def test_random_matrices_are_frozen_rows_of_a_softmax():
  model = small(**two("random"))
  first, second = (jax.tree.leaves(model.init(jax.random.key(seed), images())[
      "frozen"]) for seed in (0, 1))
  assert [m.shape for m in first] == [(30, 30), (9, 9)]
  for a, b in zip(first, second):
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-5)
    # Of uniform [0, 1) values: the largest is less than e times the least.
    assert np.all(a.max(-1) < math.e * a.min(-1)) and not np.array_equal(a, b)
  params = model.init(jax.random.key(0), images())["params"]
  assert "token_mixer" not in params["stage1"]["block1"]
