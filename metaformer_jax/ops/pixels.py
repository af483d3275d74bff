"""Losses and predictions of pixels, from logits of a lower resolution.

Logits of all classes at the resolution of the label maps can be larger than
everything else: 157 MB for an image of 512 x 512 pixels and 150 classes. They
are therefore made a few rows at a time, and made again for the gradient.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from metaformer_jax.ops import resize

# Values of each image at a time: 16 MB of float32.
_BLOCK = 2**22

# On a TPU three passes in bfloat16; one pass would lose most of a logit.
_PRECISION = lax.Precision.HIGH


class Logits(NamedTuple):
  """Logits of a batch of images.

  Attributes:
    logits: float32 [B, h, w, C].
    sizes: int32 [B, 2], their valid part, at the top left.
    image_sizes: int32 [B, 2], of the images that they are resized to first.
    canvas: height and width that these images fit into.
  """

  logits: jax.Array
  sizes: jax.Array
  image_sizes: jax.Array
  canvas: tuple[int, int]


def _blocks(height: int, width: int, n_classes: int) -> tuple[int, int]:
  """Number and size of the blocks of rows; the last one may have too many."""
  size = min(height, max(1, _BLOCK // (width * n_classes)))
  return -(-height // size), size


def _all_rows(x: jax.Array, weights: jax.Array, n_blocks: int) -> jax.Array:
  """Resizes the columns of [B, h, w, C]: [N, B, R, w, C], in blocks of rows."""
  rows = jnp.einsum("bvh,bhwc->vbwc", weights, x, precision=_PRECISION)
  return rows.reshape(n_blocks, -1, *rows.shape[1:]).swapaxes(1, 2)


def _all_columns(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Resizes the rows of a block: [B, R, w, C] -> [B, R, width, C]."""
  return jnp.einsum("bvw,brwc->brvc", weights, x, precision=_PRECISION)


def cross_entropy(logits: jax.Array, logit_sizes: jax.Array, label: jax.Array,
                  sizes: jax.Array, ignore: int) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of the pixels, with mmsegmentation 0.19's mean.

  The logits are resized bilinearly to the images' size. Pixels to ignore add
  nothing to the sum, but count in the mean, which is over all pixels of all
  canvases (mmseg/models/losses/cross_entropy_loss.py; avg_non_ignore came
  later).

  Args:
    logits: float32 [B, h, w, C].
    logit_sizes: int32 [B, 2], their valid part, at the top left.
    label: integers [B, H, W].
    sizes: int32 [B, 2], of the images in the label maps.
    ignore: label of the pixels to ignore; those in the padding must have it.

  Returns:
    The loss, and the fraction of the other pixels whose class is right.
  """
  n, height, width = label.shape
  n_blocks, size = _blocks(height, width, logits.shape[-1])
  down, columns = (
      resize.linear_weights(n_in, n_out, logit_sizes[:, axis], sizes[:, axis])
      for axis, (n_in, n_out) in enumerate(
          zip(logits.shape[1:3], (n_blocks * size, width))))
  rows = _all_rows(logits, down, n_blocks)
  label = jnp.pad(label, ((0, 0), (0, n_blocks * size - height), (0, 0)),
                  constant_values=ignore)
  label = label.reshape(n, n_blocks, size, width).swapaxes(0, 1)

  @jax.checkpoint
  def sums(block):
    x, label = block
    found = _all_columns(x, columns)
    counts = label != ignore
    label = jnp.where(counts, label, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(found, label)
    right = (found.argmax(-1) == label) & counts
    return jnp.where(counts, losses, 0).sum(), right.sum(), counts.sum()

  loss, right, counts = (x.sum() for x in lax.map(sums, (rows, label)))
  return loss / (n * height * width), right / jnp.maximum(counts, 1)


def classes(found: Sequence[Logits], label_sizes: jax.Array,
            canvas: tuple[int, int]) -> jax.Array:
  """The most probable class of each pixel of the label maps.

  Logits are resized to their image, then to the label map, both bilinearly. If
  there are several for each label map, their probabilities are added.

  Args:
    found: one, or several of the same images.
    label_sizes: int32 [B, 2].
    canvas: height and width of the result, at least those of the label maps.

  Returns:
    uint8 [B, height, width]; meaningless beyond the sizes.
  """
  height, width = canvas
  n_blocks, size = _blocks(height, width, found[0].logits.shape[-1])
  rows, columns = [], []
  for logits in found:
    down, across = (_twice(logits, axis, n, label_sizes)
                    for axis, n in enumerate((n_blocks * size, width)))
    rows.append(_all_rows(logits.logits, down, n_blocks))
    columns.append(across)

  def block(rows):
    scores = [_all_columns(*pair) for pair in zip(rows, columns)]
    if len(scores) > 1:
      scores = [jax.nn.softmax(x) for x in scores]
    return sum(scores).argmax(-1).astype(jnp.uint8)

  blocks = lax.map(block, rows)  # [N, B, R, W]
  found = blocks.swapaxes(0, 1).reshape(len(label_sizes), -1, width)
  return found[:, :height]


def _twice(found: Logits, axis: int, n_out: int,
           label_sizes: jax.Array) -> jax.Array:
  """Weights of both resizes along an axis: [B, n_out, n_in]."""
  image_sizes, n = found.image_sizes[:, axis], found.canvas[axis]
  first = resize.linear_weights(found.logits.shape[1 + axis], n,
                                found.sizes[:, axis], image_sizes)
  second = resize.linear_weights(n, n_out, image_sizes, label_sizes[:, axis])
  return jnp.einsum("bij,bjk->bik", second, first,
                    precision=lax.Precision.HIGHEST)
