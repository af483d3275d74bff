"""Non-maximum suppression."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from metaformer_jax.ops import boxes as box_ops

# Replaces a union of 0 only: other boxes may be smaller than any pixel.
_TINY = float(np.finfo(np.float32).tiny)


def nms(boxes: jax.Array, scores: jax.Array, labels: jax.Array,
        is_valid: jax.Array, threshold: float,
        n_max: int) -> tuple[jax.Array, jax.Array]:
  """The best boxes, none of which covers a better one of its class.

  A box is left out if its IoU with a better one that is kept is above the
  threshold. The result is torchvision's `nms` of each class, merged by score.
  mmcv's `batched_nms` moves the classes apart by adding to coordinates, and
  differs where that rounds.

  The boxes are found one after the other, with N values in memory at a time,
  not N x N: in n_max steps of O(N) each.

  Args:
    boxes: float32 [N, 4], in pixels.
    scores: float32 [N], finite; of equal ones, the first is better.
    labels: integers [N], classes.
    is_valid: bool [N]; the others are neither kept nor cover any.
    threshold: IoU.
    n_max: how many boxes are kept at most.

  Returns:
    int32 [n_max], indices by descending score, 0 after the last box; and bool
    [n_max], which of them are boxes.
  """
  threshold = _at_most(threshold)
  index = jnp.arange(len(boxes), dtype=jnp.int32)
  # In the loop, a TPU would read [N, 4] with 4 values in the place of 128.
  columns = lax.optimization_barrier(tuple(boxes.T))

  def select(left, _):
    best = left.argmax().astype(jnp.int32)
    box = jnp.stack([column[best] for column in columns])
    label, found = labels[best], left[best] > -jnp.inf
    overlap = box_ops.iou(box[None], jnp.stack(columns, -1),
                          min_union=_TINY)[0]
    covered = (overlap > threshold) & (labels == label) | (index == best)
    return (jnp.where(covered, -jnp.inf, left),
            (jnp.where(found, best, 0), found))

  left = jnp.where(is_valid, scores, -jnp.inf)
  return lax.scan(select, left, length=n_max)[1]


def detections(boxes: jax.Array, scores: jax.Array, labels: jax.Array,
               is_valid: jax.Array, threshold: float,
               n_max: int) -> dict[str, jax.Array]:
  """What `nms` keeps, by descending score.

  Returns:
    "boxes", float32 [K, 4], in pixels; "scores", float32 [K]; "labels", int32
    [K]; "valid", bool [K], which of them are detections. The others have zeros,
    and label -1. K is n_max.
  """
  index, valid = nms(boxes, scores, labels, is_valid, threshold, n_max)
  return {"boxes": jnp.where(valid[:, None], boxes[index], 0),
          "scores": jnp.where(valid, scores[index], 0),
          "labels": jnp.where(valid, labels[index], -1), "valid": valid}


def kept(boxes: jax.Array, is_valid: jax.Array,
         threshold: float) -> jax.Array:
  """Which boxes no better one that is kept covers; the best ones come first.

  The same as `nms` with one class and no limit. Which boxes are kept is the one
  solution of: a box is kept if, and only if, no kept one before it covers it.
  It is found by applying this rule to a first guess until nothing changes,
  which takes as many turns as the longest chain of boxes that decide on each
  other: a few, where `nms` takes one for each box that is kept. It compares
  all N x N pairs, so that `nms` is cheaper for a few boxes of very many
  (tests/compare_nms.py). In a batch, all images wait for the longest chain.

  Args:
    boxes: float32 [N, 4], in pixels, by descending score.
    is_valid: bool [N]; the others are neither kept nor cover any.
    threshold: IoU.

  Returns:
    bool [N].
  """
  index = jnp.arange(len(boxes))
  covers = box_ops.iou(boxes, boxes, min_union=_TINY) > _at_most(threshold)
  covers &= index[:, None] < index[None]

  def again(state):
    old, _ = state
    new = is_valid & ~(covers & old[:, None]).any(0)
    return new, (new != old).any()

  return lax.while_loop(lambda state: state[1], again,
                        (is_valid, jnp.array(True)))[0]


def _at_most(threshold: float) -> np.float32:
  """The largest float32 that is not above the threshold.

  An IoU in float32 is above this one if, and only if, it is above the exact
  threshold, which torchvision compares it with.
  """
  nearest = np.float32(threshold)
  if float(nearest) > threshold:
    nearest = np.nextafter(nearest, np.float32(-np.inf))
  return nearest
