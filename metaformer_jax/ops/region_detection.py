"""Losses and detections of a detector that judges regions: the second stage.

Faster R-CNN (arXiv 1506.01497) and Mask R-CNN (arXiv 1703.06870), as
mmdetection 2.19 computes them (models/roi_heads). A region, or RoI, is a box in
which a head predicts a class of C or the background, which is class C, a box of
each class, and a mask of each class.
"""

import jax
import jax.numpy as jnp

from metaformer_jax.ops import boxes as box_ops
from metaformer_jax.ops import groups, matching, sampling
from metaformer_jax.ops import nms as nms_ops

# What differences between a region and its object are divided by.
STDS = (0.1, 0.1, 0.2, 0.2)


def sample_rois(key: jax.Array, proposals: jax.Array, valid: jax.Array,
                boxes: jax.Array, labels: jax.Array, *, iou: float, n: int,
                positive_fraction: float,
                low_quality: bool) -> dict[str, jax.Array]:
  """Regions of one image that the second stage is trained on.

  They are drawn among the proposals and the objects themselves. A proposal
  with at least that IoU with an object is positive, and the others are
  negative. Boxes without area are left out. No gradient goes through them.

  Args:
    key: random key.
    proposals: float32 [P, 4], in pixels.
    valid: bool [P], which of them are proposals.
    boxes: float32 [G, 4], in pixels.
    labels: integers [G]; -1 where there is no object.
    iou: `positive`, `negative` and `min_positive` of `matching.max_iou`.
    n: R, how many are drawn.
    positive_fraction: of `sampling.sample`.
    low_quality: of `matching.max_iou`. mmdetection's settings have it for Mask
      R-CNN, and not for Faster R-CNN.

  Returns:
    "boxes": float32 [R, 4], in pixels, positive ones first; "index": int32 [R],
    their objects, 0 for negative ones; "is_positive", bool [R]; "is_valid",
    bool [R], false where there is none left: such boxes are 0.
  """
  is_box = matching.is_object(boxes, labels)
  matches = matching.max_iou(
      boxes, is_box, proposals, valid, positive=iou, negative=iou,
      min_positive=iou, low_quality=low_quality)
  own = jnp.where(is_box, jnp.arange(len(boxes)), matching.IGNORED)
  matches = jnp.concatenate([own.astype(jnp.int32), matches])
  drawn, is_positive, is_valid = sampling.sample(key, matches, n,
                                                 positive_fraction)
  rois = jnp.concatenate([boxes, proposals])[drawn]
  return jax.lax.stop_gradient({
      "boxes": jnp.where(is_valid[:, None], rois, 0),
      "index": jnp.where(is_positive, matches[drawn], 0),
      "is_positive": is_positive, "is_valid": is_valid})


def box_loss(logits: jax.Array, deltas: jax.Array, rois: dict[str, jax.Array],
             boxes: jax.Array, labels: jax.Array,
             loss_group: int | None = None) -> dict[str, jax.Array]:
  """Loss of the classes of regions, and of the boxes of the positive ones.

  Sums over the regions of the images of a group are divided by the group's
  number of regions. The result is the mean over the groups.

  Args:
    logits: float32 [B, R, C + 1].
    deltas: float32 [B, R, C, 4].
    rois: of `sample_rois`, for each image: [B, R, ...].
    boxes: float32 [B, G, 4], in pixels.
    labels: integers [B, G].
    loss_group: of `groups.mean`.

  Returns:
    "class_loss", the cross-entropy, and "box_loss", the absolute errors of the
    deltas of the object's class: float32 [].
  """
  n_classes = deltas.shape[-2]
  positive, valid = rois["is_positive"], rois["is_valid"]
  label = jnp.where(positive, jnp.take_along_axis(labels, rois["index"], 1),
                    n_classes)
  logits = jnp.where(valid[..., None], logits, 0)
  class_losses = jax.nn.logsumexp(logits, -1) - _of_class(logits, label)

  def or_unit(x):  # Of other rows, which could be empty.
    return jnp.where(positive[..., None], x, jnp.array([[[0.0, 0, 1, 1]]]))

  objects = jnp.take_along_axis(boxes, rois["index"][..., None], 1)
  targets = box_ops.encode(or_unit(rois["boxes"]), or_unit(objects), STDS)
  errors = _of_class(deltas.swapaxes(-1, -2), label[..., None]) - targets
  errors = jnp.abs(jnp.where(positive[..., None], errors, 0))
  number = valid.sum(1)
  return {"class_loss": groups.mean(
              jnp.where(valid, class_losses, 0).sum(1), number, loss_group),
          "box_loss": groups.mean(errors.sum((1, 2)), number, loss_group)}


def mask_loss(logits: jax.Array, targets: jax.Array, labels: jax.Array,
              is_positive: jax.Array,
              loss_group: int | None = None) -> jax.Array:
  """Cross-entropy of the masks of the regions' classes.

  The mean over the pixels of a group's positive regions, 0 if it has none; of
  the groups, the mean.

  Args:
    logits: float32 [B, R, h, w, C].
    targets: float32 [B, R, h, w], 0 or 1.
    labels: integers [B, R], classes of the regions' objects.
    is_positive: bool [B, R]; the others have no loss.
    loss_group: of `groups.mean`.

  Returns:
    float32 [].
  """
  positive = is_positive[..., None, None]
  logits = jnp.where(positive, _of_class(logits, labels[..., None, None]), 0)
  targets = jnp.where(positive, targets, 0)
  losses = jnp.where(positive, jax.nn.softplus(logits) - logits * targets, 0)
  return groups.mean(losses.mean((2, 3)).sum(1), is_positive.sum(1), loss_group)


def _of_class(x: jax.Array, label: jax.Array) -> jax.Array:
  """x [..., C] at integers [...]: [...]; 0 for labels that are no class.

  A TPU selects and adds faster than it gathers single values. What is not
  selected gets no gradient, whatever it is.
  """
  is_class = label[..., None] == jnp.arange(x.shape[-1]).reshape(
      (1,) * label.ndim + (-1,))
  return jnp.where(is_class, x, 0).sum(-1)


def detect(logits: jax.Array, deltas: jax.Array, rois: jax.Array,
           valid: jax.Array, size: jax.Array, *, score_threshold: float,
           nms_iou: float, max_detections: int) -> dict[str, jax.Array]:
  """Detections of one image, in mmdetection's order.

  Of all pairs of a region and a class with a higher score than the threshold,
  those that no better one of their class covers are detections.

  Args:
    logits: float32 [R, C + 1].
    deltas: float32 [R, C, 4].
    rois: float32 [R, 4], in pixels.
    valid: bool [R]; the others detect nothing.
    size: [2], height and width of the image, which boxes are clipped to.
    score_threshold: pairs have a higher score.
    nms_iou: of `nms.nms`.
    max_detections: K.

  Returns:
    As `nms.detections`.
  """
  n_rois, n_classes, _ = deltas.shape
  scores = jax.nn.softmax(logits)[:, :-1].reshape(-1)
  labels = jnp.tile(jnp.arange(n_classes), n_rois)
  boxes = box_ops.decode(jnp.repeat(rois, n_classes, axis=0),
                         deltas.reshape(-1, 4), size, STDS)
  is_pair = jnp.repeat(valid, n_classes) & (scores > score_threshold)
  return nms_ops.detections(boxes, scores, labels, is_pair, nms_iou,
                            max_detections)
