"""Random changes of colours as in mmsegmentation's PhotoMetricDistortion.

`draw` is separate from `apply`, so that tests compare the distributions drawn
with their closed forms, and the pixels with mmsegmentation's.

Source: mmsegmentation 0.19, mmseg/datasets/pipelines/transforms.py.
"""

import dataclasses

import numpy as np

from metaformer_jax.data.augment import cv_kernels

_VALUES = np.arange(256, dtype=np.float32)
_SAME = np.arange(256, dtype=np.uint8)


@dataclasses.dataclass(frozen=True)
class Distortion:
  """The changes of one picture, in this order; None: no such change.

  Attributes:
    brightness: what is added to the values, in [-32, 32).
    contrast: a factor of the values, in [0.5, 1.5).
    saturation: a factor, in [0.5, 1.5).
    hue: what is added, in steps of 2 degrees, from -18 to 17.
    contrast_last: the contrast changes after the hue, not before the
      saturation.
  """

  brightness: float | None = None
  contrast: float | None = None
  saturation: float | None = None
  hue: int | None = None
  contrast_last: bool = False


def draw(rng: np.random.Generator) -> Distortion:
  """Draws each change with a probability of a half."""

  def perhaps(value):
    return value if rng.integers(2) else None

  return Distortion(
      brightness=perhaps(rng.uniform(-32, 32)),
      contrast=perhaps(rng.uniform(0.5, 1.5)),
      saturation=perhaps(rng.uniform(0.5, 1.5)),
      hue=perhaps(int(rng.integers(-18, 18))),
      contrast_last=bool(rng.integers(2)))


def apply(image: np.ndarray, change: Distortion) -> np.ndarray:
  """Changes the colours of RGB, uint8 [H, W, 3]; returns a new picture.

  mmsegmentation converts to HSV and back for the saturation and again for the
  hue, each time with 8 bits; so do the kernels.
  """
  before, after = _SAME, _SAME
  if change.brightness is not None:
    before = _table(_VALUES + np.float32(change.brightness))
  if change.contrast is not None:
    table = _table(_VALUES * np.float32(change.contrast))
    if change.contrast_last:
      after = table
    else:
      before = table[before]
  if change.saturation is None and change.hue is None:
    rows = image.reshape(len(image), -1)
    return cv_kernels.look_up(rows, after[before]).reshape(image.shape)
  return cv_kernels.distort(
      image, before.astype(np.float32),
      np.float32(-1 if change.saturation is None else change.saturation),
      np.float32(-1 if change.hue is None else change.hue % 180), after)


def _table(values: np.ndarray) -> np.ndarray:
  return values.clip(0, 255).astype(np.uint8)
