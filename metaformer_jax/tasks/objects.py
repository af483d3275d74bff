"""Objects of a data set, for the evaluation, and those found on an image.

The latter, for users, as a dict, as rows, or as a COCO data set.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as pymask

from metaformer_jax.config import schema, tasks
from metaformer_jax.data.sources import base as data
from metaformer_jax.data.sources import outlines
from metaformer_jax.data.transforms import detection as transforms
from metaformer_jax.evaluation import coco_ap, masks
from metaformer_jax.tasks import base

log = logging.getLogger(__name__)


def ground_truth(source: data.Source, with_masks: bool) -> coco_ap.GroundTruth:
  """The objects of an evaluation split, which detections are compared with.

  Args:
    source: of records with objects.
    with_masks: whether their outlines are needed. Objects without one that can
      be used are counted in a warning.
  """
  truth = coco_ap.GroundTruth(source.annotations(), source.category_ids)
  if not with_masks:
    return truth
  sizes = {image["id"]: (image["height"], image["width"])
           for image in truth.data_set["images"]}
  annotations, reasons = [], []
  for row in truth.data_set["annotations"]:
    row = {**row}
    try:
      row["segmentation"] = outlines.encode(row.get("segmentation"),
                                            sizes[row["image_id"]])
    except ValueError as e:
      row["segmentation"] = None
      reasons.append(f"that with the id {row.get('id')} {e}")
    annotations.append(row)
  if reasons:
    log.warning("%d objects of the evaluation split have no outline that can "
                "be used, and do not count for mask AP; the first: %s",
                len(reasons), reasons[0])
  return truth._replace(data_set={**truth.data_set, "annotations": annotations})


@dataclasses.dataclass(frozen=True)
class Masks(Sequence):
  """Masks of objects on an image: bool [height, width] each.

  Each is made when it is read: all of a photo's would take gigabytes.

  Attributes:
    probabilities: float32 [n, M, M], inside of the boxes.
    boxes: float32 [n, 4], x1, y1, x2 and y2 in pixels.
    size: height and width of the image.
    threshold: pixels of an object have at least this probability.
  """

  probabilities: np.ndarray
  boxes: np.ndarray
  size: tuple[int, int]
  threshold: float

  def __len__(self) -> int:
    return len(self.boxes)

  def __getitem__(self, index: int) -> np.ndarray:
    return next(masks.paste(self.probabilities[index][None],
                            self.boxes[index][None], self.size, self.threshold))


def find(outputs: Mapping[str, np.ndarray], size: Sequence[int],
         names: Sequence[str] | None,
         mask_threshold: float | None = None) -> dict[str, Any]:
  """The detections of one image without the padding; for `Task.postprocess`.

  Args:
    outputs: "boxes", float32 [K, 4], x1, y1, x2 and y2 in pixels of the
      original image; "scores", float32 [K], descending; "labels", int32 [K];
      "valid", bool [K]; for masks "masks", float32 [K, M, M].
    size: height and width of the original image.
    names: of the classes, if they are known.
    mask_threshold: for masks, as in `coco_ap.AveragePrecision`.

  Returns:
    {"boxes": float32 [n, 4]; "scores": float32 [n]; "classes": int [n];
    "names": theirs, if they are known; "size": (height, width); and, with a
    threshold, "masks": `Masks` [n]}, the best object first.
  """
  outputs = {name: np.asarray(x) for name, x in outputs.items()}
  valid = (outputs["valid"] & np.isfinite(outputs["scores"])
           & np.isfinite(outputs["boxes"]).all(-1))
  if mask_threshold is not None:
    valid &= np.isfinite(outputs["masks"]).all((-2, -1))
  found = {"boxes": outputs["boxes"][valid], "scores": outputs["scores"][valid],
           "classes": outputs["labels"][valid],
           "size": (int(size[0]), int(size[1]))}
  if mask_threshold is not None:
    found["masks"] = Masks(outputs["masks"][valid], found["boxes"],
                           found["size"], mask_threshold)
  if names:
    found["names"] = [names[i] for i in found["classes"]]
  return found


def truth(record: data.Record, section: schema.Data, task: tasks.Detection,
          names: Sequence[str] | None) -> dict[str, Any]:
  """The objects of a record, as `find` returns them; "scores" are None.

  With `task.has_masks` there are masks, of objects without an outline empty.

  Raises:
    Exception: of many types; the record is not usable.
  """
  image, boxes, labels = transforms.decode(record, section, task.num_classes)
  size = image.shape[:2]
  found = _known(boxes, labels, size, names)
  if task.has_masks:
    found["masks"] = [
        np.zeros(size, bool) if segment is None
        else outlines.decode(segment, size).astype(bool)
        for segment in record["segments"]]
  return found


def of_batch(batch: Mapping[str, np.ndarray], names: Sequence[str] | None,
             ) -> list[tuple[np.ndarray, dict[str, Any]]]:
  """The images of a training batch, each with its objects; as `truth`."""
  examples = []
  for i, (height, width) in enumerate(batch["size"].tolist()):
    kept = batch["labels"][i] >= 0
    found = _known(batch["boxes"][i][kept], batch["labels"][i][kept],
                   (height, width), names)
    if "masks" in batch:
      found["masks"] = [
          _pasted(mask, frame, (height, width)) for mask, frame in zip(
              batch["masks"][i][kept], batch["frames"][i][kept])]
    examples.append((batch["image"][i][:height, :width], found))
  return examples


def _known(boxes: np.ndarray, labels: np.ndarray, size: Sequence[int],
           names: Sequence[str] | None) -> dict[str, Any]:
  found = {"boxes": boxes, "scores": None, "classes": labels,
           "size": tuple(size)}
  return found | ({"names": [names[i] for i in labels]} if names else {})


def _pasted(cells: np.ndarray, frame: np.ndarray,
            size: tuple[int, int]) -> np.ndarray:
  """The mask bool [H, W] of cells [M, M] that divide a frame, in pixels."""
  left, top, right, bottom = map(int, frame)
  rows, columns = (
      (np.arange(n) + 0.5) * len(cells) // n for n in (bottom - top,
                                                       right - left))
  part = cells[rows.astype(int)][:, columns.astype(int)] > 0
  whole = np.zeros(size, bool)
  inside = whole[top:bottom, left:right]  # A frame may end beyond the image.
  inside[...] = part[:inside.shape[0], :inside.shape[1]]
  return whole


def describe(found: Mapping[str, Any], top: int) -> base.Rows:
  """The `top` best objects, for `Task.describe`; boxes in pixels."""
  names = found.get("names", found["classes"])
  return [{"class": int(number), "name": str(name), "score": float(score),
           **dict(zip(("x1", "y1", "x2", "y2"), box.tolist()))}
          for number, name, score, box in zip(
              found["classes"], names, found["scores"], found["boxes"])][:top]


def annotations(found: Mapping[str, Any], names: Sequence[str],
                category_ids: Sequence[int] | None) -> dict[str, base.Rows]:
  """All objects as a COCO data set of one image, for `Task.annotations`.

  Args:
    found: what `find` returned.
    names: of all classes.
    category_ids: their numbers in COCO's files; None: 1, 2, ...
  """
  height, width = found["size"]
  category_ids = category_ids or range(1, len(names) + 1)
  rles = list(map(masks.rle, found["masks"])) if "masks" in found else None
  rows = coco_ap.results(found["boxes"], found["scores"], found["classes"],
                         rles, category_ids)
  areas = ([round(row["bbox"][2] * row["bbox"][3], 3) for row in rows]
           if rles is None else map(int, map(pymask.area, rles)))
  return {
      "images": [{"width": width, "height": height}],
      "categories": [{"id": i, "name": name}
                     for i, name in zip(category_ids, names)],
      "annotations": [{**row, "area": area, "iscrowd": 0}
                      for row, area in zip(rows, areas)]}
