"""Random keys from a seed, a name and a step; the state holds none."""

import zlib
from collections.abc import Iterable

import jax


def named(seed: int, name: str) -> jax.Array:
  """The key for one use: equal on all processes, different for every name."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def for_step(seed: int, step: jax.Array,
             names: Iterable[str]) -> dict[str, jax.Array]:
  """The keys of a training step, by name."""
  return {name: jax.random.fold_in(named(seed, name), step) for name in names}
