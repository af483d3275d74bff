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

# Values of each image at a time: 16 MB of float32.
_BLOCK = 2**22

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


def _all_columns(x: jax.Array, sides: Sequence[jax.Array],
                 width: int) -> jax.Array:
  """Resizes rows: [B, h, w, C] -> [B, h, width, C]."""
  positions = jnp.broadcast_to(jnp.arange(width), (len(x), width))
  weights = sum(jax.nn.one_hot(index, x.shape[2]) * weight[..., None]
                for index, weight in _chained(positions, sides))
  return jnp.einsum("bvw,bhwc->bhvc", weights, x,
                    precision=lax.Precision.HIGHEST)


def _some_rows(x: jax.Array, sides: Sequence[jax.Array],
               rows: jax.Array) -> jax.Array:
  """Resizes columns, for some rows: [B, h, W, C], int [R] -> [B, R, W, C]."""
  positions = jnp.broadcast_to(rows, (len(x), len(rows)))

  def at(index):  # Whole rows.
    return jnp.take_along_axis(x, index[:, :, None, None], 1)

  return sum(at(index) * weight[:, :, None, None]
             for index, weight in _chained(positions, sides))


def _blocks(height: int, width: int, n: int) -> jax.Array:
  """All rows and some more, in blocks [N, R], by the number of classes."""
  size = min(height, max(1, _BLOCK // (width * n)))
  n_blocks = -(-height // size)
  return jnp.arange(n_blocks * size).reshape(n_blocks, size)


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
  x = _all_columns(logits, across, width)
  rows = _blocks(height, width, logits.shape[-1])
  label = jnp.pad(label, ((0, 0), (0, rows.size - height), (0, 0)),
                  constant_values=ignore)
  label = label.reshape(n, *rows.shape, width).swapaxes(0, 1)

  @jax.checkpoint
  def sums(args):
    rows, label = args
    found = _some_rows(x, down, rows)
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
  ready = []
  for logits, *sizes in found:
    down, across = zip(*(size.T for size in (*sizes, label_sizes)))
    ready.append((_all_columns(logits, across, width), down))
  rows = _blocks(height, width, found[0].logits.shape[-1])

  def block(rows):
    scores = [_some_rows(x, down, rows) for x, down in ready]
    if len(scores) > 1:
      scores = [jax.nn.softmax(x) for x in scores]
    return sum(scores).argmax(-1).astype(jnp.uint8)

  blocks = lax.map(block, rows)  # [N, B, R, W]
  found = blocks.swapaxes(0, 1).reshape(-1, rows.size, width)
  return found[:, :height]
