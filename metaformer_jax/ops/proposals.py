"""Regions that may show an object: loss and proposals of the first stage.

The region proposal network of Faster R-CNN (arXiv 1506.01497), as mmdetection
2.19 computes it (models/dense_heads/{anchor,rpn}_head.py). Arguments come by
level of the pyramid, finest first.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import boxes as box_ops
from metaformer_jax.ops import groups, matching, sampling
from metaformer_jax.ops import nms as nms_ops

# By level.
Levels = Sequence[jax.Array]


def proposal_loss(key: jax.Array, logits: Levels, deltas: Levels,
                  anchors: Levels, is_anchor: Levels | None, boxes: jax.Array,
                  labels: jax.Array, *, positive_iou: float,
                  negative_iou: float, n_samples: int,
                  positive_fraction: float,
                  loss_group: int | None = None) -> dict[str, jax.Array]:
  """Loss of whether anchors show an object, and where.

  Of the anchors of each image, a sample counts. An object without an anchor of
  `positive_iou` gets the ones of its largest IoU, if that is `negative_iou` at
  least. Sums are divided by the numbers of positive and of negative anchors in
  the sample, each of which counts at least 1 of an image, in the group
  together. The result is the mean over the groups. Boxes without area are left
  out.

  Args:
    key: random key of the samples.
    logits: float32 [B, n].
    deltas: float32 [B, n, 4].
    anchors: float32 [n, 4], in pixels.
    is_anchor: bool [B, n]; the others are never sampled. None: all may be.
    boxes: float32 [B, G, 4], in pixels.
    labels: integers [B, G]; -1 where there is no object.
    positive_iou, negative_iou: of `matching.max_iou`.
    n_samples: anchors of an image.
    positive_fraction: part of them that is positive, at most.
    loss_group: of `groups.mean`.

  Returns:
    "objectness_loss", the cross-entropy, and "proposal_loss", the absolute
    errors of the deltas of positive anchors: float32 [].
  """
  if is_anchor is None:
    is_anchor = [jnp.ones(x.shape, bool) for x in logits]

  def of_image(key, logits, deltas, is_anchor, boxes, labels):
    matches = matching.max_iou(
        boxes, matching.is_object(boxes, labels), all_anchors, is_anchor,
        positive=positive_iou, negative=negative_iou,
        min_positive=negative_iou)
    index, positive, valid = sampling.sample(key, matches, n_samples,
                                             positive_fraction)
    return _sums(logits[index], deltas[index], all_anchors[index],
                 boxes[jnp.maximum(matches[index], 0)], positive, valid)

  all_anchors = jnp.concatenate(anchors)
  class_sums, box_sums, numbers = jax.vmap(of_image)(
      jax.random.split(key, len(boxes)),
      *(jnp.concatenate(x, 1) for x in (logits, deltas, is_anchor)), boxes,
      labels)
  return {"objectness_loss": groups.mean(class_sums, numbers, loss_group),
          "proposal_loss": groups.mean(box_sums, numbers, loss_group)}


def _sums(logits, deltas, anchors, boxes, positive, valid):
  """Sums of both losses over the sample of an image, and what divides them.

  What a row without that loss predicts is replaced before it is used, so that
  it gets no gradient, whatever it is.
  """
  logits = jnp.where(valid, logits, 0)
  class_losses = jax.nn.softplus(jnp.where(positive, -logits, logits))
  targets = box_ops.encode(
      anchors, jnp.where(positive[:, None], boxes, anchors))
  errors = jnp.abs(jnp.where(positive[:, None], deltas - targets, 0))
  number = (jnp.maximum(positive.sum(), 1)
            + jnp.maximum((valid & ~positive).sum(), 1))
  return jnp.where(valid, class_losses, 0).sum(), errors.sum(), number


def propose(logits: Levels, deltas: Levels, anchors: Levels,
            is_anchor: Levels | None, size: jax.Array, *, candidates: int,
            nms_iou: float, n_max: int) -> dict[str, jax.Array]:
  """Proposals of one image, in mmdetection's order, without a gradient.

  Each level gives its best anchors, without the boxes that have no area within
  the image, and of the rest those that no better one of the level covers. The
  best ones of all levels are proposals.

  Args:
    logits: float32 [n].
    deltas: float32 [n, 4].
    anchors: float32 [n, 4], in pixels.
    is_anchor: bool [n]; the others propose nothing. None: all may.
    size: [2], height and width of the image, which boxes are clipped to.
    candidates: anchors of a level.
    nms_iou: of `nms.kept`.
    n_max: P.

  Returns:
    By descending score: "boxes", float32 [P, 4], in pixels; "scores", float32
    [P]; "valid", bool [P], which of them are proposals. The others are 0.
  """
  if is_anchor is None:
    is_anchor = [jnp.ones(len(x), bool) for x in logits]
  n_rows = min(candidates, max(map(len, anchors)))
  found = []
  for logit, delta, anchor, exists in zip(logits, deltas, anchors, is_anchor):
    scores, index = lax.top_k(jnp.where(exists, jax.nn.sigmoid(logit), -1),
                              min(candidates, len(logit)))
    boxes = box_ops.decode(jnp.asarray(anchor)[index], delta[index], size)
    is_box = (scores >= 0) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
    found.append([jnp.pad(x, [(0, n_rows - len(x))] + [(0, 0)] * (x.ndim - 1))
                  for x in (boxes, scores, is_box)])
  boxes, scores, is_box = lax.stop_gradient(
      [jnp.stack(x) for x in zip(*found)])
  # All levels at once: each would have a loop of its own.
  kept = jax.vmap(functools.partial(nms_ops.kept, threshold=nms_iou))(
      boxes, is_box)
  scores = jnp.where(kept, scores, -1).reshape(-1)
  scores = jnp.pad(scores, (0, max(0, n_max - len(scores))),
                   constant_values=-1)
  scores, index = lax.top_k(scores, n_max)
  valid = scores >= 0
  boxes = boxes.reshape(-1, 4)[jnp.where(valid, index, 0)]
  return {"boxes": jnp.where(valid[:, None], boxes, 0),
          "scores": jnp.where(valid, scores, 0), "valid": valid}
