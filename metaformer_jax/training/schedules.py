"""Learning rates as functions of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]


def warmup_cosine(peak: float, total_steps: int, warmup_steps: int,
                  warmup_lr: float, min_lr: float) -> Schedule:
  """Linear warm-up from `warmup_lr` to `peak`, then a cosine to `min_lr`.

  The cosine spans the whole run, warm-up included, as timm's does: after the
  warm-up the rate is that of the cosine at that step, a little below `peak`.
  """

  def schedule(step):
    t = jnp.asarray(step, jnp.float32)
    warmup = warmup_lr + (peak - warmup_lr) * t / max(warmup_steps, 1)
    progress = jnp.clip(t / total_steps, 0, 1)
    cosine = min_lr + (peak - min_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(t < warmup_steps, warmup, cosine)

  return schedule
