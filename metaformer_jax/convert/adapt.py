"""Adapts weights to a model that differs from the file's.

The number of classes, the image channels and the image size may differ. Each
adaptation is logged.
"""

import logging
import math
import re
from typing import Any

import numpy as np

from metaformer_jax.convert import imagenet_21k
from metaformer_jax.models import positions

log = logging.getLogger(__name__)

_HEAD = re.compile(
    r"params/(head|head_dist|head/fc2|(head|auxiliary)/classifier/conv"
    r"|head/class_out|box_head/(class|box)_out|mask_head/mask_out)"
    r"/(kernel|bias)")
_HEADS = re.compile(r"params/head(_dist)?/.*")
_STEM = re.compile(
    r"params/(stage1/downsample/conv|stage1/patch_embed/conv|stem/conv"
    r"|patch_embed)/kernel")
_POSITIONS = re.compile(r"params/(?:(stage\d)/)?pos_embed(/embedding)?")
_TIED = re.compile(  # Over all pixels or patches.
    r"\w+/(.*/)?(token_mixer/(random_matrix|kernel)|(linear|mlp)_tokens/.*)")


def is_head(name: str) -> bool:
  """Whether a flat name belongs to the layer that outputs the classes."""
  return _HEAD.fullmatch(name) is not None


def is_in_head(name: str) -> bool:
  """Whether a flat name belongs to what a model without classes lacks."""
  return _HEADS.fullmatch(name) is not None


def head_from_21k(value: np.ndarray) -> np.ndarray:
  """[..., 21841] -> [..., 1000]: the classes of ImageNet-1K that are in 21K.

  The one that is not is initialised to the mean over all classes (official
  misc/process_21k_ckpt_before_1k_finetuning.py).
  """
  made = value[..., np.maximum(imagenet_21k.TO_1K, 0)]
  missing = np.asarray(imagenet_21k.TO_1K) < 0
  made[..., missing] = value.mean(-1, keepdims=True)
  return made


def channels(kernel: np.ndarray, n: int) -> np.ndarray:
  """The stem's kernel [H, W, 3, C] for images of n channels, as in timm.

  One channel gets the sum of the three; more channels repeat the three, scaled
  by 3 / n to keep the sum over the channels.
  """
  if n == 1:
    return kernel.sum(2, keepdims=True)
  repeated = np.tile(kernel, (1, 1, math.ceil(n / 3), 1))[:, :, :n]
  return (repeated * (3 / n)).astype(kernel.dtype)


def sequence(value: np.ndarray, n: int, image_size: tuple[int, int],
             **how: Any) -> np.ndarray:
  """Resizes the position embedding of a sequence for images of another size.

  Args:
    value: [1, P + N, C]: P <= 2 class tokens, then the N patches of a square
      image.
    n: P + N of the result.
    image_size: (height, width) of the model's images.
    **how: as for `positions.resize`.

  Raises:
    ValueError: N is not a square number, or no patch size gives n patches.
  """
  for n_tokens in range(3):
    side = math.isqrt(value.shape[1] - n_tokens)
    if side**2 == value.shape[1] - n_tokens:
      height, width = _grid(n - n_tokens, image_size)
      tokens, patches = value[:, :n_tokens], value[0, n_tokens:]
      resized = positions.resize(patches.reshape(side, side, -1), height,
                                 width, **how)
      return np.concatenate(
          [tokens, np.asarray(resized).reshape(1, -1, value.shape[2])], 1)
  raise ValueError("the number of patches is not a square number")


def _grid(n: int, image_size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of n patches.

  Those of a square, as the models assume; if n is not a square number, those of
  the image with the patch size that gives n.
  """
  side = math.isqrt(n)
  if side**2 == n:
    return side, side
  height, width = image_size
  for patch in range(1, min(image_size) + 1):
    if (height // patch) * (width // patch) == n:
      return height // patch, width // patch
  raise ValueError(f"{height} x {width} pixels do not make {n} patches")


def to_shape(name: str, value: np.ndarray, shape: tuple[int, ...], *,
             image_size: tuple[int, int] | None, new_head: bool = False,
             other_classes: bool = False,
             head_21k: bool = False) -> np.ndarray | None:
  """Adapts one converted array to the shape that the model has.

  Args:
    name: the flat name.
    value: the array of the file.
    shape: the shape in the model.
    image_size: (height, width) of the model's images.
    new_head: omit a head with another number of classes.
    other_classes: omit the head, whatever its number of classes.
    head_21k: from a head with 21,841 classes, take those of ImageNet-1K.

  Returns:
    The adapted array, the same array if nothing applies, or None to omit it.
  """
  if other_classes and is_head(name):
    log.info("%s: of other classes, re-initialised with %d", name, shape[-1])
    return None
  if value.shape == shape or value.ndim != len(shape):
    return value
  if is_head(name) and value.shape[:-1] == shape[:-1]:
    if head_21k and value.shape[-1] == 21_841 and shape[-1] == 1000:
      log.info("%s: 1000 of 21841 classes", name)
      return head_from_21k(value)
    if new_head:
      log.info("%s: %d outputs, re-initialised with %d", name,
               value.shape[-1], shape[-1])
      return None
  if _STEM.fullmatch(name) and value.shape[2] == 3 and (
      value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]):
    log.info("%s: adapted from 3 channels to %d", name, shape[2])
    return channels(value, shape[2])
  found = _POSITIONS.fullmatch(name)
  if found and value.shape[-1] == shape[-1]:
    log.info("%s: resized from %s to %s", name, value.shape, shape)
    stage, on_grid = found.groups()
    if on_grid:
      return np.asarray(positions.resize(value, *shape[:2]))
    # PVT like its own code, other models like timm's vision transformers.
    how = {"method": "linear", "antialias": False} if stage else {}
    try:
      return sequence(value, shape[1], image_size, **how)
    except ValueError:
      return value
  return value


def advice(name: str, value: np.ndarray, shape: tuple[int, ...]) -> str:
  """What to do about an array with the wrong shape; may be empty."""
  if is_head(name) and value.shape[:-1] == shape[:-1]:
    return "num_classes sets the number of classes of the model's head"
  if _TIED.fullmatch(name):
    return ("a matrix over all pixels only works at its image size: set "
            "input_size (config.task.image_size in a run) to the file's")
  if _POSITIONS.fullmatch(name):
    return "position embeddings can only be resized from square images"
  return ""
