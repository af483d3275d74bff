"""From a record with boxes to the arrays of a batch.

The operations are those of mmdetection 2.19, with which the published results
were made (the official PoolFormer's detection/configs), with OpenCV's
resampling. Images stay uint8 and are normalised on the device.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import images
from metaformer_jax.data.augment import cv_kernels
from metaformer_jax.data.sources import base, objects, outlines
from metaformer_jax.data.transforms import framing, masks

Example = dict[str, Any]


def decode(record: base.Record, data: schema.Data, n_classes: int,
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The image, uint8 [H, W, 3], boxes, float32 [n, 4], and labels, int32 [n].

  Raises:
    Exception: the image is unreadable, or of another size than its boxes are
      meant for; a box or a label is none.
  """
  image = np.asarray(images.decode(record["image"], data.max_pixels))
  size, meant = image.shape[:2], tuple(record["size"])
  if size != meant:
    advice = ("; its orientation in EXIF is not applied: save it upright"
              if size == meant[::-1] else "")
    raise ValueError("the image is {} x {} pixels, but its boxes are for {} x "
                     "{}{}".format(*size[::-1], *meant[::-1], advice))
  boxes = np.asarray(record["boxes"], np.float32).reshape(-1, 4)
  labels = np.asarray(record["labels"], np.int32)
  wrong = ~np.isfinite(boxes).all(1) | (boxes[:, :2] > boxes[:, 2:]).any(1)
  if wrong.any():
    raise ValueError(f"the box {boxes[wrong][0].tolist()} is not left, top, "
                     "right and bottom")
  wrong = (labels < 0) | (labels >= n_classes)
  if len(labels) != len(boxes) or wrong.any():
    what = f"the label {labels[wrong][0]}" if wrong.any() else (
        f"{len(labels)} labels for {len(boxes)} boxes")
    raise ValueError(f"{what}; the labels of {n_classes} classes are 0 to "
                     f"{n_classes - 1}")
  return image, boxes, labels


def _segments(record: base.Record) -> Sequence[outlines.Segment]:
  """The outlines of a record; ValueError unless each of its boxes has one."""
  segments, n = record.get("segments", ()), len(record["labels"])
  if len(segments) != n:
    raise ValueError(f"{len(segments)} segments for {n} boxes; masks need an "
                     "outline, or None, for each")
  return segments


def move_boxes(boxes: np.ndarray, old: framing.Size, new: framing.Size, *,
               flip: bool) -> np.ndarray:
  """Boxes in the resized, then mirrored image (mmdet's Resize, RandomFlip).

  Args:
    boxes: float32 [n, 4], left, top, right and bottom.
    old, new: (height, width) of the image before and after.
    flip: whether left and right are exchanged.

  Returns:
    float32 [n, 4], clipped to the image.
  """
  height, width = new
  factors = np.array([width / old[1], height / old[0]] * 2, np.float32)
  limits = np.array([width, height] * 2, np.float32)
  boxes = np.clip(boxes * factors, 0, limits)
  if flip:
    boxes[:, [2, 0]] = width - boxes[:, [0, 2]]
  return boxes


@dataclasses.dataclass(frozen=True)
class _Canvases:
  """The two canvases, and the images that go on each.

  Attributes:
    data, task: the sections.
  """

  data: schema.Data
  task: tasks.Detection

  def canvas_of(self, height: int, width: int) -> int:
    """The index in `task.canvases`: 0 if the image is not higher than wide."""
    return min(int(height > width), len(self.task.canvases) - 1)

  def _by_canvas(self, sizes: np.ndarray,
                 usable: np.ndarray) -> tuple[np.ndarray, ...]:
    numbers = np.minimum(sizes[:, 0] > sizes[:, 1], len(self.task.canvases) - 1)
    return tuple(np.flatnonzero((numbers == i) & usable)
                 for i in range(len(self.task.canvases)))

  def _image(self, image: np.ndarray, size: framing.Size, canvas: int, *,
             flip: bool = False) -> np.ndarray:
    """The image, resized to (height, width), at the top left of a canvas."""
    whole = np.zeros((*self.task.canvases[canvas], 3), np.uint8)
    whole[:size[0], :size[1]] = cv_kernels.resize(
        image, size, (0, 0, *size), flip)
    return whole


