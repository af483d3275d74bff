"""Compares the two forms of a function of `ops.platforms`."""

import re

import jax
import jax.numpy as jnp
import numpy as np

TOLERANCES = {"float32": 3e-6, "bfloat16": 1e-2}


def assert_same(fn, plain, *args, seed=0):
  """Values and gradients of `fn`, run on a CPU, are those of `plain`.

  Each array may differ by a part of its largest value: in bfloat16 from
  `plain` in float32, that is by rounding.
  """
  exact = [jnp.asarray(x, jnp.float32) for x in args]
  got, got_gradients = jax.vjp(fn, *args)
  want, want_gradients = jax.vjp(plain, *exact)
  dy = np.random.default_rng(seed).normal(size=want.shape)
  dy = jnp.asarray(dy, got.dtype)
  pairs = zip((got, *jax.jit(got_gradients)(dy)),
              (want, *want_gradients(dy.astype(jnp.float32))), strict=True)
  for got, want in pairs:
    assert got.dtype == args[0].dtype
    largest = np.abs(want).max(initial=1e-3)
    np.testing.assert_allclose(
        np.asarray(got, np.float32) / largest, want / largest, rtol=0,
        atol=TOLERANCES[str(got.dtype)])


def tpu_operations(fn, *args):
  """The operations that a TPU's compiler gets, without those of the choice.

  They are in alphabetical order.
  """
  lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("tpu",))
  found = re.findall(r"stablehlo\.(\w+)", lowered.as_text())
  return sorted(name for name in found
                if name not in ("case", "constant", "return"))
