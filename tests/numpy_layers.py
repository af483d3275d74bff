"""Layers in plain numpy, and models with drawn weights to compare with them."""

import functools
import math

import jax
import numpy as np


def initial(model, x):
  """Initial parameters."""
  return jax.jit(model.init)(jax.random.key(0), x)["params"]


def drawn(model, x, scale=0.2):
  """Variables with every value moved away from its initial 0 or 1."""
  rng = np.random.default_rng(0)

  def draw(path, v):
    centre = path[-1].key in ("scale", "alpha")
    return centre + scale * rng.standard_normal(v.shape, np.float32)

  return jax.tree_util.tree_map_with_path(
      draw, jax.eval_shape(model.init, jax.random.key(0), x))


@functools.cache
def _program(model):

  def apply(variables, x, kwargs):
    features = model.apply(variables, x, method="features", **kwargs)
    assert list(features) == ["stage4"]
    return model.apply(variables, x, **kwargs), features["stage4"]

  return jax.jit(apply)


def run(model, variables, x, **kwargs):
  """Logits and features of a model with one stage."""
  return _program(model)(variables, x, kwargs)


def training(model, variables, x, collection):
  """Returns a function of a seed: the logits in training."""

  @jax.jit
  def apply(seed):
    return model.apply(variables, x, train=True,
                       rngs={collection: jax.random.key(seed)})

  return apply


def shapes(params):
  """{"norm/scale": (16,), ...}."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): v.shape
          for path, v in jax.tree_util.tree_leaves_with_path(params)}


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def layer_norm(p, x, eps=1e-6):
  centred = x - x.mean(-1, keepdims=True)
  var = np.square(centred).mean(-1, keepdims=True)
  return centred / np.sqrt(var + eps) * p["scale"] + p["bias"]


def mlp(p, x):
  hidden = dense(p["fc1"], x)
  hidden = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
  return dense(p["fc2"], hidden)


def patches(p, x, size):
  """[H, W, 3] -> [H/size * W/size, C], row by row."""
  h, w = x.shape[0] // size, x.shape[1] // size
  cut = [x[i * size:(i + 1) * size, j * size:(j + 1) * size].ravel()
         for i in range(h) for j in range(w)]
  kernel = p["kernel"].reshape(-1, p["kernel"].shape[-1])
  return np.stack(cut) @ kernel + p["bias"]
