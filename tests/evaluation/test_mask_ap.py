"""COCO's AP of masks against pycocotools, run plainly on the same files."""

import io
import json

import jax
import numpy as np
import pytest
from pycocotools import coco, cocoeval
from pycocotools import mask as pymask

from metaformer_jax.evaluation import coco_ap

IDS = (17, 1, 90)
NAMES = ("cat", "person", "toothbrush")
ENDS = ("", "50", "75", "_small", "_medium", "_large")
SIZES = ((120, 160), (90, 70), (150, 150), (64, 200))


def blob(rng, box):
  """A polygon around the middle of a box, of points at its sides."""
  turns = np.sort(rng.uniform(0, 2 * np.pi, 12))
  points = np.stack([np.cos(turns), np.sin(turns)], 1) * rng.uniform(0.6, 1.1)
  middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
  return (middle + points * half).round(2).ravel().tolist()


def random_case(seed, n=4):
  """A COCO data set, and outputs [n, K, ...] that fit it more or less."""
  rng = np.random.default_rng(seed)
  annotations, k = [], 8
  outputs = {"boxes": np.full((n, k, 4), np.nan, np.float32),
             "scores": -np.sort(-rng.integers(1, 9, (n, k)) / 9).astype("f4"),
             "labels": rng.integers(0, 3, (n, k)),
             "valid": np.zeros((n, k), bool),
             "masks": np.full((n, k, 7, 7), np.nan, np.float32)}
  for i, (height, width) in enumerate(SIZES[:n]):
    for j in range(rng.integers(2, 6)):
      corner = rng.uniform(-10, 40, 2)
      box = np.append(corner, corner + 10 ** rng.uniform(1, 1.9, 2))
      label, crowd = int(rng.integers(3)), int(rng.random() < 0.2)
      segment = [blob(rng, box)]
      if crowd:
        segment = pymask.merge(pymask.frPyObjects(segment, height, width))
        segment["counts"] = segment["counts"].decode()
      annotations.append({
          "id": len(annotations) + 1, "image_id": 3 * i + 5, "iscrowd": crowd,
          "category_id": IDS[label], "segmentation": segment,
          "bbox": [*box[:2], *(box[2:] - box[:2])],
          "area": float((box[2:] - box[:2]).prod() * 0.6)})
      outputs["valid"][i, j] = True
      outputs["boxes"][i, j] = box + rng.normal(0, 2, 4)
      outputs["labels"][i, j] = label if rng.random() < 0.8 else 1
      away = np.abs(np.arange(7) - 3)
      outputs["masks"][i, j] = (
          np.hypot(away, away[:, None]) < rng.uniform(2.4, 4.5))
  data_set = {
      "info": {}, "annotations": annotations,
      "images": [{"id": 3 * i + 5, "height": h, "width": w}
                 for i, (h, w) in enumerate(SIZES[:n])],
      "categories": [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]}
  return data_set, outputs


def encoded(data_set):
  """With RLEs, as the evaluator takes them."""
  sizes = {i["id"]: (i["height"], i["width"]) for i in data_set["images"]}
  index = coco.COCO()
  index.dataset = data_set
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("sys.stdout", io.StringIO())
    index.createIndex()
  annotations = []
  for row in data_set["annotations"]:
    found = index.annToRLE(row)
    counts = found["counts"]
    annotations.append({**row, "segmentation": {
        "size": list(sizes[row["image_id"]]),
        "counts": counts if isinstance(counts, str) else counts.decode()}})
  return {**data_set, "annotations": annotations}


def measured(data_set, outputs, parts=(np.s_[:],), index=None):
  """An evaluator that has seen these parts of a batch, one after another."""
  evaluator = coco_ap.AveragePrecision(
      lambda: coco_ap.GroundTruth(encoded(data_set), IDS), NAMES, 0.5)
  n = len(outputs["valid"])
  batch = {"index": np.arange(n) if index is None else np.array(index),
           "mask": np.ones(n, bool), "original_size": np.array(SIZES[:n])}
  for part in parts:
    statistics = evaluator.statistics({k: x[part] for k, x in outputs.items()},
                                      {k: x[part] for k, x in batch.items()})
    evaluator.update(jax.device_get(statistics))
  return evaluator


