"""COCO's average precision in plain NumPy, from its definition.

As https://cocodataset.org/#detection-eval says it: for each class, IoU and
range of areas, detections take objects greedily, best score first; precision is
made monotone and averaged over 101 recalls.
"""

import numpy as np

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"": (0, 1e10), "_small": (0, 32**2), "_medium": (32**2, 96**2),
         "_large": (96**2, 1e10)}


def measures(images):
  """The measures of coco_ap by name.

  Args:
    images: for each (objects, detections): objects are (class, box, area,
      is_crowd), detections (class, box, score); boxes are x1, y1, x2, y2.
  """
  classes = {x[0] for objects, _ in images for x in objects}
  found = {}
  for name, area in AREAS.items():
    table = np.array([[average_precision(images, c, iou, area) for iou in IOUS]
                      for c in classes]).reshape(-1, 10)
    table = table[~np.isnan(table).any(1)]
    found["box_ap" + name] = table.mean() if table.size else np.nan
    if not name:
      found["box_ap50"], found["box_ap75"] = (
          table[:, i].mean() if table.size else np.nan for i in (0, 5))
  return found


def average_precision(images, label, threshold, area):
  """Of one class; NaN if it has no object in the range of areas."""
  ranked, n_objects = [], 0
  for objects, detections in images:
    objects = [x[1:] for x in objects if x[0] == label]
    counts = [not crowd and area[0] <= size <= area[1]
              for _, size, crowd in objects]
    n_objects += sum(counts)
    detections = sorted((x[1:] for x in detections if x[0] == label),
                        key=lambda x: -x[1])[:100]
    taken = set()
    for box, score in detections:
      match = best(box, objects, counts, taken, threshold)
      if match is None:
        size = (box[2] - box[0]) * (box[3] - box[1])
        if area[0] <= size <= area[1]:
          ranked.append((score, False))
        continue
      if not objects[match][2]:
        taken.add(match)
      if counts[match]:
        ranked.append((score, True))
  return interpolated(ranked, n_objects) if n_objects else np.nan


def best(box, objects, counts, taken, threshold):
  """The object that a detection takes: one that counts, if any fits."""
  for wanted in (True, False):
    overlaps = [(overlap(box, x[0], x[2]), i) for i, x in enumerate(objects)
                if counts[i] == wanted and i not in taken]
    overlaps = [x for x in overlaps if x[0] >= threshold]
    if overlaps:
      return max(overlaps)[1]  # The later one of equal ones.
  return None


def overlap(a, b, is_crowd):
  """IoU; in a crowd, the part of the detection that is inside."""
  sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
  common = np.prod(np.maximum(sides, 0))
  area_a, area_b = (np.prod(x[2:] - x[:2]) for x in (a, b))
  return common / (area_a if is_crowd else area_a + area_b - common)


def interpolated(ranked, n_objects):
  right = np.array([hit for _, hit in sorted(ranked, key=lambda x: -x[0])])
  hits = np.cumsum(right) if len(right) else np.zeros(0)
  recall, precision = hits / n_objects, hits / np.arange(1, len(hits) + 1)
  return np.mean([max(precision[recall >= r], default=0) for r in RECALLS])
