"""From a record with a label map to the arrays of a batch.

The operations are those of mmsegmentation 0.19, with which the published
results were made (the official PoolFormer's segmentation/configs), with
OpenCV's resampling. Images stay uint8 and are normalised on the device.
"""

import dataclasses
from typing import Any

import numpy as np

from metaformer_jax.config import schema, tasks
from metaformer_jax.config.tasks.segmentation import IGNORE
from metaformer_jax.data import images
from metaformer_jax.data.augment import cv_kernels, photometric
from metaformer_jax.data.sources import base
from metaformer_jax.data.transforms import framing

# Draws of a crop after the first, if one class has too much of it.
_REDRAWS = 10

Example = dict[str, Any]


def draw_size(height: int, width: int, task: tasks.Segmentation,
              rng: np.random.Generator) -> tuple[int, int]:
  """Draws the size that an image of a size is resized to (mmseg's Resize)."""
  factor = rng.uniform(*task.scale_range)
  return framing.rescaled(height, width,
                           [int(side * factor) for side in task.scale])


def draw_box(labels: np.ndarray, size: tuple[int, int],
             task: tasks.Segmentation,
             rng: np.random.Generator) -> tuple[int, int, int, int]:
  """Draws the crop of a resized image (mmseg's RandomCrop).

  It is drawn again, ten times at the most, while it shows one class only, or
  one that has `task.cat_max_ratio` of its pixels or more. Ignored pixels do not
  count.

  Args:
    labels: uint8 [H, W], before they are resized.
    size: (height, width) of the resized image.
    task: the section.
    rng: of the draws.

  Returns:
    (top, left, height, width); a side that is shorter than the crop's is whole.
  """
  inside = [min(side, wanted) for side, wanted in zip(size, task.crop_size)]
  for draw in range(1 + _REDRAWS):
    top, left = (int(rng.integers(side - part, endpoint=True))
                 for side, part in zip(size, inside))
    box = (top, left, *inside)
    if task.cat_max_ratio == 1 or draw == _REDRAWS:
      break
    n = cv_kernels.counts(crop_labels(labels, size, box, flip=False))[:IGNORE]
    if (n > 0).sum() > 1 and n.max() / n.sum() < task.cat_max_ratio:
      break
  return box


def crop_labels(labels: np.ndarray, size: tuple[int, int],
                box: tuple[int, int, int, int], *, flip: bool) -> np.ndarray:
  """Resizes a label map to the nearest labels, crops it, and mirrors it.

  Args:
    labels: uint8 [H, W].
    size: (height, width) of the whole resized map.
    box: (top, left, height, width) of the crop in it.
    flip: whether left and right are exchanged.

  Returns:
    uint8 [height, width] of the box.
  """
  rows, columns = (
      cv_kernels.nearest(n_in, n_out, start, n) for n_in, n_out, start, n in
      zip(labels.shape, size, box[:2], box[2:]))
  return cv_kernels.take(labels, rows,
                         columns[::-1].copy() if flip else columns)


def decode(record: base.Record, data: schema.Data,
            task: tasks.Segmentation) -> tuple[np.ndarray, np.ndarray]:
  """The image, uint8 [H, W, 3], and its label map, uint8 [H, W].

  Raises:
    Exception: either is unreadable, they differ in size, or a label is out of
      range.
  """
  image = np.asarray(images.decode(record["image"], data.max_pixels))
  labels = images.decode_labels(record["label"], data.max_pixels)
  if labels.shape != image.shape[:2]:
    raise ValueError(
        "the label map is {} x {}, but the image is {} x {} pixels".format(
            *labels.shape[::-1], *image.shape[1::-1]))
  return image, _classes(labels, task, record.get("numbers"))


def _classes(labels: np.ndarray, task: tasks.Segmentation,
             numbers: np.ndarray | None) -> np.ndarray:
  """The classes of a label map, uint8; `IGNORE` where it has none.

  Args:
    labels: integers [H, W], as in the file.
    task: with `reduce_zero_label`, 0 is ignored and the others are lowered; 255
      is always ignored.
    numbers: the new number of each class; None: they keep theirs.

  Raises:
    ValueError: a label is not of a class.
  """
  first = 1 if task.reduce_zero_label else 0
  n = task.num_classes if numbers is None else len(numbers)
  last = first + n - 1
  wrong = (labels < 0) | ((labels > last) & (labels != IGNORE))
  if wrong.any():
    y, x = np.argwhere(wrong)[0].tolist()
    raise ValueError(
        f"the label map has {labels[y, x]} at row {y}, column {x}; the labels "
        f"of {n} classes are 0 to {last}, and {IGNORE} to ignore")
  table = np.full(256, IGNORE, np.uint8)
  table[first:last + 1] = np.arange(n) if numbers is None else numbers
  return cv_kernels.look_up(labels.astype(np.uint8, copy=False), table)


def _padded(array: np.ndarray, size: tuple[int, int],
            value: int) -> np.ndarray:
  """The array at the top left of a canvas of (height, width)."""
  if array.shape[:2] == tuple(size):
    return array
  out = np.full((*size, *array.shape[2:]), value, array.dtype)
  out[:array.shape[0], :array.shape[1]] = array
  return out


def _resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  resized = cv_kernels.resize(image, size, (0, 0, *size), False)
  # As decoded pictures are, so that one program is compiled for both.
  resized.flags.writeable = False
  return resized


