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
SMALL = {"depths": (1, 2), "dims": (16, 32),
         "token_mixers": ("pooling", "pooling")}


def perturbed(model, image, seed=0, scale=0.2):
  """Variables with every value moved away from its initial 0, 1 or 1e-5."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda leaf: leaf + np.float32(scale) * rng.normal(
          size=leaf.shape).astype(np.float32),
      jax.jit(model.init)(jax.random.key(seed), image))


def apply(model, *args, **kwargs):
  return jax.jit(functools.partial(model.apply, **kwargs))(*args)


def images(n=2, height=32, width=32, seed=0):
  return np.random.default_rng(seed).normal(
      size=(n, height, width, 3)).astype(np.float32)


def test_head_is_norm_then_mean_then_linear():
  model = metaformer_jax.create_model("poolformer_s12", num_classes=7, **SMALL)
  x = images()
  variables = perturbed(model, x)
  p = variables["params"]
  last = apply(model, variables, x, method="features")["stage2"]
  pooled = norms.GroupNorm().apply({"params": p["norm"]}, last).mean((1, 2))
  want = pooled @ p["head"]["kernel"] + p["head"]["bias"].reshape(1, -1)
  np.testing.assert_allclose(apply(model, variables, x), want, atol=1e-5)
  bare = metaformer_jax.create_model("poolformer_s12", num_classes=0, **SMALL)
  np.testing.assert_allclose(apply(bare, variables, x), pooled, atol=1e-6)


def test_features_have_the_strides_and_channels_of_the_stages():
  model = metaformer_jax.create_model(
      "poolformer_s12", depths=(1, 2, 1, 1), dims=(32, 64, 96, 128))
  x = images(1, 96, 64)
  variables = jax.eval_shape(model.init, jax.random.key(0), x)
  features = jax.eval_shape(
      functools.partial(model.apply, method="features"), variables, x)
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
    jax.eval_shape(model.init, jax.random.key(0), images())
  np.testing.assert_allclose(rates, np.repeat(np.linspace(0, 0.4, 3), 2))


def test_training_draws_other_paths_for_every_key():
  model = metaformer_jax.create_model(
      "poolformer_s12", drop_path_rate=0.9, **SMALL)
  x = images()
  variables = perturbed(model, x)

  @jax.jit
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
  got = apply(half, variables, x)
  assert got.dtype == jnp.bfloat16
  want = apply(make(), variables, x)
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
