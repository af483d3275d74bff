"""Cases to compare with mmdetection. No torch, no jax.

As in `head_cases`, both sides draw weights and images. In a golden file
"logits" are those of all anchors, each followed by its deltas, in evaluation
mode; "features" has only "detections", at the last size, of the first image:
boxes, scores and labels; "gradients" are those of the sum of the losses, which
the header has, at the first size, in training mode.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import parity_cases

NUM_CLASSES, FPN_DIM, HEAD_DIM, HEAD_DEPTH, BATCH = 3, 16, 12, 2, 2
BOX_DIM = 20  # R-CNN.

# Multiples of 32, to which mmdetection pads; both orientations, and levels with
# an odd number of places.
SIZES = ((64, 96), (96, 64))
# Height and width of the image in the last of these.
IMAGE_SIZE = (77, 50)
# Few, so that each level leaves some out.
CANDIDATES, MAX_DETECTIONS = 100, 50

# Of the first size: image by image, [x1, y1, x2, y2] and labels.
BOXES = (
    np.array([[3.5, 2.25, 40.75, 37.5], [60, 10, 95.5, 63.25],
              [30.25, 31, 44.5, 48.75], [0, 0, 96, 64]], np.float32),
    np.zeros((0, 4), np.float32))
LABELS = (np.array([2, 0, 1, 1]), np.zeros(0, int))


@dataclasses.dataclass(frozen=True)
class Case:
  """A detector on a backbone; `head_cases.Case` describes the attributes."""

  model: str
  overrides: Mapping[str, Any]
  theirs: Mapping[str, Any]
  feature_norm: str | None = None
  image_size: int = 64
  n_blocks: int | None = None
  frozen_batch_norm: bool = False
  head: str = "retinanet"

  @property
  def name(self) -> str:
    return f"{self.model}-{self.head}"

  @property
  def dims(self) -> tuple[int, ...]:
    """Channels of the backbone's outputs."""
    widths = self.overrides.get("dims") or self.overrides["widths"]
    return tuple(n * (4 if self.model == "resnet50" else 1) for n in widths)


_DIMS = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}

CASES = {case.name: case for case in (
    Case("poolformer_s12", _DIMS, {
        "type": "PoolFormer", "layers": [1, 1, 1, 1],
        "embed_dims": [8, 12, 16, 24], "mlp_ratios": [4] * 4,
        "downsamples": [True] * 4, "fork_feat": True},
         feature_norm="group_norm"),
    Case("resnet50", {"depths": (1,) * 4, "widths": (4, 8, 16, 32)}, {
        "type": "ResNet", "depth": 50, "base_channels": 4, "stem_channels": 4,
        "frozen_stages": 1, "norm_eval": True, "style": "pytorch"},
         n_blocks=1, frozen_batch_norm=True),
    Case("pvt_tiny",
         {**_DIMS, "n_heads": (1, 2, 2, 3), "class_token": False}, {
             "type": "PyramidVisionTransformer", "img_size": 64,
             "patch_size": 4, "depths": [1, 1, 1, 1],
             "embed_dims": [8, 12, 16, 24], "num_heads": [1, 2, 2, 3],
             "mlp_ratios": [8, 8, 4, 4], "qkv_bias": True,
             "sr_ratios": [8, 4, 2, 1]}),
)}


def weights(shapes):
  """As `parity_cases.weights`."""
  return parity_cases.weights(shapes)


def images(size: tuple[int, int]) -> np.ndarray:
  """[BATCH, *size, 3] float32; at the last size zero beside the image."""
  found = parity_cases.images(BATCH, *size)
  if size == SIZES[-1]:
    found[:, IMAGE_SIZE[0]:] = found[:, :, IMAGE_SIZE[1]:] = 0
  return found
