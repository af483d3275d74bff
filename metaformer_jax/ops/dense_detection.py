"""Loss and detections of a detector that judges every anchor: RetinaNet.

arXiv 1708.02002, as mmdetection 2.19 computes it (models/dense_heads/
{anchor,retina,base_dense}_head.py). Arguments come by level of the pyramid,
finest first, so that logits, which are the largest arrays, are never copied.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import boxes as box_ops
from metaformer_jax.ops import groups, matching
from metaformer_jax.ops import nms as nms_ops

# By level.
Levels = Sequence[jax.Array]


def sigmoid_focal(logits: jax.Array, is_class: jax.Array, *, alpha: float,
                  gamma: float) -> jax.Array:
  """Focal loss of each logit: -a (1 - p)^gamma log(p), p of the right answer.

  The power is an exponential, so that its gradient is finite for every gamma,
  even where 1 - p is 0. `optax.losses.sigmoid_focal_loss`, which also takes
  labels between 0 and 1, has the same values, but within `loss` needs 1.3 GB
  for 129 MB of logits on a CPU, instead of 12 MB.

  Args:
    logits: float32 [...].
    is_class: bool [...]; whether the answer is yes.
    alpha: a of the answer yes; that of no is 1 - alpha.
    gamma: how much less the easy answers weigh.

  Returns:
    float32 [...].
  """
  logits = jnp.where(is_class, logits, -logits)
  weight = jnp.where(is_class, alpha, 1 - alpha)
  return (weight * jnp.exp(-gamma * jax.nn.softplus(logits))
          * jax.nn.softplus(-logits))


def loss(logits: Levels, deltas: Levels, anchors: Levels,
         is_anchor: Levels | None, boxes: jax.Array, labels: jax.Array, *,
         positive_iou: float, negative_iou: float, alpha: float, gamma: float,
         loss_group: int | None = None) -> dict[str, jax.Array]:
  """RetinaNet's loss.

  Sums over the anchors of the images of a group are divided by the group's
  number of positive anchors, for which an image counts at least 1. The result
  is the mean over the groups. Boxes without area are left out: their targets
  are infinite.

  Args:
    logits: float32 [B, n, C].
    deltas: float32 [B, n, 4].
    anchors: float32 [n, 4], in pixels.
    is_anchor: bool [B, n]; the others have no loss. None: all have.
    boxes: float32 [B, G, 4], in pixels.
    labels: integers [B, G]; -1 where there is no object.
    positive_iou, negative_iou: of `matching.max_iou`.
    alpha, gamma: of `sigmoid_focal`.
    loss_group: images of a group, one after the other; it divides B. None: all.

  Returns:
    "class_loss", the focal loss, and "box_loss", the absolute errors of the
    deltas of positive anchors: float32 [].
  """
  if is_anchor is None:
    is_anchor = [jnp.ones(x.shape[:2], bool) for x in logits]
  is_box = matching.is_object(boxes, labels)
  matches = jax.vmap(
      functools.partial(matching.max_iou, positive=positive_iou,
                        negative=negative_iou), (0, 0, None, 0))(
          boxes, is_box, jnp.concatenate(anchors),
          jnp.concatenate(is_anchor, 1))
  n_positive = jnp.maximum((matches >= 0).sum(1), 1)

  ends = itertools.accumulate(len(x) for x in anchors)
  class_sum = box_sum = jnp.zeros(len(boxes), jnp.float32)
  for level in zip(logits, deltas, anchors,
                   jnp.split(matches, list(ends)[:-1], 1)):
    classes, sides = _sums(*level, boxes, labels, alpha, gamma)
    class_sum, box_sum = class_sum + classes, box_sum + sides

  return {"class_loss": groups.mean(class_sum, n_positive, loss_group),
          "box_loss": groups.mean(box_sum, n_positive, loss_group)}


# The gradient computes it again: otherwise several arrays of the logits' size
# would wait for it.
@functools.partial(jax.checkpoint, static_argnums=(6, 7))
def _sums(logits, deltas, anchors, matches, boxes, labels, alpha, gamma):
  """Sums of both losses over the anchors of a level: float32 [B] each.

  What an anchor without that loss predicts is replaced before it is used, so
  that it gets no gradient, whatever it is.
  """
  positive, counts = matches >= 0, matches != matching.IGNORED
  index = jnp.maximum(matches, 0)
  label = jnp.where(positive, jnp.take_along_axis(labels, index, 1), -1)
  is_class = label[..., None] == jnp.arange(logits.shape[-1])[None, None]
  counts, positive = counts[..., None], positive[..., None]
  class_loss = sigmoid_focal(jnp.where(counts, logits, 0), is_class,
                             alpha=alpha, gamma=gamma)
  class_sum = jnp.where(counts, class_loss, 0).sum((1, 2))

  targets = box_ops.encode(anchors[None], jnp.where(
      positive, jnp.take_along_axis(boxes, index[..., None], 1), anchors[None]))
  box_sum = jnp.abs(jnp.where(positive, deltas - targets, 0)).sum((1, 2))
  return class_sum, box_sum


def detect(logits: Levels, deltas: Levels, anchors: Levels,
           is_anchor: Levels | None, size: jax.Array, *, candidates: int,
           score_threshold: float, nms_iou: float,
           max_detections: int) -> dict[str, jax.Array]:
  """Detections of one image, in mmdetection's order.

  Each level gives its best pairs of an anchor and a class. Of all levels'
  pairs, those that no better one of their class covers are detections.

  Args:
    logits: float32 [n, C].
    deltas: float32 [n, 4].
    anchors: float32 [n, 4], in pixels.
    is_anchor: bool [n]; the others detect nothing. None: all may.
    size: [2], height and width of the image, which boxes are clipped to.
    candidates: pairs of a level.
    score_threshold: pairs have a higher score.
    nms_iou: of `nms.nms`.
    max_detections: K.

  Returns:
    As `nms.detections`.
  """
  if is_anchor is None:
    is_anchor = [jnp.ones(len(x), bool) for x in logits]
  found = []
  for level in zip(logits, deltas, anchors, is_anchor):
    logit, delta, anchor, exists = level
    scores, index, labels = best_pairs(logit, exists, candidates)
    boxes = box_ops.decode(jnp.asarray(anchor)[index], delta[index], size)
    found.append((boxes, scores, labels))
  boxes, scores, labels = map(jnp.concatenate, zip(*found))
  return nms_ops.detections(boxes, scores, labels, scores > score_threshold,
                            nms_iou, max_detections)


def best_pairs(logits: jax.Array, is_anchor: jax.Array,
               n_max: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The best pairs of an anchor and a class.

  They are among the pairs of the n_max anchors whose best class is best: each
  of those has a pair that comes before all pairs of the other anchors. So
  sorting all pairs, 12 million at the finest level, is not needed.

  Args:
    logits: float32 [n, C].
    is_anchor: bool [n]; the pairs of the others come last.
    n_max: number of pairs.

  Returns:
    float32 [K] scores, the logits' sigmoids, descending; of equal ones, those
    of the first anchor, and of its first class, come first. -1 for pairs of the
    others. int32 [K], their anchors; int32 [K], their classes. K is n_max, or
    n C if that is less.
  """
  n, n_classes = logits.shape
  best = jnp.where(is_anchor, jax.nn.sigmoid(logits).max(1), -1)
  anchor = jnp.sort(lax.top_k(best, min(n_max, n))[1])
  scores = jnp.where(is_anchor[anchor][:, None],
                     jax.nn.sigmoid(logits[anchor]), -1).reshape(-1)
  scores, pair = lax.top_k(scores, min(n_max, len(scores)))
  return scores, anchor[pair // n_classes], pair % n_classes