@dataclasses.dataclass(frozen=True)
class TrainTransform:
  """Resizes, crops, flips, distorts and pads: record, rng -> an example.

  {"image": uint8 [*crop_size, 3], "label": uint8 [*crop_size], "size": int32
  [2]}: the size of the image on its canvas, which is 0 below and to the right;
  the label there is 255.
  """

  data: schema.Data
  task: tasks.Segmentation

  def __call__(self, record: base.Record,
               rng: np.random.Generator) -> Example:
    task = self.task
    image, labels = decode(record, self.data, task)
    size = draw_size(*labels.shape, task, rng)
    box = draw_box(labels, size, task, rng)
    flip = rng.random() < task.flip
    image = cv_kernels.resize(image, size, box, flip)
    labels = crop_labels(labels, size, box, flip=flip)
    if task.photometric:
      image = photometric.apply(image, photometric.draw(rng))
    return {"image": _padded(image, task.crop_size, 0),
            "label": _padded(labels, task.crop_size, IGNORE),
            "size": np.array(labels.shape, np.int32)}


@dataclasses.dataclass(frozen=True)
class EvalTransform:
  """Resizes the whole image, stretches and pads it: record -> an example.

  {"image": uint8 [H, W, 3], "size": int32 [2], "label": uint8 [h, w],
  "label_size": int32 [2]}; and "image1", "size1", ... at the further
  `eval_scales`. The label map has its original size; the padding is 255.

  Attributes:
    data, task: the sections.
    canvases: what images may be padded to, of `framing.choose`; a batch has
      one of them. Without any, sides are padded to multiples of 128.
  """

  data: schema.Data
  task: tasks.Segmentation
  canvases: tuple[framing.Canvas, ...] = ()

  def groups(self, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """The images that each canvas is for, in order, by index.

    Args:
      sizes: int [N, 2], heights and widths; images for which they are 0 are in
        the last group.
    """
    last = len(self.canvases) - 1
    found = {(0, 0): last}
    for height, width in np.unique(sizes, axis=0).tolist():
      if height and width:
        found[height, width] = self.canvas_of(height, width)
    chosen = np.array([found.get(tuple(size), last)
                       for size in sizes.tolist()], np.int64)
    return tuple(np.flatnonzero(chosen == i)
                 for i in range(len(self.canvases)))

  def canvas_of(self, height: int, width: int) -> int:
    """The index of the smallest canvas that holds an image.

    Raises:
      ValueError: it fits into none.
    """
    own = framing.needed(height, width, self.task)
    for i, canvas in enumerate(self.canvases):  # By their area.
      if framing.fits(own, canvas):
        return i
    raise ValueError(f"an image of {width} x {height} pixels fits into none of "
                     "the canvases that were chosen for the data")

  def __call__(self, record: base.Record,
               rng: np.random.Generator | None = None) -> Example:
    """Makes an example; a record's "group" is the number of its canvas."""
    del rng
    image, labels = decode(record, self.data, self.task)
    canvas = self._canvas(*labels.shape, record.get("group"))
    example = self._images(image, canvas)
    return {**example, "label": _padded(labels, canvas.labels, IGNORE)}

  def preprocess(self, image: bytes | np.ndarray) -> Example:
    """An image without a label map, on a canvas of its own; labels are 255."""
    picture = np.asarray(images.decode(image, self.data.max_pixels))
    canvas = framing.needed(*picture.shape[:2], self.task, framing.ALONE)
    return {**self._images(picture, canvas),
            "label": np.full(canvas.labels, IGNORE, np.uint8)}

  def blank(self, group: int) -> Example:
    """An example of a canvas that nothing counts in."""
    canvas = self.canvases[group]
    example = {"label": np.full(canvas.labels, IGNORE, np.uint8),
               "label_size": np.array(canvas.labels, np.int32)}
    for suffix, size in zip(self._suffixes(), canvas.images):
      example[f"image{suffix}"] = np.zeros((*size, 3), np.uint8)
      example[f"size{suffix}"] = np.array(size, np.int32)
    return example

  def _suffixes(self) -> list[str]:
    """Of the keys of each scale."""
    return ["", *map(str, range(1, len(self.task.eval_scales)))]

  def _canvas(self, height: int, width: int,
              group: int | None) -> framing.Canvas:
    if not self.canvases:
      return framing.needed(height, width, self.task, framing.ALONE)
    most = framing.longest(self.data.max_pixels)
    if max(height, width) > most:
      raise ValueError(f"an image of {width} x {height} pixels is not "
                       f"evaluated beside others: a side is longer than {most}")
    own = framing.needed(height, width, self.task)
    canvas = self.canvases[self.canvas_of(height, width) if group is None
                           else group]
    if not framing.fits(own, canvas):
      raise ValueError(f"the image has {width} x {height} pixels, which is not "
                       "what its header said")
    return canvas

  def _images(self, image: np.ndarray, canvas: framing.Canvas) -> Example:
    height, width, _ = image.shape
    example = {"label_size": np.array((height, width), np.int32)}
    sizes = framing.network_sizes(height, width, self.task)
    for suffix, (size, stretched), whole in zip(self._suffixes(), sizes,
                                                canvas.images):
      resized = _resize(image, size)
      if stretched != size:
        resized = _resize(resized, stretched)
      example[f"image{suffix}"] = _padded(resized, whole, 0)
      example[f"size{suffix}"] = np.array(stretched, np.int32)
    return example
