"""The outputs of any backbone: their strides, masks and norms, by level.

No part names a backbone: all they need is `features`, {"stage1": map, ...}.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from metaformer_jax.models import layers, norms
from metaformer_jax.ops import resize


class Level(NamedTuple):
  """An output of a backbone.

  Attributes:
    stage: its name, "stage1", ...
    stride: in pixels of the images.
    map: [B, h, w, C].
    mask: bool [B, h, w], of the valid part; None if all is valid.
  """

  stage: str
  stride: int
  map: jax.Array
  mask: jax.Array | None


def compute(backbone: nn.Module, images: jax.Array, mask: jax.Array | None,
            train: bool) -> list[Level]:
  """All outputs of the backbone, the finest first.

  A backbone that cannot ignore padding (`fixed_size`) sees it as zeros.

  Args:
    backbone: any model with `features` (`docs/design.md`, models).
    images: normalised, [B, H, W, 3].
    mask: [B, H, W], true for pixels of the image, which begins at the top left;
      None if there is no padding.
    train: as in `features`.
  """
  fixed = getattr(backbone, "fixed_size", False)
  maps = backbone.features(images, mask=None if fixed else mask, train=train)
  strides = _strides(backbone, maps, images.shape[1:3])
  masks = _masks(backbone, maps, strides, mask)
  return [
      Level(stage, strides[stage],
            layers.apply_mask(maps[stage], masks[stage]) if fixed
            else maps[stage], masks[stage])
      for stage in sorted(maps)]


def normalize(levels: Sequence[Level], norm: Callable[..., nn.Module] | None,
              train: bool) -> list[Level]:
  """Each map by a norm of its own, zero in the padding.

  Adds "norm1" for "stage1", ... to the module that calls it.

  Args:
    levels: outputs of a backbone.
    norm: factory, called with `name`; None for none.
    train: as in the norm.
  """
  if norm is None:
    return list(levels)
  return [
      level._replace(map=layers.apply_mask(
          norm(name=f"norm{level.stage.removeprefix('stage')}")(
              level.map, mask=level.mask, train=train), level.mask))
      for level in levels]


def nearest(levels: Sequence[Level], strides: Sequence[int]) -> list[Level]:
  """The levels that `at_strides` uses: of the nearest stride to each."""
  used = {_nearest(levels, stride).stage for stride in strides}
  return [level for level in levels if level.stage in used]


def at_strides(levels: Sequence[Level], strides: Sequence[int]) -> list[Level]:
  """A level for each stride.

  If these are not the levels' own, each is the one with the nearest stride,
  resized bilinearly, as by mmsegmentation's MultiLevelNeck between its
  convolutions.
  """
  if [level.stride for level in levels] == list(strides):
    return list(levels)
  return [_resized(_nearest(levels, stride), stride) for stride in strides]


def prepared(backbone: nn.Module, images: jax.Array, mask: jax.Array | None,
             train: bool, *, strides: Sequence[int],
             norm: Callable[..., nn.Module] | None,
             frozen_batch_norm: bool) -> list[Level]:
  """The outputs for a detector: a normalised level for each stride.

  Args:
    backbone, images, mask, train: as of `compute`.
    strides: as of `at_strides`.
    norm: as of `normalize`.
    frozen_batch_norm: the backbone's BatchNorm uses its running statistics, in
      training as well.
  """
  with (norms.running_statistics() if frozen_batch_norm
        else contextlib.nullcontext()):
    levels = compute(backbone, images, mask, train)
  return at_strides(normalize(nearest(levels, strides), norm, train), strides)


def of_anchors(masks: Sequence[jax.Array],
               n_anchors: int) -> tuple[jax.Array, ...]:
  """By level, [B, h, w] -> [B, h w n_anchors]: the mask of each anchor."""
  return tuple(jnp.repeat(mask.reshape(len(mask), -1), n_anchors, axis=1)
               for mask in masks)


def _nearest(levels: Sequence[Level], stride: int) -> Level:
  return min(levels, key=lambda level: abs(math.log2(level.stride / stride)))


def _resized(level: Level, stride: int) -> Level:
  own, x, mask = level.stride, level.map, level.mask
  shape = tuple(-(-n * own // stride) for n in x.shape[1:3])
  to_mask = None if mask is None else _scaled(mask, own, stride, shape)
  return Level(level.stage, stride, resize.by_masks(x, mask, shape, to_mask),
               to_mask)


def _strides(backbone: nn.Module, maps: Mapping[str, jax.Array],
             shape: tuple[int, int]) -> Mapping[str, int]:
  """Strides of the outputs for images with this height and width.

  Of a model without `feature_info`, they are the ratios of the sizes, rounded.
  """
  if hasattr(backbone, "feature_info"):
    return {stage: stride for stage, (stride, _)
            in backbone.feature_info().items()}
  return {stage: max(round(n / m) for n, m in zip(shape, x.shape[1:3]))
          for stage, x in maps.items()}


def _masks(backbone: nn.Module, maps: Mapping[str, jax.Array],
           strides: Mapping[str, int], mask: jax.Array | None,
           ) -> Mapping[str, jax.Array | None]:
  """The masks of the outputs.

  Of a model without `feature_masks`, the sizes are those of the images over the
  stride, rounded up.
  """
  if mask is None:
    return dict.fromkeys(maps)
  if hasattr(backbone, "feature_masks"):
    return backbone.feature_masks(mask)
  return {stage: _scaled(mask, 1, strides[stage], x.shape[1:3])
          for stage, x in maps.items()}


def _scaled(mask: jax.Array, factor: int, divisor: int,
            shape: tuple[int, int]) -> jax.Array:
  """The mask of valid parts that are factor / divisor as large, rounded up."""
  return resize.mask(-(-resize.sizes(mask) * factor // divisor), *shape)


def norm(name: str | None, backbone: nn.Module,
         ) -> Callable[..., nn.Module] | None:
  """The factory of norms for `normalize`, with the backbone's epsilon.

  Args:
    name: in `norms.NORMS`; "none" or None for none.
    backbone: whose dtype it has.

  Raises:
    ValueError: there is no such norm.
  """
  if name in (None, "none"):
    return None
  return functools.partial(
      layers.lookup(norms.NORMS, "norm", name),
      eps=getattr(backbone, "norm_eps", 1e-5),
      dtype=getattr(backbone, "dtype", None))
