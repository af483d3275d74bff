"""Targets of the mask head: the objects' masks within boxes."""

import jax
import jax.numpy as jnp
from jax import lax

from metaformer_jax.ops import boxes as box_ops
from metaformer_jax.ops import roi_align


def coverage(masks: jax.Array, frames: jax.Array, index: jax.Array,
             boxes: jax.Array, size: jax.Array, out: int = 28) -> jax.Array:
  """The part of each bin of each box that an object's mask covers.

  It is RoIAlign of the mask of the whole image, as mmdetection 2.19 computes it
  (core/mask/mask_target.py and structures.py), but of a crop: samples lie where
  they are in the image, and outside of the crop there are zeros.

  Args:
    masks: uint8 [G, M, M], 0 or 1, the crops.
    frames: float32 [G, 4], the parts of the image, in pixels, that these are
      of. If their sides are M pixels and their corners whole ones, then the
      crops are exact; otherwise they are interpolated.
    index: int32 [R], the object of each box.
    boxes: float32 [R, 4], in pixels; they are clipped to the image.
    size: [2], height and width of the image, with its padding to a multiple of
      32, as the bitmaps there.
    out: bins along each axis.

  Returns:
    float32 [R, out, out], from 0 to 1; 0 for boxes and frames without area.
  """
  boxes = box_ops.clip(boxes, size)
  frames = frames[index]
  n_cells = masks.shape[-1]

  def weights(axis):
    start, length = (x[:, axis] for x in (boxes, boxes[:, 2:] - boxes[:, :2]))
    low, high = frames[:, axis], frames[:, axis + 2]
    has_area = high > low
    cell = jnp.where(has_area, (high - low) / n_cells, 1)
    return roi_align.bin_weights(
        start - 0.5, jnp.where(has_area, length, 0), size[1 - axis], out,
        n_cells, low - 0.5 + cell / 2, cell)

  return jnp.einsum("rph,rqw,rhw->rpq", weights(1), weights(0),
                    masks[index].astype(jnp.float32),
                    precision=lax.Precision.HIGHEST)


def targets(masks: jax.Array, frames: jax.Array, index: jax.Array,
            boxes: jax.Array, size: jax.Array, out: int = 28) -> jax.Array:
  """Which bins of each box an object covers at least half of: 0 or 1.

  Arguments and shape are those of `coverage`.
  """
  covered = coverage(masks, frames, index, boxes, size, out)
  return (covered >= 0.5).astype(jnp.float32)
