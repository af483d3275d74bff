"""Blocks with kernels are the blocks of modules: values, gradients, draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import metaformer_jax
from metaformer_jax.models import compiling, fused

KERNELS = compiling.Compile(kernels="pallas")
# What the models of the second paper have.
BASELINE = {"activation": "star_relu", "norm_bias": False, "mlp_bias": False,
            "layer_scale_init": 0.0, "res_scale_init": (1.0,)}
# Overrides of PoolFormer-S12; which kernels each takes, by their number.
CASES = {
    "pooling": ({"depths": (1, 2), "dims": (8, 16)}, 6),
    "hybrid": ({"depths": (1, 1), "dims": (8, 32),
                "token_mixers": ("pooling", "attention")}, 3),
    "no subtraction, bias, LayerScale": (
        {"depths": (1,), "dims": (8,), "pool_subtract": False,
         "norm_bias": False, "mlp_bias": False, "layer_scale_init": 0.0,
         "pool_size": 5}, 2),
    "no MLP": ({"depths": (1,), "dims": (8,), "mlp_ratio": 0.0}, 1),
    "PoolFormerV2": ({"depths": (1,), "dims": (8,), **BASELINE}, 2),
    "ConvFormer": ({"depths": (1,), "dims": (8,), **BASELINE,
                    "norm": "layer_norm", "token_mixers": ("sepconv",)}, 2),
    "separable convolutions after GroupNorm": (
        {"depths": (1,), "dims": (8,), "conv_kernel_size": 3,
         "token_mixers": ("sepconv",)}, 2),
    "pooling after LayerNorm": (
        {"depths": (1,), "dims": (8,), "norm": "layer_norm"}, 1),
    "no residual": ({"depths": (1,), "dims": (8,), "residual": False}, 0),
    "batch norm": ({"depths": (1,), "dims": (8,), "norm": "batch_norm"}, None),
}


def create(overrides, compile=None):
  overrides = {"drop_path_rate": 0.5, "token_mixers": ("pooling",) * len(
      overrides["depths"])} | overrides
  return metaformer_jax.create_model(
      "poolformer_s12", num_classes=5, compile=compile, **overrides)


def perturbed(model, x):
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda v: np.float32(v + 0.2 * np.abs(rng.normal(size=v.shape))),
      jax.jit(model.init)(jax.random.key(0), x))


@functools.partial(jax.jit, static_argnums=0)
def trained(model, variables, x, mask=None):
  """Logits of a training step with drop path, and its gradients."""

  def logits(variables, x):
    return model.apply(variables, x, mask=mask, train=True,
                       rngs={"drop_path": jax.random.key(3)})

  y, vjp = jax.vjp(logits, variables, x)
  return y, vjp(jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def counted(monkeypatch):
  """Counts the calls of kernels."""
  calls = []
  call = fused._call
  monkeypatch.setattr(fused, "_call", lambda *args, **kwargs: (
      calls.append(args[1]), call(*args, **kwargs))[1])
  return calls


# Of the default tests: some and none of the branches are kernels.
FAST = ("ConvFormer", "no residual", "batch norm")


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in FAST))
    for name in CASES])
def test_kernels_give_what_the_modules_give(monkeypatch, name):
  overrides, n_kernels = CASES[name]
  if n_kernels is None:
    with pytest.raises(ValueError, match="kernels: pallas has no kernels for"):
      create(overrides, KERNELS)
    return
  calls = counted(monkeypatch)
  x = np.random.default_rng(1).normal(size=(3, 37, 29, 3)).astype(np.float32)
  variables = perturbed(create(overrides), x)
  assert not calls
  want = trained(create(overrides), variables, x)
  got = trained(create(overrides, KERNELS), variables, x)
  assert len(calls) == n_kernels
  jax.tree.map(lambda g, w: np.testing.assert_allclose(
      g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max())), got, want)


def test_padded_images_and_predictions_take_the_modules(monkeypatch):
  calls = counted(monkeypatch)
  x = np.ones((2, 32, 32, 3), np.float32)
  model = create({"depths": (1,), "dims": (8,)}, KERNELS)
  variables = perturbed(model, x)
  model.apply(variables, x)
  trained(model, variables, x, np.ones((2, 32, 32), bool))
  assert not calls


@pytest.mark.slow
def test_scanned_blocks_take_kernels(monkeypatch):
  calls = counted(monkeypatch)
  x = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
  overrides = {"depths": (3,), "dims": (8,)}
  variables = perturbed(create(overrides), x)
  want = trained(create(overrides), variables, x)
  got = trained(create(overrides, compiling.Compile(
      scan=True, remat=("dots",), kernels="pallas")), variables, x)
  assert calls
  jax.tree.map(lambda g, w: np.testing.assert_allclose(
      g, w, rtol=0, atol=1e-5 * max(1, np.abs(w).max())), got, want)
