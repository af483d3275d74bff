"""Average precision of boxes, as COCO defines it, computed by pycocotools."""

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools import coco, cocoeval

# Decimals of coordinates in files, in pixels.
_DECIMALS = 3


class GroundTruth(NamedTuple):
  """The objects of an evaluation split.

  Attributes:
    data_set: a COCO data set, {"images", "annotations", "categories"}, in which
      image i is that of record i.
    category_ids: its number of each of the model's classes; None for a class
      that it lacks.
  """

  data_set: Mapping[str, Any]
  category_ids: Sequence[int | None]


class _Detections(NamedTuple):
  """Detections, the best ones of an image first.

  Attributes:
    boxes: float32 [n, 4], x1, y1, x2 and y2 in pixels of the original image.
    scores: float32 [n].
    labels: int32 [n], the classes.
  """

  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray


_NOTHING = _Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32),
                       np.zeros(0, np.int32))


class AveragePrecision:
  """The measures of COCO over the images of a split, each exactly once.

  AP is the mean over the IoUs .5, .55, ..., .95 and over the classes that have
  objects. That of small, medium and large objects is for areas up to 32^2, from
  32^2 to 96^2, and from 96^2 pixels. Crowds do not count, nor do detections in
  them. Images that no batch has as valid, as they cannot be read, are left out
  together with their objects. Source: pycocotools, cocoeval.py.

  Each class is measured alone, on the images with an object or a detection of
  it: the result is the same, and takes less time and memory.
  """

  def __init__(self, ground_truth: Callable[[], GroundTruth],
               names: Sequence[str]):
    """An evaluator of a model with the classes `names`.

    `ground_truth` is called once, when the objects are first needed.
    """
    self._read, self._names = ground_truth, names
    self._truth = None
    self.reset()

  def reset(self) -> None:
    self._found: dict[int, _Detections] = {}  # By the number of the record.
    self._measured = None

  def statistics(self, outputs: Mapping[str, jax.Array],
                 batch) -> dict[str, jax.Array]:
    """The detections of a batch, and the records of its images.

    Args:
      outputs: "boxes", float32 [B, K, 4], in pixels of the original images;
        "scores", float32 [B, K], descending; "labels", int32 [B, K]; "valid",
        bool [B, K]. A detection that is not finite does not count.
      batch: "index", int32 [B], of the records; "mask", bool [B], false for
        what is not an example.
    """
    boxes, scores = outputs["boxes"], outputs["scores"]
    finite = jnp.isfinite(boxes).all(-1) & jnp.isfinite(scores)
    return {"boxes": boxes, "scores": scores, "labels": outputs["labels"],
            "valid": outputs["valid"] & finite,
            "index": jnp.where(batch["mask"], batch["index"], -1)}

  def update(self, statistics: Mapping[str, np.ndarray]) -> None:
    self._measured = None
    for i, index in enumerate(statistics["index"].tolist()):
      if index >= 0 and index not in self._found:
        valid = statistics["valid"][i]
        self._found[index] = _Detections(
            *(statistics[name][i][valid] for name in _Detections._fields))

  def result(self) -> dict[str, float]:
    """The measures; NaN where no object counts."""
    precision, _ = self._measure()
    return {"box_ap": _mean(precision[..., 0]),
            "box_ap50": _mean(precision[:, 0, :, 0]),
            "box_ap75": _mean(precision[:, 5, :, 0]),
            "box_ap_small": _mean(precision[..., 1]),
            "box_ap_medium": _mean(precision[..., 2]),
            "box_ap_large": _mean(precision[..., 3]),
            "n_examples": len(self._found)}

  def table(self) -> list[dict[str, Any]]:
    """AP of each class, None where no object counts; and its objects."""
    precision, counts = self._measure()
    rows = []
    for label, name in enumerate(self._names):
      of_class = precision[label, :, :, 0]
      rows.append({"class": label, "name": name, "ap": _defined(of_class),
                   "ap50": _defined(of_class[0]),
                   "ap75": _defined(of_class[5]), "objects": counts[label]})
    return rows

  def predictions(self) -> list[dict[str, Any]]:
    """The detections as COCO's results, with the data set's own numbers.

    Detections of classes that it lacks are left out.
    """
    data_set, category_ids = self._ground_truth()
    return [{"image_id": data_set["images"][index]["id"], **row}
            for index, found in sorted(self._found.items())
            for row in results(*found, category_ids)
            if row["category_id"] is not None]

  def _ground_truth(self) -> GroundTruth:
    if self._truth is None:
      self._truth = self._read()
    return self._truth

  def _measure(self) -> tuple[np.ndarray, list[int]]:
    """Precision and number of objects of each class; as long as it holds.

    Returns:
      Float64 [C, T, R, A] by class, IoU, recall and area, -1 where no object
      counts; and the objects that are no crowds.
    """
    if self._measured is None:
      images = self._ground_truth().data_set["images"]
      # pycocotools goes through images by id, which orders equal scores.
      records = sorted(self._found, key=lambda index: images[index]["id"])
      objects = self._objects([images[index]["id"] for index in records])
      found = [self._found[index] for index in records]
      numbers = np.repeat(np.arange(len(found)), [len(x[0]) for x in found])
      boxes, scores, labels = map(np.concatenate, zip(_NOTHING, *found))
      precision = []
      for label, of_class in enumerate(objects):
        chosen = labels == label
        precision.append(_precision(of_class, _annotations(
            numbers[chosen], boxes[chosen], scores[chosen])))
      self._measured = np.stack(precision), [
          sum(not x["iscrowd"] for x in of_class) for of_class in objects]
    return self._measured

  def _objects(self, image_ids: Sequence[Any]) -> list[list[dict[str, Any]]]:
    """The objects of each class, with their images renumbered from 0.

    pycocotools takes an object with the id 0 for none, and ids may be of any
    type.

    Raises:
      ValueError: an object's category is not one of the classes.
    """
    data_set, category_ids = self._ground_truth()
    numbers = {image_id: i for i, image_id in enumerate(image_ids)}
    labels = {category: label for label, category in enumerate(category_ids)}
    objects = [[] for _ in self._names]
    for x in data_set["annotations"]:
      if x["image_id"] not in numbers:
        continue
      if x["category_id"] not in labels:
        raise ValueError(f"an object has the category_id {x['category_id']}, "
                         "which is not one of the model's classes")
      _, _, width, height = x["bbox"]
      objects[labels[x["category_id"]]].append({
          "image_id": numbers[x["image_id"]], "bbox": x["bbox"],
          "area": x.get("area", width * height),
          "iscrowd": x.get("iscrowd", 0)})
    return objects


