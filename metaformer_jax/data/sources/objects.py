"""The objects of many images as a few arrays, whatever they were read from.

COCO has 860,001 objects in 118,287 images: as dicts they would take a gigabyte
in each process that reads them.
"""

import dataclasses
import functools
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from metaformer_jax.config import tensor_files
from metaformer_jax.data.sources import fingerprints, outlines

log = logging.getLogger(__name__)

# Training leaves out images of which a side is shorter (mmdetection).
SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Objects:
  """Objects of N images, A in all: those of image i are starts[i:i + 2].

  Attributes:
    image_ids: int64 [N], the numbers of the images in COCO files.
    sizes: int32 [N, 2], heights and widths.
    starts: int64 [N + 1].
    boxes: float64 [A, 4], left, top, width and height, in pixels.
    labels: int32 [A].
    areas: float64 [A], in pixels, of the objects and not of their boxes.
    crowd: bool [A], whether it is a group of objects.
    ignored: bool [A], whether training ignores it.
  """

  image_ids: np.ndarray
  sizes: np.ndarray
  starts: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  areas: np.ndarray
  crowd: np.ndarray
  ignored: np.ndarray

  def __len__(self) -> int:
    return len(self.image_ids)

  @functools.cached_property
  def is_inside(self) -> np.ndarray:
    """bool [A]: whether a box has a part of its image."""
    height, width = np.repeat(self.sizes, np.diff(self.starts), axis=0).T
    left, top, w, h = self.boxes.T
    return ((np.minimum(left + w, width) - np.maximum(left, 0) > 0)
            & (np.minimum(top + h, height) - np.maximum(top, 0) > 0))

  @functools.cached_property
  def is_large(self) -> np.ndarray:
    """bool [A]: whether an object has an area, and its box a whole pixel."""
    return (self.areas > 0) & (self.boxes[:, 2:] >= 1).all(1)

  @functools.cached_property
  def is_trained(self) -> np.ndarray:
    """bool [A]: the objects of training.

    As in mmdetection 2.19, CocoDataset._parse_ann_info.
    """
    return self.is_inside & self.is_large & ~self.crowd & ~self.ignored

  def has_objects(self) -> np.ndarray:
    """bool [N]: which images have any object, also one not trained on.

    As in mmdetection 2.19, CocoDataset._filter_imgs.
    """
    return np.diff(self.starts) > 0

  def rows(self, index: int) -> np.ndarray:
    """The objects of an image that training has, as indices of the arrays."""
    start, stop = self.starts[index:index + 2]
    return start + np.flatnonzero(self.is_trained[start:stop])

  def record(self, index: int) -> dict[str, Any]:
    """"boxes", "labels" and "size" of a record (`base`)."""
    rows = self.rows(index)
    boxes = self.boxes[rows]
    boxes[:, 2:] += boxes[:, :2]
    return {"boxes": boxes.astype(np.float32), "labels": self.labels[rows],
            "size": tuple(self.sizes[index].tolist())}

  def rows_of(self, images: np.ndarray) -> np.ndarray:
    """All objects of some images, one after another, as int64 indices."""
    counts = np.diff(self.starts)[images]
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(
        self.starts[:-1][images] - before, counts)

  def subset(self, images: np.ndarray) -> "Objects":
    """The objects of some of the images, in their order."""
    starts = np.cumsum([0, *np.diff(self.starts)[images]])
    rows = self.rows_of(images)
    return Objects(self.image_ids[images], self.sizes[images], starts, *(
        getattr(self, name)[rows] for name in PER_OBJECT))

  def annotations(self, category_ids: Sequence[int], names: Sequence[str],
                  segments: Sequence[outlines.Segment] | None = None,
                  ) -> dict[str, list[dict[str, Any]]]:
    """The objects as a COCO data set, for its evaluation.

    Args:
      category_ids, names: of the classes, by label.
      segments: the objects' outlines, if they are needed.
    """
    sizes, images = self.sizes.tolist(), self.image_ids.tolist()
    of = np.repeat(self.image_ids, np.diff(self.starts)).tolist()
    categories = np.array(category_ids)[self.labels].tolist()
    columns = zip(of, categories, self.boxes.tolist(), self.areas.tolist(),
                  self.crowd.astype(int).tolist())
    shapes = itertools.repeat({}) if segments is None else (
        {"segmentation": segment} for segment in segments)
    # Numbered from 1: pycocotools takes a match with number 0 for none.
    return {
        "images": [{"id": i, "height": height, "width": width}
                   for i, (height, width) in zip(images, sizes)],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category,
             "bbox": box, "area": area, "iscrowd": crowd, **shape}
            for number, ((image, category, box, area, crowd), shape) in
            enumerate(zip(columns, shapes), 1)],
        "categories": [{"id": i, "name": name}
                       for i, name in zip(category_ids, names)]}


