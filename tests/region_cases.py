"""Cases in which the operations of R-CNN are compared with others'; NumPy."""

import functools
import pathlib
from typing import NamedTuple

import detection_cases
import numpy as np

# A pyramid for a canvas of 32 x 64 pixels.
STRIDES = (4, 8, 16, 32, 64)
SHAPES = ((8, 16), (4, 8), (2, 4), (1, 2), (1, 1))
CANDIDATES, PROPOSAL_IOU, N_PROPOSALS = 40, 0.7, 60
N_CLASSES, MASK = 3, 5
SCORE_THRESHOLD, NMS_IOU, MAX_DETECTIONS = 0.3, 0.5, 20

# Keywords of `matching.max_iou`, and how many cases of `detection_cases` they
# are tested on.
MATCHING = {
    "proposals": {"positive": 0.7, "negative": 0.3, "min_positive": 0.3},
    "mask_rcnn": {"positive": 0.5, "negative": 0.5, "min_positive": 0.5},
    "faster_rcnn": {"positive": 0.5, "negative": 0.5, "min_positive": 0.5,
                    "low_quality": False},
}
N_MATCHING = 200


@functools.cache
def golden():
  """What tests/golden/make_region_ops.py has written."""
  path = pathlib.Path(__file__).parent / "golden" / "region_ops.npz"
  with np.load(path) as file:
    return dict(file)


class Batch(NamedTuple):
  """Outputs of the first stage by level, and two images with objects."""

  logits: list[np.ndarray]  # [2, n]
  deltas: list[np.ndarray]  # [2, n, 4]
  boxes: np.ndarray
  labels: np.ndarray
  sizes: np.ndarray  # Of the images, which are padded to multiples of 32.


def objects(rng, numbers, sizes):
  """Up to 6 boxes of each image, and their labels, -1 for the rest."""
  boxes = np.zeros((len(sizes), 6, 4), np.float32)
  labels = np.full((len(sizes), 6), -1, np.int32)
  for i, (n, (height, width)) in enumerate(zip(numbers, sizes)):
    center = rng.uniform(0, 1, (n, 2)) * (width, height)
    half = np.exp(rng.uniform(1, 3, (n, 2)))
    found = np.concatenate([center - half, center + half], 1)
    boxes[i, :n] = found.clip(0, [width, height] * 2)
    labels[i, :n] = rng.integers(0, N_CLASSES, n)
  return boxes, labels


def batches() -> dict[str, Batch]:
  rng = np.random.default_rng(0)

  def batch(numbers, sizes=((30, 61), (32, 30)), round_to=None, shift=0):
    logits, deltas = [], []
    for h, w in SHAPES:
      logit = rng.normal(-1, 2, (2, h * w * 3))
      if round_to:  # Equal scores.
        logit = np.round(logit / round_to) * round_to
      logits.append(logit.astype(np.float32))
      deltas.append((rng.normal(0, 0.3, (2, h * w * 3, 4))
                     - [shift, 0, 0, 0]).astype(np.float32))
    return Batch(logits, deltas, *objects(rng, numbers, sizes),
                 np.array(sizes, np.int32))

  return {"objects": batch((6, 3)), "one image is empty": batch((0, 2)),
          "both are empty": batch((0, 0)),
          "equal scores": batch((5, 1), ((32, 64), (17, 64)), round_to=0.5),
          "most boxes are outside": batch((2, 2), shift=1)}


class Regions(NamedTuple):
  """Proposals of two images with objects."""

  proposals: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  size: tuple[int, int]


N_REGIONS = 40
# More than there are, so that all of them are drawn.
N_DRAWN = 200


def regions() -> dict[str, Regions]:
  rng = np.random.default_rng(1)
  size = (60, 90)

  def case(numbers, spread):
    boxes, labels = objects(rng, numbers, (size, size))
    start = np.zeros((2, N_REGIONS, 4))
    for i, n in enumerate(numbers):
      kind = "clusters" if i else "anywhere"
      start[i] = detection_cases.around(rng, N_REGIONS, kind)
      if n:
        start[i, ::2] = boxes[i, rng.integers(0, n, N_REGIONS // 2)]
    start += rng.normal(0, spread, start.shape)
    low, high = start[..., :2], np.maximum(start[..., 2:], start[..., :2] + 1)
    return Regions(np.concatenate([low, high], -1).astype(np.float32), boxes,
                   labels, size)

  return {"objects": case((6, 3), 2.0), "none is positive": case((4, 1), 30.0),
          "no objects": case((0, 0), 1.0)}


def predictions(boxes):
  """Logits and deltas of regions [..., 4], which depend on nothing else.

  So they are the same in whatever order the regions are drawn.
  """
  rng = np.random.default_rng(2)

  def of(n):
    waves = rng.normal(0, 0.3, (4, n)), rng.uniform(0, 6, n)
    return (2 * np.sin(boxes @ waves[0] + waves[1])).astype(np.float32)

  logits, deltas = of(N_CLASSES + 1), of(N_CLASSES * 4)
  return logits, deltas.reshape(*boxes.shape[:-1], N_CLASSES, 4)


def masks():
  """Logits [2, 7, h, w, C], targets, labels, and which of them are positive."""
  rng = np.random.default_rng(3)
  logits = rng.normal(0, 3, (2, 7, MASK, MASK, N_CLASSES)).astype(np.float32)
  targets = rng.integers(0, 2, logits.shape[:-1]).astype(np.float32)
  labels = rng.integers(0, N_CLASSES, (2, 7)).astype(np.int32)
  return logits, targets, labels, np.arange(7) < np.array([[5], [2]])
