"""Operations of R-CNN in plain NumPy: mmdetection 2.19's rules, as written."""

import numpy as np
import plain_detection as plain


def propose(logits, deltas, anchors, size, candidates, threshold, n_max):
  """RPNHead._get_bboxes_single of one image: [n, 4] and [n] by score."""
  boxes, scores, levels = [], [], []
  for i, level in enumerate(zip(logits, deltas, anchors)):
    for j in np.argsort(-level[0], kind="stable")[:candidates]:
      box = plain.decode(level[2][j], level[1][j], size).astype(np.float32)
      if (box[2:] > box[:2]).all():
        boxes.append(box)
        scores.append(1 / (1 + np.exp(-np.float64(level[0][j]))))
        levels.append(i)
  kept = plain.nms(np.array(boxes), np.array(scores), levels, threshold)[:n_max]
  return np.array(boxes)[kept], np.array(scores)[kept]


def cross_entropy(logits, labels):
  """Of each row, in float64."""
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  rows = np.arange(len(labels))
  return np.log(np.exp(logits).sum(-1)) - logits[rows, labels]


def box_loss(logits, deltas, rois, is_valid, is_positive, index, boxes, labels):
  """Sums of both losses over the regions of an image, and their number."""
  class_sum = box_sum = 0.0
  for i in np.flatnonzero(is_valid):
    label = labels[index[i]] if is_positive[i] else deltas.shape[1]
    class_sum += cross_entropy(logits[i][None], [label])[0]
    if is_positive[i]:
      target = plain.encode(rois[i], boxes[index[i]])
      target = target / (0.1, 0.1, 0.2, 0.2)
      box_sum += np.abs(deltas[i, label] - target).sum()
  return class_sum, box_sum, is_valid.sum()
