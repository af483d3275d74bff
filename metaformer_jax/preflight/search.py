"""The largest batch that fits, by asking the compiler as seldom as can be."""

import math
from collections.abc import Callable

from metaformer_jax.preflight.compilation import Compiled

# A batch off a multiple of this is padded to one in every activation.
LANES = 128

# The batches that are tried, in their order: 1, 2, 4, ..., 128, 256, 384, ...
_DOUBLINGS = int(math.log2(LANES))


def largest_batch(compile_batch: Callable[[int], Compiled], first: int,
                  ) -> dict[int, Compiled]:
  """Finds the largest batch of a device that fits, and the next that does not.

  Batches are powers of two up to `LANES`, and its multiples. Memory is taken to
  be a line in the batch for guesses only: where it is short, the compiler
  computes values again instead of keeping them, and needs far less than that.

  Args:
    compile_batch: compiles for that many images of a device at once.
    first: where to begin; rounded down.

  Returns:
    All that was compiled. Of those that fit the last is the largest that does;
    none fits where not even one image does.
  """
  tried = {}
  fits, fails = -1, math.inf
  place, before = _place(first), None
  while fails - fits > 1:
    batch = _batch(place)
    found = tried[batch] = compile_batch(batch)
    if found.fits:
      fits = place
    else:
      fails = place
    # Of a batch of none, the state is known.
    at, needed = before or (0, found.state)
    an_image = (found.needed - needed) / (batch - at)
    guess = math.inf
    if an_image > 0:
      guess = _place(batch + (found.available - found.needed) / an_image)
    before = batch, found.needed
    if fails == math.inf:
      place = min(max(guess, fits + 1), _place(4 * batch))
    else:
      # A quarter of what is left lies on either side.
      margin = (fails - fits - 2) // 4
      place = min(max(guess, fits + 1 + margin), fails - 1 - margin)
  return dict(sorted(tried.items()))


def _batch(place: int) -> int:
  """The batch at a place, counted from 0."""
  if place <= _DOUBLINGS:
    return 2 ** place
  return LANES * (place - _DOUBLINGS + 1)


def _place(batch: float) -> int:
  """The place of the largest batch that is not above this one."""
  if batch >= LANES:
    return _DOUBLINGS - 1 + int(batch // LANES)
  return int(math.log2(max(1, batch)))