@dataclasses.dataclass(frozen=True)
class TrainTransform(_Canvases):
  """Resizes, flips and pads: record, rng -> an example.

  {"image": uint8 [H, W, 3], of one of `task.canvases`; "size": int32 [2],
  height and width of the image on it, which is 0 below and to the right;
  "boxes": float32 [max_boxes, 4] in it, the objects first, in their order;
  "labels": int32 [max_boxes], -1 where there is no object; "overflow": int32,
  the number of objects that did not fit in}.

  With `task.has_masks`, objects without an outline are left out, and there are
  "masks": uint8 [max_boxes, M, M], M = `task.object_mask_size`, and "frames":
  float32 [max_boxes, 4], the parts of the canvas that these cover
  (`masks.crop`); 0 where there is no object.
  """

  def groups(self, source: base.Source) -> tuple[np.ndarray, ...]:
    """The images of each canvas that training has, by index.

    Those with a side below 32 are left out, and with `task.filter_empty` those
    without objects.

    Raises:
      ConfigError: no image is left.
    """
    sizes = source.sizes()
    usable = sizes.min(1) >= objects.SHORTEST
    if self.task.filter_empty:
      usable &= source.has_objects()
    if not usable.any():
      rule = (" and objects; config.task.filter_empty=False takes those that "
              "have none" if self.task.filter_empty else "")
      raise errors.ConfigError(
          f"config.data.path: of the {len(sizes)} training images, none has "
          f"sides of {objects.SHORTEST} pixels or more{rule}")
    return self._by_canvas(sizes, usable)

  def __call__(self, record: base.Record,
               rng: np.random.Generator) -> Example:
    task = self.task
    image, boxes, labels = decode(record, self.data, task.num_classes)
    old = image.shape[:2]
    size = framing.rescaled(*old, task.scale)
    flip = rng.random() < task.flip
    boxes = move_boxes(boxes, old, size, flip=flip)
    # What is left of a box at the border can be less than float32 tells apart.
    kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    if task.has_masks:
      kept &= np.array([segment is not None and len(segment) > 0
                        for segment in _segments(record)], bool)
    kept = np.flatnonzero(kept)
    n = min(len(kept), task.max_boxes)
    example = {
        "image": self._image(image, size, self.canvas_of(*old), flip=flip),
        "size": np.array(size, np.int32),
        "boxes": np.zeros((task.max_boxes, 4), np.float32),
        "labels": np.full(task.max_boxes, -1, np.int32),
        "overflow": np.int32(len(kept) - n)}
    example["boxes"][:n] = boxes[kept[:n]]
    example["labels"][:n] = labels[kept[:n]]
    if task.has_masks:
      segments = [record["segments"][i] for i in kept[:n]]
      example |= self._masks(segments, example["boxes"], old, size, flip=flip)
    return example

  def _masks(self, segments: Sequence[outlines.Segment], boxes: np.ndarray,
             old: framing.Size, new: framing.Size, *,
             flip: bool) -> Example:
    """"masks" and "frames" of the objects; their other values as for boxes."""
    side = self.task.object_mask_size
    found = {"masks": np.zeros((self.task.max_boxes, side, side), np.uint8),
             "frames": np.zeros((self.task.max_boxes, 4), np.float32)}
    for i, segment in enumerate(segments):
      bitmap = outlines.decode(segment, old)
      cropped = masks.crop(bitmap, new, side, flip=flip)
      if cropped:
        found["masks"][i], found["frames"][i] = cropped
      else:  # Too small for the resized image; an empty mask is learned.
        corner = np.floor(boxes[i, :2])
        found["frames"][i] = [*corner, *(corner + side)]
    return found


@dataclasses.dataclass(frozen=True)
class EvalTransform(_Canvases):
  """Resizes and pads the whole image: record -> an example.

  {"image": uint8 [H, W, 3], "size": int32 [2], as in training;
  "original_size": int32 [2]; "index": int32, of the record, -1 for padding}.
  """

  def groups(self, source: base.Source) -> tuple[np.ndarray, ...]:
    """All images, those of each canvas, by index."""
    sizes = source.sizes()
    return self._by_canvas(sizes, np.ones(len(sizes), bool))

  def __call__(self, record: base.Record,
               rng: np.random.Generator | None = None) -> Example:
    del rng
    image, _, _ = decode(record, self.data, self.task.num_classes)
    return {**self._example(image), "index": np.int32(record["index"])}

  def preprocess(self, image: bytes | np.ndarray) -> Example:
    """An image that is not of a data set; without "index"."""
    return self._example(
        np.asarray(images.decode(image, self.data.max_pixels)))

  def _example(self, image: np.ndarray) -> Example:
    old = image.shape[:2]
    size = framing.rescaled(*old, self.task.scale)
    return {"image": self._image(image, size, self.canvas_of(*old)),
            "size": np.array(size, np.int32),
            "original_size": np.array(old, np.int32)}

  def blank(self, group: int) -> Example:
    """An example of a canvas that nothing counts in."""
    canvas = self.task.canvases[group]
    return {"image": np.zeros((*canvas, 3), np.uint8),
            "size": np.array(canvas, np.int32),
            "original_size": np.array(canvas, np.int32),
            "index": np.int32(-1)}
