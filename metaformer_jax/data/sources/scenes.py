"""Composed scenes: handwritten digits on photographs, with exact label maps.

The digits are scikit-learn's, the photographs the two that it carries. Training
and test scenes share neither digits nor pixels: they take the digits of
`arrays.digits`' splits, by other writers, and the left or the right half of the
photographs.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import arrays, base

CLASSES = base.Classes(11, ("background", *arrays.DIGITS.names))

# Height and width: landscape, portrait and square.
_SIZES = ((48, 64), (64, 48), (56, 56))

# Scenes of each split, drawn from (number of the split, index).
_SPLITS = {"train": (0, 4000), "test": (1, 200)}

_SPLIT = re.compile(r"(train|test)(?:\[:([1-9]\d{0,5})\])?")

# Sides of a digit, pixels.
_SMALLEST, _LARGEST = 20, 36

# Places that are tried for a digit.
_TRIES = 20

# Backgrounds are dimmed by this factor, and digits have bright colours.
_DIMMED = 0.5
_BRIGHT = (150, 255)


@dataclasses.dataclass(frozen=True)
class Scenes:
  """The first n scenes of a split; each is drawn when it is read.

  Attributes:
    split: "train" or "test".
    n: number of scenes.
  """

  split: str
  n: int

  n_classes = CLASSES.n
  class_names = CLASSES.names

  def __len__(self) -> int:
    return self.n

  def _rng(self, index: int) -> np.random.Generator:
    return np.random.default_rng((_SPLITS[self.split][0], index))

  def sizes(self) -> np.ndarray:
    """Height and width of each scene, int32 [N, 2]."""
    return np.array([_size(self._rng(i)) for i in range(self.n)], np.int32)

  def __getitem__(self, index: int) -> base.Record:
    if not 0 <= index < self.n:
      raise IndexError(f"scene {index} of {self.n}")
    rng = self._rng(index)
    size = _size(rng)
    digits, photographs = _parts(self.split)
    image = _background(photographs[rng.integers(len(photographs))], size, rng)
    label = np.zeros(size, np.uint8)
    for _ in range(rng.integers(1, 4)):
      _paste(image, label, digits[int(rng.integers(len(digits)))], rng)
    return {"image": image.round().astype(np.uint8), "label": label}


def _size(rng: np.random.Generator) -> tuple[int, int]:
  return _SIZES[rng.integers(len(_SIZES))]


@functools.cache
def _parts(split: str) -> tuple[arrays.InMemory, list[Image.Image]]:
  """The digits and the halves of the photographs that a split is made of."""
  from sklearn import datasets  # noqa: PLC0415  Takes a second to import.

  photographs = []
  for pixels in datasets.load_sample_images().images:
    middle = pixels.shape[1] // 2
    half = slice(None, middle) if split == "train" else slice(middle, None)
    photographs.append(Image.fromarray(pixels[:, half]))
  return arrays.digits(split == "train"), photographs


def _background(photograph: Image.Image, size: tuple[int, int],
                rng: np.random.Generator) -> np.ndarray:
  """A random part of a photograph, resized and dimmed: float32 [*size, 3]."""
  height, width = size
  scale = rng.uniform(1, 4)
  w, h = scale * width, scale * height
  left = rng.uniform(0, photograph.width - w)
  top = rng.uniform(0, photograph.height - h)
  part = photograph.resize((width, height), Image.Resampling.BILINEAR,
                           box=(left, top, left + w, top + h))
  return _DIMMED * np.asarray(part, np.float32)


def _paste(image: np.ndarray, label: np.ndarray, digit: base.Record,
           rng: np.random.Generator) -> None:
  """Draws a digit on an image, and its class into the label map.

  A pixel is of the digit where it covers at least half of it. Digits do not
  overlap; one for which no place is found is left out.
  """
  side = int(rng.integers(_SMALLEST, _LARGEST, endpoint=True))
  cover = np.asarray(Image.fromarray(digit["image"]).resize(
      (side, side), Image.Resampling.BICUBIC), np.float32)[..., None] / 255
  for _ in range(_TRIES):
    y = rng.integers(label.shape[0] - side, endpoint=True)
    x = rng.integers(label.shape[1] - side, endpoint=True)
    where = np.s_[y:y + side, x:x + side]
    if not label[where].any():
      break
  else:
    return
  colour = rng.uniform(*_BRIGHT, 3).astype(np.float32)
  image[where] += cover * (colour - image[where])
  label[where][cover[..., 0] >= 0.5] = digit["label"] + 1


def create(data: schema.Data, train: bool) -> Scenes:
  """Opens a split: "train" and "test" by default, or "train[:32]".

  Raises:
    ConfigError: there is no such split.
  """
  key = "train_split" if train else "eval_split"
  value = getattr(data, key)
  if value is None:
    value = "train" if train else "test"
  match = _SPLIT.fullmatch(value)
  if not match:
    raise errors.ConfigError(
        f"config.data.{key}: {value!r} is not a split of scenes; valid: "
        'train, test, and their first scenes, as "train[:32]"')
  split, n = match[1], _SPLITS[match[1]][1]
  return Scenes(split, min(n, int(match[2])) if match[2] else n)


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on scenes."""
  del files, train  # Nothing is on disk.
  yield from base.check_classes(cfg, CLASSES.n)
  for split in (True, False):
    try:
      create(cfg.data, split)
    except errors.ConfigError as e:
      yield str(e)
