"""Cases in which the segmentation transforms are compared with others'."""

import dataclasses
import types

import numpy as np

SCALE = (128, 32)
CROP = (32, 32)
EVAL_SCALES = (0.5, 1.0, 1.75)
EVAL_SIZES = ((32, 48), (33, 47), (48, 31), (1, 40), (40, 1), (64, 128),
              (200, 20))

# The order in which the changes of colour are drawn, without and with the
# contrast as the last one, and where it is drawn which of the two it is.
ORDER = (("brightness", "mode", "contrast", "saturation", "hue"),
         ("brightness", "mode", "saturation", "hue", "contrast"))


def change(brightness=None, contrast=None, saturation=None, hue=None,
           contrast_last=False):
  """The changes of colour; `photometric.Distortion` without the package."""
  return types.SimpleNamespace(
      brightness=brightness, contrast=contrast, saturation=saturation, hue=hue,
      contrast_last=contrast_last)


@dataclasses.dataclass
class Draws:
  """What is drawn: the scale in [0, 1], the crops' corners, ..."""

  scale: float = 1 / 3
  corners: tuple = ((0, 0),)
  flip: bool = False
  change: types.SimpleNamespace = dataclasses.field(default_factory=change)


@dataclasses.dataclass
class Case:
  height: int
  width: int
  draws: Draws = dataclasses.field(default_factory=Draws)
  cat_max_ratio: float = 1.0
  n_labels: int = 151  # Labels in the file, from 0 on.


ALL = change(brightness=21.7, contrast=1.31, saturation=0.62, hue=-11)
LAST = change(brightness=-14.2, contrast=0.57, saturation=1.46, hue=9,
              contrast_last=True)

# A scale of 1/3 keeps the size, 0 halves it and 1 doubles it.
TRAIN = {
    "same size": Case(32, 48, Draws(corners=((0, 9),))),
    "up": Case(32, 48, Draws(1.0, ((20, 30),), True)),
    "up, odd": Case(29, 41, Draws(0.87, ((13, 7),))),
    "down": Case(64, 77, Draws(0.21, ((0, 0),))),
    "halved": Case(64, 96, Draws(1 / 3, ((0, 15),), True)),
    "smaller than the crop": Case(33, 47, Draws(0.02, flip=True)),
    "narrower than the crop": Case(90, 21, Draws(0.3, ((70, 0),), change=ALL)),
    "one row": Case(1, 40, Draws(0.9, ((0, 50),))),
    "one column": Case(40, 1, Draws(0.4, ((11, 0),), True)),
    "one pixel": Case(1, 1, Draws(0.8)),
    "wide": Case(8, 100, Draws(0.6, ((0, 80),))),
    "brightness": Case(32, 48, Draws(change=change(brightness=-31.9))),
    "contrast": Case(32, 48, Draws(change=change(contrast=1.499))),
    "saturation": Case(32, 48, Draws(change=change(saturation=1.49))),
    "hue": Case(32, 48, Draws(change=change(hue=17))),
    "hue 0": Case(32, 48, Draws(change=change(hue=0))),
    "hue, other way": Case(32, 48, Draws(change=change(hue=-18))),
    "all": Case(37, 53, Draws(0.5, ((5, 8),), True, ALL)),
    "all, contrast last": Case(37, 53, Draws(0.7, ((11, 2),), change=LAST)),
    "redrawn": Case(37, 53, Draws(
        0.9, ((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14),
              (15, 16), (17, 18), (19, 20), (21, 22))), 0.5, 2),
    "drawn twice": Case(64, 64, Draws(0.9, ((0, 0), (27, 27))), 0.75, 0),
}


def picture(case):
  """An image, uint8 [H, W, 3], and its label map as in a file.

  With `n_labels` 0 the top left has label 5 only, the rest any label.
  """
  rng = np.random.default_rng(1000 * case.height + case.width)
  shape = case.height, case.width
  image = rng.integers(0, 256, (*shape, 3), np.uint8)
  # Some gray, black and white, for which a hue is not defined.
  image[::5, ::3] = image[::5, ::3, :1]
  image[1::7, ::4], image[2::9, 1::4] = 0, 255
  labels = rng.integers(0, case.n_labels or 151, shape).astype(np.uint8)
  labels[rng.random(shape) < 0.05] = 255
  if not case.n_labels:
    labels[:35, :35] = 5
  return image, labels


def reduced(labels):
  """mmsegmentation's reduce_zero_label."""
  labels = labels.copy()
  labels[labels == 0] = 255
  labels = labels - 1
  labels[labels == 254] = 255
  return labels
