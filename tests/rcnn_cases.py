"""Cases of Mask R-CNN to compare with mmdetection; NumPy.

Faster R-CNN is the same without masks, and so has no files of its own.

Images, objects and weights are those of `detector_cases`. Nothing is drawn at
random: the samplers may take more than there is. In a golden file
- "logits" are those of all anchors, each followed by its deltas: of the image
  with the number of the size, [1, n, 5];
- "gradients" are those of the sum of mmdetection's training losses, which the
  header has as "losses", at the first size;
- "features" has at the first size "box_head" [n, classes + 1 + 4 classes] and
  "mask_head" [n, 28, 28, classes], of `features`, and "head_gradients", the
  `parity_cases.sketch` of each trained tensor for the sum of the losses on
  these and of the mean squares of logits and deltas; the header has these
  parts as "head_losses";
- and at the last size, of the first image alone, "proposals" [n, 5], boxes and
  scores; "detections" [n, 6], boxes in pixels of the original image, scores and
  labels; "masks" [n, *ORIGINAL_SIZE], 0 or 1.
"""

import dataclasses

import detector_cases
import numpy as np

CANDIDATES, PROPOSALS, MAX_DETECTIONS = 50, 24, 30
# More than there are anchors, and proposals and objects.
ANCHOR_SAMPLES, ROI_SAMPLES = 4096, 512
# Before it was resized to `detector_cases.IMAGE_SIZE`.
ORIGINAL_SIZE = (115, 75)

CASES = {case.name: case for case in (
    dataclasses.replace(case, head="mask_rcnn")
    for case in detector_cases.CASES.values())}

# Of each row of `features`: a class, or the background; and the box.
N_BOXES = 4
LABELS = np.array([2, 3, 0, 1])
TARGETS = np.array([[0.5, -1, 2, 0.25], [0] * 4, [-0.75, 0, 1, -2], [1] * 4],
                   np.float32)


def features(side: int) -> np.ndarray:
  """Of boxes: [N_BOXES, side, side, FPN_DIM], float32."""
  rng = np.random.default_rng(side)
  return rng.standard_normal(
      (N_BOXES, side, side, detector_cases.FPN_DIM)).astype(np.float32)


def mask_targets() -> np.ndarray:
  """Of the rows that are no background: [N_BOXES - 1, 28, 28], 0 or 1."""
  rng = np.random.default_rng(0)
  return rng.integers(0, 2, (N_BOXES - 1, 28, 28)).astype(np.float32)


def masks(i: int) -> np.ndarray:
  """Of the objects of an image of the first size: uint8 [n, h, w], ellipses."""
  y, x = (np.arange(n) + 0.5 for n in detector_cases.SIZES[0])
  found = []
  for x1, y1, x2, y2 in detector_cases.BOXES[i]:
    across = ((2 * x - x1 - x2) / (x2 - x1))**2
    down = ((2 * y - y1 - y2) / (y2 - y1))**2
    found.append(across + down[:, None] <= 1)
  return np.array(found, np.uint8).reshape(-1, len(y), len(x))
