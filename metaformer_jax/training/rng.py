"""Random keys from a seed, a name and a step; none lives in the state."""

import zlib

import jax

# What a step draws from: the keys that models and tasks ask for by name.
STEP_NAMES = ("augment", "dropout", "drop_path")


def named(seed: int, name: str) -> jax.Array:
  """The key of one use: the same on every process, other for every name."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def for_step(seed: int, step: jax.Array) -> dict[str, jax.Array]:
  """The keys of a training step, by name."""
  return {name: jax.random.fold_in(named(seed, name), step)
          for name in STEP_NAMES}
