"""Whether a token mixer keeps the contract of `mixers`: for a user's own.

A mixer is `mixer(x, *, mask=None, train=False) -> x`, [B, H, W, C], made by
`factory(dim=..., dtype=..., name=...)`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from metaformer_jax import errors
from metaformer_jax.models import layers, mixers

_SIGNATURE = "mixer(x, *, mask=None, train=False) -> x"
_BATCH = 2
_TOLERANCE = 1e-4  # Of sums in another order; values are of order 1.


class _Subject:
  """A mixer with perturbed parameters, for images of one size.

  Initial values, often 0 or 1, would hide what a parameter does.
  """

  def __init__(self, factory: Callable[..., nn.Module], dim: int,
               size: tuple[int, int], dtype: DTypeLike):
    self.dim, self.size, self.dtype = dim, size, jnp.dtype(dtype)
    self._make = functools.partial(factory, dim=dim, name="token_mixer")
    self.module = self._make(dtype=dtype)
    if not isinstance(self.module, nn.Module):
      raise TypeError(f"the factory gave a {type(self.module).__name__}, not a "
                      "flax.linen.Module")
    keys = dict(zip(("params", "dropout", "drop_path"),
                    jax.random.split(jax.random.key(0), 3)))
    variables = self.module.init(keys, self.image(size))
    rng = np.random.default_rng(0)
    self.variables = jax.tree.map(
        lambda v: (v + 0.1 * rng.standard_normal(v.shape)).astype(v.dtype)
        if jnp.issubdtype(v.dtype, jnp.floating) else v, variables)

  def image(self, size: tuple[int, int], seed: int = 1) -> jax.Array:
    rng = np.random.default_rng(seed)
    shape = (_BATCH, *size, self.dim)
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  def __call__(self, x: jax.Array,
               mask: jax.Array | None = None) -> jax.Array:
    return self.module.apply(self.variables, x, mask=mask, train=False)

  def train(self, x: jax.Array, variables: Mapping[str, Any]) -> jax.Array:
    """As in a training step, with random streams and running statistics."""
    rngs = {"dropout": jax.random.key(1), "drop_path": jax.random.key(2)}
    y, _ = self.module.apply(variables, x, mask=None, train=True, rngs=rngs,
                             mutable=["batch_stats"])
    return y

  def in_bfloat16(self) -> nn.Module:
    return self._make(dtype=jnp.bfloat16)


def _shape(mixer: _Subject) -> Iterator[str]:
  x = mixer.image(mixer.size)
  for y in (mixer(x), mixer.train(x, mixer.variables)):
    if not isinstance(y, jax.Array) or y.shape != x.shape:
      yield (f"the output for {x.shape} is {getattr(y, 'shape', type(y))}; it "
             "must have the shape of the input")
      return


def _dtype(mixer: _Subject) -> Iterator[str]:
  wrong = {f"{jax.tree_util.keystr(path)} is {v.dtype}" for path, v in
           jax.tree_util.tree_leaves_with_path(mixer.variables.get("params"))
           if v.dtype != jnp.float32}
  if wrong:
    yield f"{', '.join(sorted(wrong))}; parameters must be float32"
  found = mixer(mixer.image(mixer.size).astype(mixer.dtype)).dtype
  if found != mixer.dtype:
    yield f"the output for {mixer.dtype} is {found}; compute in `dtype`"


def _gradient(mixer: _Subject) -> Iterator[str]:
  x = mixer.image(mixer.size)
  weight = mixer.image(mixer.size, seed=2)
  params = mixer.variables.get("params", {})

  def loss(params: Any, x: jax.Array) -> jax.Array:
    y = mixer.train(x, {**mixer.variables, "params": params})
    return (y.astype(jnp.float32) * weight).sum()

  for name, gradient in zip(("parameters", "input"),
                            jax.grad(loss, (0, 1))(params, x)):
    if not all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradient)):
      yield f"the gradient of the {name} is not finite"


def _mask(mixer: _Subject) -> Iterator[str]:
  advice = ("a mixer gets mask [B, H, W] and must ignore the pixels where it "
            "is false, or raise a ValueError that says that it cannot mask")
  h, w = mixer.size
  size = h - h // 3, w - w // 4
  mask = np.zeros((_BATCH, h, w), bool)
  mask[:, :size[0], :size[1]] = True
  mask = jnp.asarray(mask)
  x = mixer.image(mixer.size)
  try:
    one, other = (
        mixer(jnp.where(mask[..., None], x, padding), mask)
        for padding in (0.0, 10 * mixer.image(mixer.size, seed=3)))
  except ValueError as e:
    if not re.search("mask|padding", str(e)):  # As of shapes that do not fit.
      yield f"{_said(e)}; {advice}"
    return
  valid = mask[..., None]
  change = float(jnp.abs(jnp.where(valid, one - other, 0)).max())
  if not change <= _TOLERANCE:
    yield f"the padding changes the output of valid pixels by {change:.2g}"
  else:
    try:
      alone = mixer(x[:, :size[0], :size[1]])
    except ValueError:
      return  # It has a matrix over all pixels.
    change = float(jnp.abs(one[:, :size[0], :size[1]] - alone).max())
    if change <= _TOLERANCE:
      return
    yield ("an image on a larger canvas gives other values than alone, by "
           f"{change:.2g}")
  yield advice


def _other_sizes(mixer: _Subject) -> Iterator[str]:
  h, w = mixer.size
  for size in ((h + 3, w), (h, w - 1)):
    x = mixer.image(size)
    try:
      y = mixer(x)
    except ValueError:
      return  # It says that it cannot.
    if y.shape != x.shape:
      yield f"the output for {x.shape} is {y.shape}"


def _jit(mixer: _Subject) -> Iterator[str]:
  x = mixer.image(mixer.size)
  change = float(jnp.abs(jax.jit(mixer)(x) - mixer(x)).max())
  if not change <= _TOLERANCE:
    yield f"the output under jax.jit differs by {change:.2g}"


def _bfloat16(mixer: _Subject) -> Iterator[str]:
  x = mixer.image(mixer.size)
  y = mixer.in_bfloat16().apply(mixer.variables, x.astype(jnp.bfloat16))
  if y.dtype != jnp.bfloat16:
    yield f"with dtype=bfloat16 the output is {y.dtype}"
  want = mixer(x)
  change = float(jnp.abs(y.astype(jnp.float32) - want).max())
  if not change <= 0.1 * max(1.0, float(jnp.abs(want).max())):
    yield f"with dtype=bfloat16 the output changes by {change:.2g}"


CHECKS: dict[str, Callable[[_Subject], Iterable[str]]] = {
    "shape": _shape, "dtype": _dtype, "gradient": _gradient, "mask": _mask,
    "other_sizes": _other_sizes, "jit": _jit, "bfloat16": _bfloat16}


def check_mixer(mixer: str | Callable[..., nn.Module], *, dim: int = 64,
                size: tuple[int, int] = (9, 8),
                dtype: DTypeLike = jnp.float32,
                checks: Iterable[str] = tuple(CHECKS)) -> None:
  """Tries a token mixer; raises if it does not keep the contract.

  Args:
    mixer: a factory, an import path of one ("my_mixers:Shift"), or a name in
      `mixers.MIXERS`.
    dim: channels.
    size: height and width of the images, in pixels.
    dtype: of the computation, but in the check "bfloat16".
    checks: names in `CHECKS`: "shape", "dtype", "gradient", "mask" (padding
      changes no valid output), "other_sizes" (or a ValueError), "jit",
      "bfloat16".

  Raises:
    ValueError: one line with all that is wrong, each after its check's name.
    ConfigError: the path names nothing that can be imported.
  """
  name = mixer if isinstance(mixer, str) else getattr(
      mixer, "__name__", repr(mixer))
  problems = []
  with jax.numpy_rank_promotion("allow"):
    try:
      subject = _Subject(layers.lookup(mixers.MIXERS, "token mixer", mixer),
                         dim, size, dtype)
    except errors.UserError:
      raise
    except Exception as e:  # The mixer is a program of the user's.
      raise ValueError(
          f"{name}: cannot be made by factory(dim=..., dtype=..., name=...) "
          f"and called as {_SIGNATURE}: {_said(e)}") from e
    for check in checks:
      try:
        problems += [f"{check}: {line}" for line in
                     ["; ".join(CHECKS[check](subject))] if line]
      except Exception as e:
        problems.append(f"{check}: {_said(e)}; it must be {_SIGNATURE}")
  if problems:
    raise ValueError(f"{name}: {'; also '.join(problems)}")


def _said(e: Exception) -> str:
  return errors.one_line(f"{type(e).__name__}: {e}")[:500]
