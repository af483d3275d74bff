"""Finds the largest batch that fits, with as few compilations as possible."""

import math
from collections.abc import Callable

from metaformer_jax.preflight.compilation import Compiled

# A TPU pads the batch to a multiple of this in every activation.
LANES = 128

# Candidate batches are numbered: 1, 2, 4, ..., 128, 256, 384, ...
_DOUBLINGS = int(math.log2(LANES))


def largest_batch(compile_batch: Callable[[int], Compiled], first: int,
                  ) -> dict[int, Compiled]:
  """Finds the largest batch per device that fits, and the next one up.

  Candidates are the powers of two up to `LANES`, and its multiples. That memory
  is linear in the batch is assumed only to choose the next candidate: when
  memory is short, the compiler recomputes values and needs far less.

  Args:
    compile_batch: compiles for a number of images per device.
    first: the batch to start from; rounded down to a candidate.

  Returns:
    All results by batch, in ascending order. None fits if not even one image
    does.
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
    # A batch of 0 would need the state's memory.
    at, needed = before or (0, found.state)
    an_image = (found.needed - needed) / (batch - at)
    guess = math.inf
    if an_image > 0:
      guess = _place(batch + (found.available - found.needed) / an_image)
    before = batch, found.needed
    if fails == math.inf:
      place = min(max(guess, fits + 1), _place(4 * batch))
    else:
      # Leave at least a quarter of the interval on either side.
      margin = (fails - fits - 2) // 4
      place = min(max(guess, fits + 1 + margin), fails - 1 - margin)
  return dict(sorted(tried.items()))


def _batch(place: int) -> int:
  """The candidate with this number, from 0."""
  if place <= _DOUBLINGS:
    return 2 ** place
  return LANES * (place - _DOUBLINGS + 1)


def _place(batch: float) -> int:
  """The number of the largest candidate that is at most `batch`."""
  if batch >= LANES:
    return _DOUBLINGS - 1 + int(batch // LANES)
  return int(math.log2(max(1, batch)))
