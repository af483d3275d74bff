"""Images on canvases, for detectors: what networks see, and its anchors."""

import jax
import numpy as np

from metaformer_jax.config.schema import Experiment
from metaformer_jax.config.tasks import detection
from metaformer_jax.ops import anchors, resize
from metaformer_jax.tasks import base, dense


def inputs(cfg: Experiment, batch: base.Batch) -> tuple[jax.Array, jax.Array]:
  """Normalised images, [B, H, W, 3], and the mask of what is no padding.

  The sides of images are first rounded up, with pixels of value 0 after the
  normalisation, as mmdetection's Pad does; only what is beyond is masked.
  """
  sizes = batch["size"]
  x = dense.normalized(cfg, batch["image"], sizes)
  return x, resize.mask(padded(sizes), *x.shape[1:3])


def padded(sizes: jax.Array) -> jax.Array:
  """Sides of images, int32 [..., 2], rounded up to multiples of 32."""
  return -(-sizes // detection.ALIGNED) * detection.ALIGNED


def anchor_levels(task: detection.Detection, batch: base.Batch,
                  strides: tuple[int, ...]) -> list[np.ndarray]:
  """Anchors of each level, float32 [n, 4], on the canvas of a batch."""
  shape = batch["image"].shape[1:3]
  return [anchors.grid(
      tuple(-(-side // stride) for side in shape), stride,
      anchors.base(stride, task.anchor_scale, task.anchor_octaves,
                   task.anchor_ratios))
          for stride in strides]
