"""Drawing the anchors and regions that a detector is trained on."""

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import matching


def sample(key: jax.Array, matches: jax.Array, n: int,
           positive_fraction: float,
           ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws positives and negatives; mmdetection's RandomSampler.

  At most int(n * positive_fraction) positives are drawn, and negatives for the
  rest; all of a kind, if there are no more. Each subset of a kind is as
  probable as any other: those with the largest random integers are taken.
  Floats in [0, 1) have 23 random bits only, and would often tie among the
  268,569 anchors of a canvas of 800 x 1344 pixels, in favour of the first.

  Args:
    key: random key.
    matches: int32 [N], of `matching.max_iou`; those ignored are never drawn.
    n: how many are drawn.
    positive_fraction: between 0 and 1.

  Returns:
    index: int32 [n]; first of positives, then of negatives, in random order.
    is_positive: bool [n].
    is_valid: bool [n]; false where there is none left, at the end.
  """
  # 31 bits, so that -1 is below all.
  order = (jax.random.bits(key, matches.shape, jnp.uint32) >> 1).astype(
      jnp.int32)

  def draw(is_candidate):
    drawn, index = lax.top_k(jnp.where(is_candidate, order, -1),
                             min(n, len(matches)))
    return index, (drawn >= 0).sum()

  positives, n_positive = draw(matches >= 0)
  negatives, n_negative = draw(matches == matching.NEGATIVE)
  n_positive = jnp.minimum(n_positive, int(n * positive_fraction))
  row = jnp.arange(n)
  is_positive, is_valid = row < n_positive, row < n_positive + n_negative
  drawn = jnp.where(is_positive, positives[row], negatives[row - n_positive])
  return jnp.where(is_valid, drawn, 0), is_positive, is_valid