def results(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray,
            category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
  """Detections of an image in the form of COCO's files.

  Args:
    boxes: float32 [n, 4], x1, y1, x2 and y2.
    scores: float32 [n].
    labels: int [n].
    category_ids: of the labels; for those beyond them it is None.

  Returns:
    {"category_id", "bbox": [x, y, width, height], "score"} of each, with plain
    numbers: coordinates are rounded to a thousandth of a pixel, scores have the
    digits that tell float32 values apart.
  """
  category_ids = dict(enumerate(category_ids))
  return [{"category_id": category_ids.get(label), "bbox": box,
           "score": float(str(score))}
          for box, score, label in zip(
              _xywh(boxes).round(_DECIMALS).tolist(),
              np.asarray(scores, np.float32), np.asarray(labels).tolist())]


def _xywh(boxes: np.ndarray) -> np.ndarray:
  """x1, y1, x2, y2 -> x, y, width, height, [n, 4]; float64, as COCO's."""
  boxes = np.asarray(boxes, np.float64)
  return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _annotations(numbers: np.ndarray, boxes: np.ndarray,
                 scores: np.ndarray) -> list[dict[str, Any]]:
  """Detections of a class as pycocotools takes them."""
  return [{"image_id": number, "bbox": box, "area": box[2] * box[3],
           "score": score}
          for number, box, score in zip(
              numbers.tolist(), _xywh(boxes).tolist(), scores.tolist())]


def _precision(objects: list[dict[str, Any]],
               detections: list[dict[str, Any]]) -> np.ndarray:
  """The precision of one class, float64 [T, R, A]; -1 where no object counts.

  The annotations get numbers.
  """
  images = {x["image_id"] for x in (*objects, *detections)}
  with contextlib.redirect_stdout(io.StringIO()):  # It prints its progress.
    measured = cocoeval.COCOeval(_index(images, objects),
                                 _index(images, detections), "bbox")
    measured.params.maxDets = [100]
    measured.evaluate()
    measured.accumulate()
  return measured.eval["precision"][:, :, 0, :, 0]


def _index(images: Iterable[int],
           annotations: list[dict[str, Any]]) -> coco.COCO:
  """Annotations of a single category as pycocotools' own index."""
  indexed = coco.COCO()
  indexed.dataset = {
      "images": [{"id": i} for i in images], "categories": [{"id": 1}],
      "annotations": [{**x, "id": i, "category_id": 1}
                      for i, x in enumerate(annotations, 1)]}
  indexed.createIndex()
  return indexed


def _mean(precision: np.ndarray) -> float:
  """The mean where objects count; NaN if none does."""
  counted = precision[precision > -1]
  return float(counted.mean()) if counted.size else float("nan")


def _defined(precision: np.ndarray) -> float | None:
  mean = _mean(precision)
  return None if np.isnan(mean) else mean
