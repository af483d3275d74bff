"""Cases in which operations of detection are compared with others'; NumPy."""

import functools
import pathlib
from typing import NamedTuple

import numpy as np

N_CASES = 1000
N_BOXES = 64
# Some are not exact in float32, and lie on either side of the nearest one.
NMS_IOUS = (0.0, 0.3, 0.5, 0.6, 0.7, 1.0)
POSITIVE_NEGATIVE = ((0.5, 0.4), (0.5, 0.5), (0.7, 0.3))
N_ANCHORS, N_OBJECTS = 96, 12

# A pyramid for a canvas of 32 x 64 pixels.
STRIDES = (8, 16, 32, 64, 128)
SHAPES = ((4, 8), (2, 4), (1, 2), (1, 1), (1, 1))
N_CLASSES = 3
CANDIDATES, SCORE_THRESHOLD, NMS_IOU, MAX_DETECTIONS = 40, 0.3, 0.5, 20


@functools.cache
def golden():
  """What tests/golden/make_detection_ops.py has written."""
  path = pathlib.Path(__file__).parent / "golden" / "detection_ops.npz"
  with np.load(path) as file:
    return dict(file)


class Nms(NamedTuple):
  """Arrays [N_CASES, N_BOXES, ...], and an index of NMS_IOUS for each case."""

  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  is_valid: np.ndarray
  iou: np.ndarray


class Assignment(NamedTuple):
  """Arrays [N_CASES, ...], and an index of POSITIVE_NEGATIVE for each case."""

  boxes: np.ndarray
  is_box: np.ndarray
  anchors: np.ndarray
  is_anchor: np.ndarray
  thresholds: np.ndarray


def around(rng, n, kind):
  """n boxes: anywhere, in clusters, on a grid of whole pixels, or tiny."""
  if kind == "grid":  # Many equal IoUs, many of them simple fractions.
    corner = rng.integers(0, 8, (n, 2)) * 2
    return np.concatenate([corner, corner + rng.integers(0, 5, (n, 2)) * 2], 1)
  center = rng.uniform(0, 100, (n, 2))
  sides = np.exp(rng.uniform(1, 4, (n, 2)))
  if kind == "clusters":
    which = rng.integers(0, 4, n)
    center = center[which] + rng.normal(0, 3, (n, 2))
    sides = sides[which] * np.exp(rng.normal(0, 0.2, (n, 2)))
  if kind == "tiny":  # Unions far below a pixel, some of them 0.
    center, sides = center / 1e6, sides / 1e6 * rng.integers(0, 2, (n, 1))
  return np.concatenate([center - sides / 2, center + sides / 2], 1)


KINDS = ("anywhere", "clusters", "grid", "tiny")


@functools.cache
def nms() -> Nms:
  rng = np.random.default_rng(0)
  cases = []
  for i in range(N_CASES):
    boxes = around(rng, N_BOXES, KINDS[i % len(KINDS)]).astype(np.float32)
    if i % 3 == 0:  # Copies.
      boxes[N_BOXES // 2:] = boxes[:N_BOXES // 2]
    scores = rng.uniform(0, 1, N_BOXES)
    if i % 5 == 0:  # Ties.
      scores = scores.round(1)
    labels = rng.integers(0, (1, 2, 5)[i // 7 % 3], N_BOXES)
    if i % 11 == 0:  # Padding at the end, up to all boxes.
      is_valid = np.arange(N_BOXES) < rng.integers(0, N_BOXES + 1)
    else:
      is_valid = rng.uniform(0, 1, N_BOXES) < (0.5, 0.9, 1.0)[i % 3]
    cases.append(Nms(boxes, scores.astype(np.float32), labels.astype(np.int32),
                     is_valid, np.int32(rng.integers(len(NMS_IOUS)))))
  return Nms(*map(np.stack, zip(*cases)))


@functools.cache
def assignment() -> Assignment:
  rng = np.random.default_rng(1)
  cases = []
  for i in range(N_CASES):
    kind = KINDS[i % 3]
    anchors = around(rng, N_ANCHORS, kind)
    if kind == "grid":  # No empty ones; objects may be empty.
      anchors[:, 2:] += 2
    boxes = around(rng, N_OBJECTS, kind)
    if i % 4 == 0:  # Objects that are anchors, and twice the same object.
      boxes[:4] = anchors[rng.integers(0, N_ANCHORS, 4)]
      boxes[4:6] = boxes[:2]
    if i % 5 == 0:  # One that overlaps no anchor.
      boxes[rng.integers(N_OBJECTS)] += 1000
    is_box = np.arange(N_OBJECTS) < rng.integers(0, N_OBJECTS + 1)
    if i % 7 == 0:
      is_box = rng.permutation(is_box)
    if i % 2 == 0:
      boxes[~is_box] = 0
    is_anchor = rng.uniform(0, 1, N_ANCHORS) < (0.6, 1.0, 1.0, 0.02)[i // 3 % 4]
    if i % 50 == 0:
      is_anchor[:] = False
    cases.append(Assignment(
        boxes.astype(np.float32), is_box, anchors.astype(np.float32), is_anchor,
        np.int32(rng.integers(len(POSITIVE_NEGATIVE)))))
  return Assignment(*map(np.stack, zip(*cases)))


class Batch(NamedTuple):
  """Predictions by level, and two images with up to 6 objects."""

  logits: list[np.ndarray]  # [2, n, N_CLASSES]
  deltas: list[np.ndarray]  # [2, n, 4]
  boxes: np.ndarray
  labels: np.ndarray
  sizes: np.ndarray  # Of the images, which are padded to multiples of 32.


def batches() -> dict[str, Batch]:
  """Batches that RetinaNet's loss and detections are compared on."""
  rng = np.random.default_rng(2)

  def batch(n_objects, sizes=((30, 61), (32, 30)), round_to=None, spread=1.5):
    logits, deltas = [], []
    for h, w in SHAPES:
      n = h * w * 9
      logit = rng.normal(-1.5, spread, (2, n, N_CLASSES))
      if round_to:  # Equal scores.
        logit = np.round(logit / round_to) * round_to
      logits.append(logit.astype(np.float32))
      deltas.append(rng.normal(0, 0.4, (2, n, 4)).astype(np.float32))
    boxes = np.zeros((2, 6, 4), np.float32)
    labels = np.full((2, 6), -1, np.int32)
    for i, (n, (height, width)) in enumerate(zip(n_objects, sizes)):
      center = rng.uniform(0, 1, (n, 2)) * (width, height)
      half = np.exp(rng.uniform(0.5, 3, (n, 2)))
      found = np.concatenate([center - half, center + half], 1)
      boxes[i, :n] = found.clip(0, [width, height] * 2)
      labels[i, :n] = rng.integers(0, N_CLASSES, n)
    return Batch(logits, deltas, boxes, labels, np.array(sizes, np.int32))

  return {"objects": batch((6, 3)), "one image is empty": batch((0, 2)),
          "both are empty": batch((0, 0)),
          "extreme logits": batch((4, 4), spread=60),
          "equal scores": batch((5, 1), ((32, 64), (17, 64)), round_to=0.5)}


def padded(size):
  """Height and width up to which anchors are used."""
  return tuple(-(-int(side) // 32) * 32 for side in size)
