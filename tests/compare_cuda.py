"""Compares the forms for NVIDIA GPUs with the plain ones, on a GPU:

    python tests/compare_cuda.py

Prints the time of both, forward and with the gradient, and how much the results
differ from those in float32, as a part of their norm; fails if the form for
GPUs differs more than rounding explains. Not a part of the test suite.
"""

import functools
import sys
import time

import jax
import jax.numpy as jnp

from metaformer_jax.ops import attention, convolution, pooling

# Of results in bfloat16.
_MOST = 1e-2


def seconds(fn, args, n=20):
  """Of a call, the least of three times n."""
  jax.block_until_ready(fn(*args))
  found = []
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(n):
      out = fn(*args)
    jax.block_until_ready(out)
    found.append((time.perf_counter() - start) / n)
  return min(found)


def difference(found, exact):
  """The largest of a part's difference, over its norm."""
  return max(float(jnp.linalg.norm(x.astype(jnp.float32) - y)
                   / jnp.linalg.norm(y))
             for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(exact)))


def with_gradient(fn):
  def both(dy, *args):
    y, pull = jax.vjp(fn, *args)
    return y, pull(dy)

  return both


def compare(name, form, plain, shapes):
  """Prints a line; returns whether the form is right."""
  keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
  args = [jax.random.normal(key, shape, jnp.bfloat16)
          for key, shape in zip(keys, shapes)]
  y = jax.eval_shape(plain, *args)
  args = [jax.random.normal(keys[-1], y.shape, jnp.bfloat16), *args]
  with jax.default_matmul_precision("highest"):
    exact = jax.jit(with_gradient(plain))(
        *(x.astype(jnp.float32) for x in args))
  line, wrong = name, 0
  for which, fn in (("form", form), ("plain", plain)):
    both = jax.jit(with_gradient(fn))
    found = difference(both(*args), exact)
    times = [1e3 * seconds(f, a) for f, a in (
        (jax.jit(fn), args[1:]), (both, args))]
    line += f"; {which} {times[0]:.3f} and {times[1]:.3f} ms, {found:.1e}"
    wrong += which == "form" and not found < _MOST
  print(line + (": WRONG" if wrong else ""), flush=True)
  return not wrong


def cases():
  """Yields (name, form, plain, shapes of the arguments)."""
  plain = functools.partial(attention._plain, mask=None)
  for queries, keys, heads, dim in (
      (64, 64, 8, 32), (100, 100, 10, 32), (144, 144, 10, 32),
      (196, 196, 10, 32), (196, 196, 6, 64), (197, 197, 6, 64),
      (576, 576, 12, 64), (784, 196, 2, 64), (66, 70, 4, 128), (78, 78, 3, 8)):
    q, k = (128, queries, heads, dim), (128, keys, heads, dim)
    yield (f"attention {q} {keys}", attention.dot_product_attention, plain,
           (q, k, k))
  for side, channels in ((7, 1024), (7, 512), (5, 512), (14, 640)):
    window = convolution.Window((1, 1), ((3, 3), (3, 3)), channels)
    yield (f"depthwise {side} {channels}", *(
        functools.partial(fn, window=window)
        for fn in (convolution.conv, convolution._plain)),
           ((128, side, side, channels), (7, 7, 1, channels)))
  for side, channels in ((56, 64), (14, 320)):
    def plain_sum(x):
      return pooling._reduce_window(x, 3)

    yield (f"window_sum {side} {channels}",
           functools.partial(pooling.window_sum, size=3), plain_sum,
           ((128, side, side, channels),))


def main():
  if jax.default_backend() != "gpu":
    sys.exit("compare_cuda: jax finds no GPU")
  print(jax.devices()[0].device_kind, jax.__version__)
  wrong = [name for name, *case in cases() if not compare(name, *case)]
  if wrong:
    sys.exit(f"compare_cuda: wrong: {', '.join(wrong)}")


if __name__ == "__main__":
  main()
