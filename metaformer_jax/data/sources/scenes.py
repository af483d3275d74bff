"""Composed scenes: handwritten digits on photographs, with exact labels.

Scenes have a label map, or boxes of the digits, which then are on larger
pictures and may cover a part of each other.

The digits are scikit-learn's, the photographs the two that it carries. Training
and test scenes share neither digits nor pixels: they take the digits of
`arrays.digits`' splits, by other writers, and the left or the right half of the
photographs.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import arrays, base, objects, outlines

CLASSES = base.Classes(11, ("background", *arrays.DIGITS.names))

# Height and width: landscape, portrait and square.
_SIZES = ((48, 64), (64, 48), (56, 56))

_OBJECT_SIZES = ((96, 128), (128, 96), (96, 96))

# Scenes of each split, drawn from (number of the split, index).
_SPLITS = {"train": (0, 4000), "test": (1, 200)}

_SPLIT = re.compile(r"(train|test)(?:\[:([1-9]\d{0,5})\])?")

# Sides of a digit, pixels.
_SMALLEST, _LARGEST = 20, 36
_SMALLEST_OBJECT, _LARGEST_OBJECT = 28, 64

# Digits of a scene with boxes, and the part of each that stays visible.
_MOST = 4
_VISIBLE = 0.9

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


def _size(rng: np.random.Generator,
          sizes: tuple[tuple[int, int], ...] = _SIZES) -> tuple[int, int]:
  return sizes[rng.integers(len(sizes))]


@dataclasses.dataclass(frozen=True)
class ObjectScenes:
  """The first n scenes with boxes of a split; each is drawn when it is read.

  The digits of a scene cover each other in the order in which they are drawn;
  at least 90% of each stays visible. A pixel belongs to the last digit that
  covers at least half of it; a box is the bounding box of its digit's pixels.

  Attributes:
    split: "train" or "test".
    n: number of scenes.
  """

  split: str
  n: int

  n_classes, class_names = arrays.DIGITS
  category_ids = tuple(range(arrays.DIGITS.n))

  def __len__(self) -> int:
    return self.n

  def _rng(self, index: int) -> np.random.Generator:
    number, _ = _SPLITS[self.split]
    return np.random.default_rng((len(_SPLITS) + number, index))

  def sizes(self) -> np.ndarray:
    """Height and width of each scene, int32 [N, 2]."""
    return np.array([_size(self._rng(i), _OBJECT_SIZES)
                     for i in range(self.n)], np.int32)

  def has_objects(self) -> np.ndarray:
    """bool [N]: all have."""
    return np.ones(self.n, bool)

  def __getitem__(self, index: int) -> base.Record:
    if not 0 <= index < self.n:
      raise IndexError(f"scene {index} of {self.n}")
    rng = self._rng(index)
    size = _size(rng, _OBJECT_SIZES)
    digits, photographs = _parts(self.split)
    image = _background(photographs[rng.integers(len(photographs))], size, rng)
    masks, labels = np.zeros((0, *size), bool), []
    least = np.zeros(0)  # Visible pixels of each digit.
    for _ in range(rng.integers(1, _MOST, endpoint=True)):
      digit = digits[int(rng.integers(len(digits)))]
      added = _paste_over(image, masks, least, digit, rng)
      if added is not None:
        masks = added
        labels.append(digit["label"])
        least = np.append(least, _VISIBLE * masks[-1].sum())
    return {"image": image.round().astype(np.uint8), "size": size,
            "boxes": np.array([_box(mask) for mask in masks], np.float32),
            "labels": np.array(labels, np.int32),
            "segments": [outlines.rle(mask) for mask in masks]}

  def annotations(self) -> dict[str, list[dict[str, Any]]]:
    """A COCO data set, whose images are those of the records, in order."""
    records = [self[i] for i in range(self.n)]
    boxes = np.concatenate([r["boxes"] for r in records]).astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    areas = [sum(s["counts"][1::2]) for r in records for s in r["segments"]]
    no = np.zeros(len(boxes), bool)
    return objects.Objects(
        np.arange(1, self.n + 1), self.sizes(),
        np.cumsum([0, *(len(r["labels"]) for r in records)]), boxes,
        np.concatenate([r["labels"] for r in records]), np.array(areas, float),
        no, no).annotations(self.category_ids, self.class_names,
                            [s for r in records for s in r["segments"]])


def _box(mask: np.ndarray) -> list[int]:
  """Left, top, right and bottom of a mask, bool [H, W]."""
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def _paste_over(image: np.ndarray, masks: np.ndarray, least: np.ndarray,
                digit: base.Record,
                rng: np.random.Generator) -> np.ndarray | None:
  """Draws a digit on an image and its digits.

  Args:
    image: float32 [H, W, 3], drawn on.
    masks: bool [n, H, W], the visible pixels of the digits.
    least: [n], how many of them must stay visible.
    digit: to be drawn.
    rng: of the draws.

  Returns:
    The new masks, [n + 1, H, W]; None if no place is found where enough of
    the others stays visible, and nothing is drawn.
  """
  side = int(rng.integers(_SMALLEST_OBJECT, _LARGEST_OBJECT, endpoint=True))
  cover = _cover(digit, side)
  mask, n_visible = cover[..., 0] >= 0.5, masks.sum((1, 2))
  for _ in range(_TRIES):
    y, x = (int(rng.integers(whole - side, endpoint=True))
            for whole in image.shape[:2])
    where = np.s_[y:y + side, x:x + side]
    n_hidden = (masks[:, *where] & mask).sum((1, 2))
    if (n_visible - n_hidden >= least).all():
      break
  else:
    return None
  colour = rng.uniform(*_BRIGHT, 3).astype(np.float32)
  image[where] += cover * (colour - image[where])
  own = np.zeros((1, *image.shape[:2]), bool)
  own[0][where] = mask
  return np.concatenate([masks & ~own, own])


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
  scale = rng.uniform(1, min(4, photograph.width / width,
                             photograph.height / height))
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
  cover = _cover(digit, side)
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


def _cover(digit: base.Record, side: int) -> np.ndarray:
  """How much of each pixel a digit covers: float32 [side, side, 1]."""
  return np.asarray(Image.fromarray(digit["image"]).resize(
      (side, side), Image.Resampling.BICUBIC), np.float32)[..., None] / 255


def create(data: schema.Data, train: bool,
           with_boxes: bool = False) -> Scenes | ObjectScenes:
  """Opens a split: "train" and "test" by default, or "train[:32]".

  Args:
    data: its `train_split` and `eval_split`.
    train: the training split; else the evaluation split.
    with_boxes: scenes with boxes, not with label maps.

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
  kind = ObjectScenes if with_boxes else Scenes
  return kind(split, min(n, int(match[2])) if match[2] else n)


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment on scenes."""
  del files, train  # Nothing is on disk.
  n = arrays.DIGITS.n if cfg.task.name == "detection" else CLASSES.n
  yield from base.check_classes(cfg, n)
  for split in (True, False):
    try:
      create(cfg.data, split)
    except errors.ConfigError as e:
      yield str(e)