PER_OBJECT = ("boxes", "labels", "areas", "crowd", "ignored")

# Types, and numbers of axes, of the arrays of a file.
_TYPES = {"image_ids": (np.int64, 1), "sizes": (np.int32, 2),
          "starts": (np.int64, 1), "boxes": (np.float64, 2),
          "labels": (np.int32, 1), "areas": (np.float64, 1), "crowd": (bool, 1),
          "ignored": (bool, 1), "category_ids": (np.int64, 1)}


def save(found: Objects, category_ids: Sequence[int]) -> bytes:
  """The content of a file that `load` reads: safetensors of all arrays."""
  arrays = {name: getattr(found, name) for name in _TYPES
            if name != "category_ids"}
  arrays["category_ids"] = category_ids
  return safetensors.numpy.save(
      {name: np.ascontiguousarray(array, _TYPES[name][0])
       for name, array in arrays.items()})


def load(path: str | os.PathLike[str]) -> tuple[Objects, tuple[int, ...]]:
  """The objects in a file, and the numbers of their classes.

  Raises:
    OSError, ValueError: it is missing, damaged, or not of `save`.
  """
  with tensor_files.opened(path) as file:
    arrays = {name: file.get_tensor(name)
              for name in file.keys()}  # noqa: SIM118
  if arrays.keys() != _TYPES.keys() or any(
      (array.dtype, array.ndim) != _TYPES[name]
      for name, array in arrays.items()):
    raise ValueError("it has other arrays than a table of objects")
  ids = arrays.pop("category_ids")
  found = Objects(**arrays)
  n_images, n = len(found.image_ids), len(found.boxes)
  starts, labels = found.starts, found.labels
  good = (
      found.sizes.shape == (n_images, 2) and (found.sizes > 0).all()
      and found.boxes.shape == (n, 4) and np.isfinite(found.boxes).all()
      and all(len(getattr(found, name)) == n for name in PER_OBJECT)
      and len(starts) == n_images + 1 and starts[0] == 0 and starts[-1] == n
      and (np.diff(starts) >= 0).all()
      and ((labels >= 0) & (labels < len(ids))).all())
  if not good:
    raise ValueError("its arrays do not fit together")
  return found, tuple(ids.tolist())


class Source:
  """What sources of objects have in common, without `__getitem__`.

  Attributes:
    objects: of all images.
    n_classes, class_names: of the labels.
    category_ids: the numbers of the classes in COCO files, by label.
    outlined: bool [A], which objects have an outline; None if none is needed.
    segments: the outlines; None if they are not needed, or are in the records.
  """

  def __init__(self, objects: Objects, names: Sequence[str],
               category_ids: Sequence[int],
               outlined: np.ndarray | None = None,
               segments: Sequence[outlines.Segment] | None = None):
    self.objects, self.outlined, self.segments = objects, outlined, segments
    self.class_names, self.category_ids = tuple(names), tuple(category_ids)
    self.n_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self.objects)

  def sizes(self) -> np.ndarray:
    """Heights and widths of the images: int32 [N, 2]."""
    return self.objects.sizes

  def has_objects(self) -> np.ndarray:
    """As `Objects.has_objects`."""
    return self.objects.has_objects()

  def annotations(self) -> dict[str, list[dict[str, Any]]]:
    """A COCO data set, whose images are those of the records, in order."""
    return self.objects.annotations(self.category_ids, self.class_names,
                                    self.segments)

  def fingerprint(self) -> dict[str, str]:
    """A digest of the objects and their classes' numbers, without outlines."""
    return {"objects": fingerprints.arrays(
        np.array(self.category_ids),
        *(getattr(self.objects, field.name)
          for field in dataclasses.fields(self.objects)))}

  def missing(self) -> list[str]:
    """A line if training with masks leaves objects out that boxes have."""
    if self.outlined is None:
      return []
    wrong = np.flatnonzero(self.objects.is_trained & ~self.outlined)
    if not len(wrong):
      return []
    image = np.searchsorted(self.objects.starts, wrong[0], "right") - 1
    return [f"{len(wrong):,} objects have no outline that can be used, the "
            f"first in the image {self.objects.image_ids[image]}; training "
            "with masks leaves them out"]

  def check(self) -> Iterator[str]:
    """Yields a line if masks are needed, but no object has an outline."""
    if self.outlined is not None and not self.outlined.any():
      yield ("config.task.head: masks need outlines, and no object of "
             "config.data.path has one that can be used; faster_rcnn and "
             "retinanet need boxes only")


@functools.cache  # Once, though a run opens its data several times.
def report(file: pathlib.Path, notes: tuple[str, ...]) -> None:
  """Logs what is left out of the objects of a file."""
  for note in notes:
    log.warning("%s: %s", file, note)
