"""Operations of detection in plain NumPy: mmdetection 2.19's rules, as written.

One image at a time, with loops, and without the boxes and anchors that are only
padding.
"""

import numpy as np


def iou(a, b, min_union=1e-6):
  """float32 [N, 4] and [M, 4] -> [N, M], each operation rounded."""
  area_a, area_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
  low = np.maximum(a[:, None, :2], b[None, :, :2])
  high = np.minimum(a[:, None, 2:], b[None, :, 2:])
  sides = np.maximum(high - low, 0)
  both = sides[..., 0] * sides[..., 1]
  union = area_a[:, None] + area_b[None] - both
  return both / np.maximum(union, np.float32(min_union))


def assign(boxes, anchors, positive, negative, min_positive=0.0,
           low_quality=True):
  """MaxIoUAssigner: index of a box, -1 negative, -2 ignored."""
  found = np.full(len(anchors), -2)
  if not len(boxes):
    found[:] = -1
    return found
  if not len(anchors):
    return found
  overlaps = iou(boxes, anchors)
  best = overlaps.max(0)
  found[best < np.float32(negative)] = -1
  is_positive = best >= np.float32(positive)
  found[is_positive] = overlaps.argmax(0)[is_positive]
  for i, row in enumerate(overlaps):
    if low_quality and row.max() >= np.float32(min_positive):
      found[row == row.max()] = i
  return found


def nms(boxes, scores, labels, threshold):
  """Indices of the boxes that are kept, by descending score."""
  kept = []
  for i in np.argsort(-scores, kind="stable"):
    rivals = [j for j in kept if labels[j] == labels[i]]
    overlaps = iou(boxes[i][None], boxes[rivals], np.finfo(np.float32).tiny)
    if not (overlaps.astype(np.float64) > threshold).any():
      kept.append(i)
  return kept


def base_anchors(stride, scale, octaves, ratios):
  """AnchorGenerator's anchors of one cell, in float32."""
  found = []
  for ratio in np.array(ratios, np.float32):
    height = np.sqrt(ratio)
    for i in range(octaves):
      size = np.float32(scale * 2 ** (i / octaves))
      w = np.float32(stride) * (np.float32(1) / height) * size
      h = np.float32(stride) * height * size
      half = np.float32(0.5)
      found.append([-half * w, -half * h, half * w, half * h])
  return np.array(found, np.float32)


def grid_anchors(shape, stride, base):
  found = [box + np.array([x, y, x, y], np.float32) * np.float32(stride)
           for y in range(shape[0]) for x in range(shape[1]) for box in base]
  return np.array(found, np.float32)


def encode(anchor, box):
  """DeltaXYWHBBoxCoder of one box, in float64."""
  (px, py, pw, ph), (gx, gy, gw, gh) = (
      ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)
      for x1, y1, x2, y2 in (map(float, anchor), map(float, box)))
  return np.array([(gx - px) / pw, (gy - py) / ph, np.log(gw / pw),
                   np.log(gh / ph)])


def decode(anchor, delta, size):
  x1, y1, x2, y2 = map(float, anchor)
  dx, dy, dw, dh = map(float, delta)
  limit = np.log(1000 / 16)
  w, h = ((x2 - x1) * np.exp(np.clip(dw, -limit, limit)),
          (y2 - y1) * np.exp(np.clip(dh, -limit, limit)))
  x, y = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1)
  box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
  return box.clip(0, [size[1], size[0]] * 2)


def best_pairs(scores, n_max):
  """filter_scores_and_topk without a threshold: scores, anchors, classes."""
  order = np.argsort(-scores.ravel(), kind="stable")[:n_max]
  return scores.ravel()[order], *np.unravel_index(order, scores.shape)
