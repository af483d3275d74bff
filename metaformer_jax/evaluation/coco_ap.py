"""Average precision of boxes and masks, as COCO defines it, by pycocotools."""

import contextlib
import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pycocotools import coco, cocoeval
from pycocotools import mask as pymask

from metaformer_jax.evaluation import masks

# Decimals of coordinates in files, in pixels.
_DECIMALS = 3


class GroundTruth(NamedTuple):
  """The objects of an evaluation split.

  Attributes:
    data_set: a COCO data set, {"images", "annotations", "categories"}, in which
      image i is that of record i. For masks, annotations have "segmentation",
      an RLE as `masks.rle` gives it; those without one are not in mask AP.
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
    masks: their RLEs, as `masks.rle` gives them; None without masks.
  """

  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  masks: Sequence[dict[str, Any]] | None = None


_ARRAYS = ("boxes", "scores", "labels")

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
  it: the result is the same, and takes less time and memory. Masks are kept as
  RLEs, of half a kilobyte each: 250 MB for 5,000 images with 100 detections.
  """

  def __init__(self, ground_truth: Callable[[], GroundTruth],
               names: Sequence[str], mask_threshold: float | None = None):
    """An evaluator of a model with the classes `names`.

    Args:
      ground_truth: called once, when the objects are first needed.
      names: of the classes.
      mask_threshold: pixels of an object have at least this probability; None:
        only boxes are measured.
    """
    self._read, self._names = ground_truth, names
    self._threshold = mask_threshold
    self._has_masks = mask_threshold is not None
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
        bool [B, K]; for masks "masks", float32 [B, K, M, M], probabilities
        inside of the boxes. A detection that is not finite does not count.
      batch: "index", int32 [B], of the records; "mask", bool [B], false for
        what is not an example; for masks "original_size", int32 [B, 2].
    """
    names = ("boxes", "scores", *(["masks"] if self._has_masks else ()))
    finite = [jnp.isfinite(outputs[name]).reshape(
        *outputs["valid"].shape, -1).all(-1) for name in names]
    found = {name: outputs[name] for name in (*names, "labels")}
    if self._has_masks:
      found["size"] = batch["original_size"]
    return found | {
        "valid": functools.reduce(jnp.logical_and, finite, outputs["valid"]),
        "index": jnp.where(batch["mask"], batch["index"], -1)}

  def update(self, statistics: Mapping[str, np.ndarray]) -> None:
    self._measured = None
    rows = {index: i for i, index in enumerate(statistics["index"].tolist())
            if index >= 0 and index not in self._found}
    images = ({name: x[i] for name, x in statistics.items()}
              for i in rows.values())
    with futures.ThreadPoolExecutor() as pool:  # To paste masks.
      self._found |= dict(zip(rows, pool.map(self._detected, images)))

  def _detected(self, image: Mapping[str, np.ndarray]) -> _Detections:
    """What `statistics` has of an image."""
    valid = image["valid"]
    found = _Detections(*(image[name][valid] for name in _ARRAYS))
    if not self._has_masks:
      return found
    return found._replace(masks=[masks.rle(mask) for mask in masks.paste(
        image["masks"][valid], found.boxes, image["size"], self._threshold)])

  def result(self) -> dict[str, float]:
    """The measures; NaN where no object counts."""
    found = {}
    for kind, precision in self._measure()[0].items():
      found |= {f"{kind}_ap": _mean(precision[..., 0]),
                f"{kind}_ap50": _mean(precision[:, 0, :, 0]),
                f"{kind}_ap75": _mean(precision[:, 5, :, 0]),
                f"{kind}_ap_small": _mean(precision[..., 1]),
                f"{kind}_ap_medium": _mean(precision[..., 2]),
                f"{kind}_ap_large": _mean(precision[..., 3])}
    return found | {"n_examples": len(self._found)}

  def table(self) -> list[dict[str, Any]]:
    """AP of each class, None where no object counts; and its objects."""
    precision, counts = self._measure()
    rows = []
    for label, name in enumerate(self._names):
      row = {"class": label, "name": name}
      for kind, of_all in precision.items():
        start, of_class = "mask_" * (kind == "mask"), of_all[label, :, :, 0]
        row |= {f"{start}ap": _defined(of_class),
                f"{start}ap50": _defined(of_class[0]),
                f"{start}ap75": _defined(of_class[5])}
      rows.append({**row, "objects": counts[label]})
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

  def _measure(self) -> tuple[dict[str, np.ndarray], list[int]]:
    """Precision and number of objects of each class; as long as it holds.

    Returns:
      "box" and "mask": float64 [C, T, R, A] by class, IoU, recall and area, -1
      where no object counts; and the objects that are no crowds.
    """
    if self._measured is None:
      images = self._ground_truth().data_set["images"]
      # pycocotools goes through images by id, which orders equal scores.
      records = sorted(self._found, key=lambda index: images[index]["id"])
      objects = self._objects([images[index]["id"] for index in records])
      kinds = {"box": "bbox"} | ({"mask": "segm"} if self._has_masks else {})
      precision = [[_precision(*pair, kind) for kind in kinds.values()]
                   for pair in zip(objects, self._detections(records))]
      self._measured = dict(zip(kinds, np.stack(precision, 1))), [
          sum(not x["iscrowd"] for x in of_class) for of_class in objects]
    return self._measured

  def _detections(self,
                  records: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
    """The detections of each class, on images numbered as the records are."""
    found = [self._found[index] for index in records]
    numbers = np.repeat(np.arange(len(found)), [len(x.scores) for x in found])
    boxes, scores, labels = (
        np.concatenate([getattr(x, name) for x in (_NOTHING, *found)])
        for name in _ARRAYS)
    rles = list(itertools.chain(*(x.masks or () for x in found)))
    for label in range(len(self._names)):
      chosen = np.flatnonzero(labels == label)
      columns = zip(chosen.tolist(), numbers[chosen].tolist(),
                    _xywh(boxes[chosen]).tolist(), scores[chosen].tolist())
      yield [{"image_id": number, "bbox": box, "area": box[2] * box[3],
              "score": score, "segmentation": rles[i] if rles else None}
             for i, number, box, score in columns]

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
          "iscrowd": x.get("iscrowd", 0),
          "segmentation": x.get("segmentation")})
    return objects


