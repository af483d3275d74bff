"""What may differ between a file and the model that it is loaded into.

The classifier's classes, the images' channels and their size; whatever is
adapted is told in the log.
"""

import logging
import math
import re

import numpy as np

from metaformer_jax.convert import imagenet_21k
from metaformer_jax.models import positions

log = logging.getLogger(__name__)

_HEAD = re.compile(r"params/(head|head_dist|head/fc2)/(kernel|bias)")
_STEM = re.compile(
    r"params/(stage1/downsample/conv|stage1/patch_embed/conv|stem/conv"
    r"|patch_embed)/kernel")
_POSITIONS = re.compile(r"params/(.*/)?pos_embed(/embedding)?")


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


def grid(value: np.ndarray, shape: tuple[int, ...],
         image_size: tuple[int, int], *, pyramid: bool = False) -> np.ndarray:
  """Resizes a position embedding for images of another size.

  Args:
    value: [H, W, C], or [1, P + H W, C] with P positions of class tokens first
      and a square grid.
    shape: the new one, with the same P.
    image_size: (height, width) that it is for: tells how the new grid's
      positions make rows.
    pyramid: as PVT does, bilinear without antialias; else as timm's vision
      transformers.
  """
  how = {"method": "linear", "antialias": False} if pyramid else {}
  if value.ndim == 3 and value.shape[0] != 1:
    return np.asarray(positions.resize(value, *shape[:2], **how))
  n, dim = value.shape[1:]
  n_tokens = next(p for p in range(n) if math.isqrt(n - p)**2 == n - p)
  side = math.isqrt(n - n_tokens)
  n_new = shape[1] - n_tokens
  height = max(1, round(math.sqrt(n_new * image_size[0] / image_size[1])))
  resized = positions.resize(value[0, n_tokens:].reshape(side, side, dim),
                             height, n_new // height, **how)
  return np.concatenate(
      [value[:, :n_tokens], np.asarray(resized).reshape(1, -1, dim)], 1)


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
  if value.shape == shape:
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
  if _POSITIONS.fullmatch(name) and value.shape[-1] == shape[-1] and (
      value.ndim == len(shape)):
    log.info("%s: resized from %s to %s", name, value.shape, shape)
    return grid(value, shape, image_size,
                pyramid=re.fullmatch(r"params/stage\d/pos_embed", name)
                is not None)
  return value
