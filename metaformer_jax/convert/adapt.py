"""What may differ between a file and the model that it is loaded into.

The classifier's classes, the images' channels and their size; whatever is
adapted is told in the log.
"""

import logging
import math
import re
from typing import Any

import numpy as np

from metaformer_jax.convert import imagenet_21k
from metaformer_jax.models import positions

log = logging.getLogger(__name__)

_HEAD = re.compile(r"params/(head|head_dist|head/fc2)/(kernel|bias)")
_STEM = re.compile(
    r"params/(stage1/downsample/conv|stage1/patch_embed/conv|stem/conv"
    r"|patch_embed)/kernel")
_POSITIONS = re.compile(r"params/(?:(stage\d)/)?pos_embed(/embedding)?")
_TIED = re.compile(  # Over all pixels or patches.
    r"\w+/(.*/)?(token_mixer/(random_matrix|kernel)|(linear|mlp)_tokens/.*)")


def is_head(name: str) -> bool:
  """Whether a flat name is of the layer that puts out the classes."""
  return _HEAD.fullmatch(name) is not None


def head_from_21k(value: np.ndarray) -> np.ndarray:
  """[..., 21841] -> [..., 1000]: the classes of ImageNet-1K that 21k has.

  The one that it has not begins as the mean of all (official
  misc/process_21k_ckpt_before_1k_finetuning.py).
  """
  made = value[..., np.maximum(imagenet_21k.TO_1K, 0)]
  missing = np.asarray(imagenet_21k.TO_1K) < 0
  made[..., missing] = value.mean(-1, keepdims=True)
  return made


def channels(kernel: np.ndarray, n: int) -> np.ndarray:
  """The stem's kernel [H, W, 3, C] for images of n channels, as in timm.

  One channel takes the sum of the three; others repeat them, scaled by 3 / n
  so that the sum over the channels is as before.
  """
  if n == 1:
    return kernel.sum(2, keepdims=True)
  repeated = np.tile(kernel, (1, 1, math.ceil(n / 3), 1))[:, :, :n]
  return (repeated * (3 / n)).astype(kernel.dtype)


def sequence(value: np.ndarray, n: int, image_size: tuple[int, int],
             **how: Any) -> np.ndarray:
  """Resizes the position embedding of a sequence for images of another size.

  Args:
    value: [1, P + N, C]: those of P class tokens, at most 2, then those of the
      N patches of a square image.
    n: P + N of the new one.
    image_size: (height, width) that it is for.
    **how: as for `positions.resize`.

  Raises:
    ValueError: N is no square, or the image has no n patches.
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
  raise ValueError("the patches are of no square")


def _grid(n: int, image_size: tuple[int, int]) -> tuple[int, int]:
  """Rows and columns of n patches: a square's, as the models take it, or the
  image's by whatever size of patches gives n."""
  side = math.isqrt(n)
  if side**2 == n:
    return side, side
  height, width = image_size
  for patch in range(1, min(image_size) + 1):
    if (height // patch) * (width // patch) == n:
      return height // patch, width // patch
  raise ValueError(f"{height} x {width} pixels do not make {n} patches")


def to_shape(name: str, value: np.ndarray, shape: tuple[int, ...], *,
             image_size: tuple[int, int], new_head: bool = False,
             head_21k: bool = False) -> np.ndarray | None:
  """Adapts one converted array to the shape that the model has.

  Args:
    name: its flat name.
    value: as in the file.
    shape: the model's.
    image_size: (height, width) of the model's images.
    new_head: leave out a head of another number of classes.
    head_21k: of a head of 21,841 classes, keep those of ImageNet-1K.

  Returns:
    The array; as it was, where nothing applies; None to leave it out.
  """
  if value.shape == shape or value.ndim != len(shape):
    return value
  if is_head(name) and value.shape[:-1] == shape[:-1]:
    if head_21k and value.shape[-1] == 21_841 and shape[-1] == 1000:
      log.info("%s: 1000 of 21841 classes", name)
      return head_from_21k(value)
    if new_head:
      log.info("%s: %d classes, begins anew with %d", name, value.shape[-1],
               shape[-1])
      return None
  if _STEM.fullmatch(name) and value.shape[2] == 3 and (
      value.shape[:2] + value.shape[3:] == shape[:2] + shape[3:]):
    log.info("%s: of 3 channels, made for %d", name, shape[2])
    return channels(value, shape[2])
  found = _POSITIONS.fullmatch(name)
  if found and value.shape[-1] == shape[-1]:
    log.info("%s: resized from %s to %s", name, value.shape, shape)
    stage, on_grid = found.groups()
    if on_grid:
      return np.asarray(positions.resize(value, *shape[:2]))
    # PVT's as in its code; else as timm's vision transformers.
    how = {"method": "linear", "antialias": False} if stage else {}
    try:
      return sequence(value, shape[1], image_size, **how)
    except ValueError:
      return value
  return value


def advice(name: str, value: np.ndarray, shape: tuple[int, ...]) -> str:
  """What to do about an array that is of another shape; may be empty."""
  if is_head(name) and value.shape[:-1] == shape[:-1]:
    return "num_classes sets the classes of the model's head"
  if _TIED.fullmatch(name):
    return ("a matrix over all pixels ties a model to its image size: give the "
            "file's as input_size (config.data.image_size in a run)")
  if _POSITIONS.fullmatch(name):
    return "positions are resized from those of square images only"
  return ""