def results(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray,
            rles: Sequence[Mapping[str, Any]] | None,
            category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
  """Detections of an image in the form of COCO's files.

  Args:
    boxes: float32 [n, 4], x1, y1, x2 and y2.
    scores: float32 [n].
    labels: int [n].
    rles: of the masks; None without masks.
    category_ids: of the labels; for those beyond them it is None.

  Returns:
    {"category_id", "bbox": [x, y, width, height], "score"} of each, with plain
    numbers: coordinates are rounded to a thousandth of a pixel, scores have the
    digits that tell float32 values apart. With masks, also "segmentation".
  """
  category_ids = dict(enumerate(category_ids))
  shapes = itertools.repeat({}) if rles is None else (
      {"segmentation": dict(rle)} for rle in rles)
  return [{"category_id": category_ids.get(label), "bbox": box,
           "score": float(str(score)), **shape}
          for box, score, label, shape in zip(
              _xywh(boxes).round(_DECIMALS).tolist(),
              np.asarray(scores, np.float32), np.asarray(labels).tolist(),
              shapes)]


def _xywh(boxes: np.ndarray) -> np.ndarray:
  """x1, y1, x2, y2 -> x, y, width, height, [n, 4]; float64, as COCO's."""
  boxes = np.asarray(boxes, np.float64)
  return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)


def _precision(objects: list[dict[str, Any]], detections: list[dict[str, Any]],
               kind: str) -> np.ndarray:
  """The precision of one class, float64 [T, R, A]; -1 where no object counts.

  Of masks ("segm"), those without one do not count, and the area of a detection
  is that of its mask.
  """
  if kind == "segm":
    objects = [x for x in objects if x["segmentation"]]
    # One by one: pycocotools 2.0.11 fails with more than 255 at once.
    detections = [{**x, "area": pymask.area(x["segmentation"])}
                  for x in detections]
  images = {x["image_id"] for x in (*objects, *detections)}
  with contextlib.redirect_stdout(io.StringIO()):  # It prints its progress.
    measured = cocoeval.COCOeval(_index(images, objects),
                                 _index(images, detections), kind)
    measured.params.maxDets = [100]
    measured.evaluate()
    measured.accumulate()
  return measured.eval["precision"][:, :, 0, :, 0]


def _index(images: Iterable[int],
           annotations: list[dict[str, Any]]) -> coco.COCO:
  """Annotations of a single category as pycocotools' own index."""
  indexed = coco.COCO()
  indexed.dataset = {
      # Sizes are asked for with masks, but those of their RLEs are used.
      "images": [{"id": i, "height": None, "width": None} for i in images],
      "categories": [{"id": 1}],
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
