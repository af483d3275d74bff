"""Cases to compare with mmsegmentation. No torch, no jax.

As in `parity_cases`, both sides draw weights, images and labels, and a golden
file has outputs only. There "logits" are those of the decoder at the finest
stride, in evaluation mode; "features" are left out; "gradients" are those of
the sum of the losses, which the header has, in training mode, without dropout,
at the first size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import parity_cases

IGNORE = 255
NUM_CLASSES = 7
AUXILIARY_WEIGHT = 0.4
FPN_DIM, AUXILIARY_DIM, BATCH = 16, 12, 3
HEAD_DIMS = {"semantic_fpn": 12, "upernet": 16}
POOL_SIZES = (1, 2, 3, 6)

# One of them is a multiple of all strides.
SIZES = ((61, 50), (64, 96), (33, 107))


@dataclasses.dataclass(frozen=True)
class Case:
  """A head on a backbone.

  Attributes:
    head: as in `config.task`.
    model: our name of the backbone.
    overrides: arguments of our `create_model`.
    theirs: arguments of the backbone in mmsegmentation, or of the official
      code that trains with it.
    feature_norm: of the outputs.
    image_size: side of the square images that it is initialised with.
    n_blocks: to which each stage of theirs is cut; None: not.
  """

  head: str
  model: str
  overrides: Mapping[str, Any]
  theirs: Mapping[str, Any]
  feature_norm: str | None = None
  image_size: int = 64
  n_blocks: int | None = None

  @property
  def name(self) -> str:
    return f"{self.model}-{self.head}"

  @property
  def dims(self) -> tuple[int, ...]:
    """Channels of the backbone's outputs."""
    widths = self.overrides.get("dims") or self.overrides["widths"]
    return tuple(n * (4 if self.model == "resnet50" else 1) for n in widths)


_DIMS = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
_POOLFORMER = {
    "model": "poolformer_s12", "overrides": _DIMS, "feature_norm": "group_norm",
    "theirs": {"type": "PoolFormer", "layers": [1, 1, 1, 1],
               "embed_dims": [8, 12, 16, 24], "mlp_ratios": [4] * 4,
               "downsamples": [True] * 4, "fork_feat": True}}


def _resnet(depth, width):
  widths = tuple(width * 2**i for i in range(4))
  return {
      "model": f"resnet{depth}", "n_blocks": 1,
      "overrides": {"depths": (1,) * 4, "widths": widths, "stem": "3x3"},
      "theirs": {"type": "ResNetV1c", "depth": depth, "base_channels": width,
                 "stem_channels": width, "norm_cfg": {"type": "BN"},
                 "style": "pytorch", "contract_dilation": True}}


_PVT = {
    "model": "pvt_tiny",
    "overrides": {**_DIMS, "n_heads": (1, 2, 2, 3), "class_token": False},
    "theirs": {"type": "PyramidVisionTransformer", "img_size": 64,
               "patch_size": 4, "depths": [1, 1, 1, 1],
               "embed_dims": [8, 12, 16, 24], "num_heads": [1, 2, 2, 3],
               "mlp_ratios": [8, 8, 4, 4], "qkv_bias": True,
               "sr_ratios": [8, 4, 2, 1]}}

CASES = {case.name: case for case in (
    Case("semantic_fpn", **_POOLFORMER),
    Case("semantic_fpn", **_resnet(18, 8)),
    Case("semantic_fpn", **_PVT),
    Case("upernet", **_POOLFORMER),
    Case("upernet", **_resnet(50, 4)),
)}


def weights(shapes):
  """As `parity_cases.weights`."""
  return parity_cases.weights(shapes)


def images(size: tuple[int, int]) -> np.ndarray:
  """[BATCH, *size, 3] float32."""
  return parity_cases.images(BATCH, *size)


def labels(size: tuple[int, int]) -> np.ndarray:
  """[BATCH, *size] uint8; blocks of a class, a quarter of them to ignore."""
  rng = np.random.default_rng(size)
  small = rng.integers(0, NUM_CLASSES, (BATCH, *(-(-n // 5) for n in size)))
  small[rng.random(small.shape) < 0.25] = IGNORE
  return small.repeat(5, 1).repeat(5, 2)[:, :size[0], :size[1]].astype(np.uint8)
