"""The MetaFormer as a whole: head, features, drop path, precision.

See test_blocks.py for the equations, test_masks.py for masks.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import metaformer_jax
from metaformer_jax.models import layers, norms

# A PoolFormer small enough to run at many sizes.
SMALL = {"depths": (1, 2, 1, 1), "dims": (32, 64, 96, 128)}


def perturbed(model, image, seed=0, scale=0.2):
  """Variables with every value moved away from its initial 0, 1 or 1e-5."""
  variables = model.init(jax.random.key(seed), image)
  leaves, tree = jax.tree.flatten(variables)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(tree, [
      leaf + scale * jax.random.normal(key, leaf.shape)
      for leaf, key in zip(leaves, keys)])


def images(n=2, height=64, width=64, seed=0):
  return np.random.default_rng(seed).normal(
      size=(n, height, width, 3)).astype(np.float32)


def test_head_is_norm_then_mean_then_linear():
  model = metaformer_jax.create_model("poolformer_s12", num_classes=7, **SMALL)
  x = images()
  variables = perturbed(model, x)
  p = variables["params"]
  last = model.apply(variables, x, method="features")["stage4"]
  pooled = norms.GroupNorm().apply({"params": p["norm"]}, last).mean((1, 2))
  want = pooled @ p["head"]["kernel"] + p["head"]["bias"].reshape(1, -1)
  np.testing.assert_allclose(model.apply(variables, x), want, atol=1e-5)
  bare = metaformer_jax.create_model("poolformer_s12", num_classes=0, **SMALL)
  np.testing.assert_allclose(bare.apply(variables, x), pooled, atol=1e-6)


def test_features_have_the_strides_and_channels_of_the_stages():
  model = metaformer_jax.create_model("poolformer_s12", **SMALL)
  x = images(1, 96, 64)
  features = model.apply(perturbed(model, x), x, method="features")
  assert {k: v.shape for k, v in features.items()} == {
      "stage1": (1, 24, 16, 32), "stage2": (1, 12, 8, 64),
      "stage3": (1, 6, 4, 96), "stage4": (1, 3, 2, 128)}


def test_drop_path_grows_from_nothing_to_its_rate():
  model = metaformer_jax.create_model(
      "poolformer_s12", drop_path_rate=0.4, **SMALL)
  rates = []

  def note(next_fn, args, kwargs, context):
    if isinstance(context.module, layers.DropPath):
      rates.append(context.module.rate)
    return next_fn(*args, **kwargs)

  with nn.intercept_methods(note):
    model.init(jax.random.key(0), images())
  np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.4, 5), 2))


def test_training_draws_other_paths_for_every_key():
  model = metaformer_jax.create_model(
      "poolformer_s12", drop_path_rate=0.9, **SMALL)
  x = images()
  variables = perturbed(model, x)

  def run(seed):
    return model.apply(variables, x, train=True,
                       rngs={"drop_path": jax.random.key(seed)})

  assert np.array_equal(run(0), run(0))
  assert not np.allclose(run(0), run(1))


def test_bfloat16_computes_near_float32_with_float32_parameters():
  make = functools.partial(
      metaformer_jax.create_model, "poolformer_s12", num_classes=5, **SMALL)
  x = images()
  half = make(dtype=jnp.bfloat16)
  variables = perturbed(half, x, scale=0.05)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(variables))
  got = half.apply(variables, x)
  assert got.dtype == jnp.bfloat16
  want = make().apply(variables, x)
  np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.05,
                             rtol=0.05)
  assert not np.array_equal(got.astype(jnp.float32), want)


def test_import_and_creation_load_neither_tensorflow_nor_torch():
  code = (
      "import sys, metaformer_jax\n"
      "assert 'jax' not in sys.modules\n"
      "metaformer_jax.list_models()\n"
      "assert 'jax' not in sys.modules\n"
      "metaformer_jax.create_model('poolformer_s12')\n"
      "assert 'jax' in sys.modules\n"
      "print({'tensorflow', 'torch', 'tensorboard'} & set(sys.modules))")
  done = subprocess.run([sys.executable, "-c", code], capture_output=True,
                        text=True, check=True)
  assert done.stdout.strip() == "set()"
