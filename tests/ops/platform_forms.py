"""Compares the two forms of a function of `ops.platforms`."""

import functools
import re

import jax
import numpy as np

TOLERANCES = {"float32": 3e-6, "bfloat16": 1e-2}


def assert_same(fn, plain, *args, seed=0):
  """Values and gradients of `fn`, run on a CPU, are those of `plain`.

  Each array may differ by a part of its largest value: in bfloat16 from
  `plain` in float32, that is by rounding.
  """
  exact = [np.asarray(x, np.float32) for x in args]
  y = jax.eval_shape(fn, *args)
  dy = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
  pairs = zip(_with_gradients(fn, dy, *args),
              _with_gradients(plain, dy.astype(np.float32), *exact),
              strict=True)
  for got, want in pairs:
    assert got.dtype == args[0].dtype
    largest = np.abs(want).max(initial=1e-3)
    np.testing.assert_allclose(
        np.asarray(got, np.float32) / largest, want / largest, rtol=0,
        atol=TOLERANCES[str(got.dtype)])


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(fn, dy, *args):
  y, gradients = jax.vjp(fn, *args)
  return y, *gradients(dy)


def operations(fn, *args, platform="tpu"):
  """The operations that its compiler gets, without those of the choice.

  They are in alphabetical order.
  """
  lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=(platform,))
  found = re.findall(r"stablehlo\.(\w+)", lowered.as_text())
  return sorted(name for name in found
                if name not in ("case", "constant", "return"))
