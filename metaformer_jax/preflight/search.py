"""The largest batch that fits, by asking the compiler as seldom as can be."""

import math
from collections.abc import Callable

from metaformer_jax.preflight.compilation import Compiled

# A batch off a multiple of this is padded to one in every activation.
LANES = 128


def largest_batch(compile_batch: Callable[[int], Compiled], first: int,
                  ) -> dict[int, Compiled]:
  """Finds the largest batch of a device that fits, and the next that does not.

  Batches are powers of two up to `LANES`, and its multiples.

  Args:
    compile_batch: compiles for that many images of a device at once.
    first: where to begin; rounded down.

  Returns:
    All that was compiled. Of those that fit the last is the largest that does;
    none fits where not even one image does.
  """
  tried = {}
  fits, fails = 0, math.inf
  batch, before = _round_down(first), None
  while _above(fits) < fails:
    found = tried[batch] = compile_batch(batch)
    if found.fits:
      fits = batch
    else:
      fails = batch
    # Memory is so much an image, and what a batch of none would need: of this
    # the first guess knows the state only.
    at, needed = before or (0, found.state)
    an_image = max(1.0, (found.needed - needed) / (batch - at))
    guess = _round_down(
        batch + (found.available - found.needed) / an_image)
    before = batch, found.needed
    batch = max(_above(fits), min(guess, _below(fails)))
  return dict(sorted(tried.items()))


def _round_down(batch: float) -> int:
  if batch >= LANES:
    return int(batch // LANES * LANES)
  return 2 ** int(math.log2(batch)) if batch >= 1 else 1


def _above(batch: int) -> int:
  """The next larger one."""
  return batch + LANES if batch >= LANES else max(1, 2 * batch)


def _below(batch: float) -> float:
  """The next smaller one."""
  return batch - LANES if batch > LANES else batch / 2
