"""Losses and predictions of pixels, from logits of a lower resolution.

Logits of all classes at the resolution of the label maps can be larger than
everything else: 157 MB for an image of 512 x 512 pixels and 150 classes. They
are therefore made a few rows at a time, and made again for the gradient.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

# Values of each image at a time, about: 16 MB of float32.
_BLOCK = 2**22

# How much wider the label maps are than the logits, about.
_ENLARGED = 4

# On a TPU three passes in bfloat16; one pass would lose most of a logit.
_PRECISION = lax.Precision.HIGH

# (index [B, N], weight [B, N]): what a resized row or column is a sum of.
_Taps = list[tuple[jax.Array, jax.Array]]


class Logits(NamedTuple):
  """Logits of a batch of images.

  Attributes:
    logits: float32 [B, h, w, C].
    sizes: int32 [B, 2], their valid part, at the top left.
    image_sizes: int32 [B, 2], of the images that they are resized to first.
  """

  logits: jax.Array
  sizes: jax.Array
  image_sizes: jax.Array


def _taps(positions: jax.Array, from_side: jax.Array,
          to_side: jax.Array) -> _Taps:
  """Bilinear resizing along one axis, as PyTorch's without align_corners.

  Positions [B, N] in the result, sides [B] -> the positions in the source.
  """
  from_side, to_side = (jnp.maximum(side, 1)[:, None]
                        for side in (from_side, to_side))
  scale = from_side.astype(jnp.float32) / to_side.astype(jnp.float32)
  source = jnp.maximum((positions + 0.5) * scale - 0.5, 0)
  first = jnp.minimum(source.astype(jnp.int32), from_side - 1)
  weight = source - first
  return [(first, 1 - weight),
          (jnp.minimum(first + 1, from_side - 1), weight)]


def _chained(positions: jax.Array, sides: Sequence[jax.Array]) -> _Taps:
  """The taps of several resizes in turn.

  Args:
    positions: int [B, N], in the last of the sizes.
    sides: the first one, [B], to the last.
  """
  taps = [(positions, jnp.ones(positions.shape, jnp.float32))]
  for from_side, to_side in reversed(list(itertools.pairwise(sides))):
    taps = [(index, weight * w) for position, weight in taps
            for index, w in _taps(position, from_side, to_side)]
  return taps


def _weights(n_from: int, n_to: int, sides: Sequence[jax.Array]) -> jax.Array:
  """The taps of all positions, float32 [B, n_to, n_from]."""
  positions = jnp.broadcast_to(jnp.arange(n_to), (len(sides[0]), n_to))
  return sum(jax.nn.one_hot(index, n_from) * weight[..., None]
             for index, weight in _chained(positions, sides))


def _all_rows(x: jax.Array, sides: Sequence[jax.Array],
              height: int) -> jax.Array:
  """Resizes the columns of [B, h, w, C], in blocks [N, B, R, w, C] of rows.

  Rows after `height`, which fill the last block, are meaningless.
  """
  n, h, width, n_classes = x.shape
  size = min(height, max(1, _BLOCK // (width * _ENLARGED * n_classes)))
  n_blocks = -(-height // size)
  rows = jnp.einsum("bvh,bhwc->vbwc", _weights(h, n_blocks * size, sides), x,
                    precision=_PRECISION)
  return rows.reshape(n_blocks, size, n, width, n_classes).swapaxes(1, 2)


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
  down, across = zip(logit_sizes.T, sizes.T)
  rows = _all_rows(logits, down, height)
  columns = _weights(logits.shape[2], width, across)
  label = _in_blocks(label, rows, ignore)

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


def _in_blocks(label: jax.Array, rows: jax.Array, ignore: int) -> jax.Array:
  """Label maps [B, H, W] in the blocks of `_all_rows`: [N, B, R, W]."""
  n, height, width = label.shape
  n_blocks, _, size, *_ = rows.shape
  label = jnp.pad(label, ((0, 0), (0, n_blocks * size - height), (0, 0)),
                  constant_values=ignore)
  return label.reshape(n, n_blocks, size, width).swapaxes(0, 1)


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
  rows, columns = [], []
  for logits, *sizes in found:
    down, across = zip(*(size.T for size in (*sizes, label_sizes)))
    rows.append(_all_rows(logits, down, height))
    columns.append(_weights(logits.shape[2], width, across))

  def block(rows):
    scores = [_all_columns(*pair) for pair in zip(rows, columns)]
    if len(scores) > 1:
      scores = [jax.nn.softmax(x) for x in scores]
    return sum(scores).argmax(-1).astype(jnp.uint8)

  blocks = lax.map(block, rows)  # [N, B, R, W]
  found = blocks.swapaxes(0, 1).reshape(len(label_sizes), -1, width)
  return found[:, :height]