def official(folder, data_set, results, kind):
  """What pycocotools says of files: [6]."""
  for name, content in (("truth", data_set), ("results", results)):
    (folder / name).write_text(json.dumps(content, allow_nan=False))
  truth = coco.COCO(str(folder / "truth"))
  made = cocoeval.COCOeval(truth, truth.loadRes(str(folder / "results")), kind)
  made.evaluate()
  made.accumulate()
  made.summarize()
  return made.stats[:6]


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_from_files(tmp_path, seed):
  """Of polygons in the file, and of results without boxes."""
  data_set, outputs = random_case(seed)
  evaluator = measured(data_set, outputs)
  found, rows = evaluator.result(), evaluator.predictions()
  masks = [{key: x for key, x in row.items() if key != "bbox"} for row in rows]
  boxes = [{key: x for key, x in row.items() if key != "segmentation"}
           for row in rows]
  for kind, name, results in (("segm", "mask", masks), ("bbox", "box", boxes)):
    np.testing.assert_allclose(
        [found[f"{name}_ap{end}"] for end in ENDS],
        np.where((s := official(tmp_path, data_set, results, kind)) < 0, np.nan,
                 s), rtol=1e-12)
  assert 0 < found["mask_ap"] < 1 and found["mask_ap"] != found["box_ap"]
  # The area of a detection is that of its mask, not of its box.
  both = official(tmp_path, data_set, rows, "segm")
  np.testing.assert_allclose(both[:3], [
      found[f"mask_ap{end}"] for end in ENDS[:3]])
  # Boxes are measured as without masks.
  alone = coco_ap.AveragePrecision(
      lambda: coco_ap.GroundTruth(data_set, IDS), NAMES)
  alone.update(jax.device_get(alone.statistics(
      {**outputs}, {"index": np.arange(4), "mask": np.ones(4, bool)})))
  assert {k: found[k] for k in found if "mask" not in k} == pytest.approx(
      alone.result(), nan_ok=True)
  assert "segmentation" not in alone.predictions()[0]


def test_hundreds_of_masks_of_one_class(tmp_path):
  """More than 255, and more in an image than count (100)."""
  data_set, outputs = random_case(7)
  outputs = {key: np.repeat(x, 40, axis=1) for key, x in outputs.items()}
  outputs["labels"][:] = 1
  evaluator = measured(data_set, outputs)
  found, rows = evaluator.result(), evaluator.predictions()
  assert len(rows) > 300
  np.testing.assert_allclose(
      [found[f"mask_ap{end}"] for end in ENDS[:3]],
      official(tmp_path, data_set, rows, "segm")[:3], rtol=1e-12)


def test_any_parts_and_repeats_change_nothing():
  data_set, outputs = random_case(2)
  expected = measured(data_set, outputs).result()
  for parts in ((np.s_[:1], np.s_[1:]), (np.s_[2:], np.s_[1:3], np.s_[:2])):
    assert measured(data_set, outputs, parts).result() == pytest.approx(
        expected, abs=0, rel=0, nan_ok=True)
  # Padding has no image.
  evaluator = measured(data_set, outputs, index=[0, 1, -1, -1])
  assert evaluator.result()["n_examples"] == 2


def perfect(n_objects=3):
  """Squares that are whole cells, and outputs that are the same."""
  outputs = {"boxes": np.zeros((1, n_objects, 4), np.float32),
             "scores": np.full((1, n_objects), 0.9, np.float32),
             "labels": np.zeros((1, n_objects), int),
             "valid": np.ones((1, n_objects), bool),
             "masks": np.zeros((1, n_objects, 7, 7), np.float32)}
  outputs["masks"][..., :4] = 1
  annotations = []
  for i in range(n_objects):
    x, y = 40 * i, 5 * i
    outputs["boxes"][0, i] = x, y, x + 28, y + 14
    annotations.append({
        "id": i + 1, "image_id": 5, "category_id": IDS[0], "iscrowd": 0,
        "bbox": [x, y, 28, 14], "area": 224,
        "segmentation": [[x, y, x + 16, y, x + 16, y + 14, x, y + 14]]})
  return {"images": [{"id": 5, "height": 120, "width": 160}],
          "categories": [{"id": i, "name": str(i)} for i in IDS],
          "annotations": annotations}, outputs


def test_perfect_masks():
  data_set, outputs = perfect()
  evaluator = measured(data_set, outputs)
  found = evaluator.result()
  assert found["mask_ap"] == found["box_ap"] == pytest.approx(1)
  row = evaluator.table()[0]
  assert row["mask_ap"] == row["ap"] == pytest.approx(1) and row["objects"] == 3
  # Three quarters of each mask without two corners: right for .5, ..., .7.
  outputs["masks"][..., 3] = 0
  found = measured(data_set, outputs).result()
  assert found["mask_ap"] == pytest.approx(0.5)
  assert found["box_ap"] == pytest.approx(1)
  # Nothing is above the threshold.
  outputs["masks"][:] = 0.4
  assert measured(data_set, outputs).result()["mask_ap"] == 0


def test_an_object_without_an_outline_counts_for_boxes_only():
  data_set, outputs = perfect()
  truth = encoded(data_set)
  truth["annotations"][1]["segmentation"] = None
  outputs["valid"][0, 1] = False
  evaluator = coco_ap.AveragePrecision(
      lambda: coco_ap.GroundTruth(truth, IDS), NAMES, 0.5)
  evaluator.update(jax.device_get(evaluator.statistics(outputs, {
      "index": np.arange(1), "mask": np.ones(1, bool),
      "original_size": np.array(SIZES[:1])})))
  found = evaluator.result()
  assert found["mask_ap"] == pytest.approx(1)
  assert found["box_ap"] < 0.7


def test_what_is_not_finite_is_no_detection():
  data_set, outputs = perfect()
  outputs["masks"][0, 2, 1, 1] = np.nan
  assert len(measured(data_set, outputs).predictions()) == 2
  outputs["valid"][:] = False
  found = measured(data_set, outputs)
  assert found.predictions() == [] and found.result()["mask_ap"] == 0
