"""Which object an anchor is to find."""

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import boxes as box_ops

# Instead of the index of a box.
NEGATIVE = -1
IGNORED = -2


def is_object(boxes: jax.Array, labels: jax.Array) -> jax.Array:
  """Which boxes [..., G, 4] have a label, not -1, and an area: bool [..., G].

  The deltas of a box without area would be infinite.
  """
  return (labels >= 0) & (boxes[..., 2:] > boxes[..., :2]).all(-1)


def max_iou(boxes: jax.Array, is_box: jax.Array, anchors: jax.Array,
            is_anchor: jax.Array, *, positive: float, negative: float,
            min_positive: float = 0.0,
            low_quality: bool = True) -> jax.Array:
  """Assigns boxes to anchors by their IoU; mmdetection's MaxIoUAssigner.

  1. An anchor whose largest IoU is below `negative` is negative.
  2. One whose largest IoU is at least `positive` gets the box of that IoU, the
     first one if there are several.
  3. Each box then gets the anchors of its largest IoU, all of them, if it is
     at least `min_positive`. Later boxes take anchors from earlier ones.
  4. The rest is ignored.

  As in mmdetection 2.19, with min_positive = 0 a box that overlaps no anchor
  gets all anchors by step 3. Only those that `is_box` leaves out get none.

  The boxes are gone through one by one, as in mmdetection, so that no more than
  five values of each anchor are in memory: 4 MB for the 201,600 anchors of a
  canvas of 800 x 1344 pixels. Their IoU with 100 boxes would be 81 MB.

  Args:
    boxes: float32 [G, 4], in pixels, finite.
    is_box: bool [G]; false where there is no object.
    anchors: float32 [N, 4].
    is_anchor: bool [N]; the others are ignored.
    positive, negative: IoUs, negative <= positive.
    min_positive: IoU; mmdetection's min_pos_iou.
    low_quality: whether there is step 3; mmdetection's match_low_quality.

  Returns:
    int32 [N]: index of a box, NEGATIVE or IGNORED.
  """
  def add(found, x):
    best, first, last = found
    index, box, exists = x
    overlap = jnp.where(exists & is_anchor,
                        box_ops.iou(box[None], anchors)[0], -1)
    # Both uses below must have the same bits.
    overlap = lax.optimization_barrier(overlap)
    largest = overlap.max()
    is_best = exists & (overlap == largest) & (largest >= min_positive)
    return (jnp.maximum(best, overlap),
            jnp.where(overlap > best, index, first),
            jnp.where(is_best, index, last)), None

  none = jnp.full(len(anchors), -1, jnp.int32)
  start = none.astype(jnp.float32), none, none
  index = jnp.arange(len(boxes), dtype=jnp.int32)
  (best, first, last), _ = lax.scan(add, start, (index, boxes, is_box))
  found = jnp.where(best < negative, NEGATIVE, IGNORED)
  found = jnp.where(best >= positive, first, found)
  if low_quality:
    found = jnp.where(last >= 0, last, found)
  return jnp.where(is_anchor, found, IGNORED)
