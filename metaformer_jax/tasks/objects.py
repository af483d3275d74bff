"""Objects found on an image, for users: a dict, rows, a COCO data set."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metaformer_jax.evaluation import coco_ap
from metaformer_jax.tasks import base


def find(outputs: Mapping[str, np.ndarray], size: Sequence[int],
         names: Sequence[str] | None) -> dict[str, Any]:
  """The detections of one image without the padding; for `Task.postprocess`.

  Args:
    outputs: "boxes", float32 [K, 4], x1, y1, x2 and y2 in pixels of the
      original image; "scores", float32 [K], descending; "labels", int32 [K];
      "valid", bool [K].
    size: height and width of the original image.
    names: of the classes, if they are known.

  Returns:
    {"boxes": float32 [n, 4]; "scores": float32 [n]; "classes": int [n];
    "names": theirs, if they are known; "size": (height, width)}, the best
    object first.
  """
  outputs = {name: np.asarray(x) for name, x in outputs.items()}
  valid = (outputs["valid"] & np.isfinite(outputs["scores"])
           & np.isfinite(outputs["boxes"]).all(-1))
  found = {"boxes": outputs["boxes"][valid], "scores": outputs["scores"][valid],
           "classes": outputs["labels"][valid],
           "size": (int(size[0]), int(size[1]))}
  if names:
    found["names"] = [names[i] for i in found["classes"]]
  return found


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
  rows = coco_ap.results(found["boxes"], found["scores"], found["classes"],
                         category_ids)
  return {
      "images": [{"width": width, "height": height}],
      "categories": [{"id": i, "name": name}
                     for i, name in zip(category_ids, names)],
      "annotations": [{**row, "area": round(row["bbox"][2] * row["bbox"][3], 3),
                       "iscrowd": 0} for row in rows]}
