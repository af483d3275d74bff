"""COCO's AP against plain NumPy, exact for any batches."""

import json

import jax
import numpy as np
import plain_ap
import pytest
from pycocotools import coco, cocoeval

from metaformer_jax.evaluation import coco_ap

# Neither contiguous nor ordered, as COCO's.
IDS = (17, 1, 90)
NAMES = ("cat", "person", "toothbrush")
MEASURES = ("box_ap", "box_ap50", "box_ap75", "box_ap_small", "box_ap_medium",
            "box_ap_large")

STATISTICS = jax.jit(coco_ap.AveragePrecision(None, ()).statistics)

# What pycocotools gives for 1: it adds the spacing of floats to a denominator.
ONE = pytest.approx(1, abs=1e-12)


def data_set(objects, image_ids=None, ids=IDS):
  """COCO's form of objects by image: (class, box, area, is_crowd)."""
  image_ids = image_ids or [7 * i for i in range(len(objects))]
  annotations = [
      {"image_id": image, "category_id": ids[label], "area": area,
       "bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": int(crowd)}
      for image, of_image in zip(image_ids, objects)
      for label, box, area, crowd in of_image]
  return {
      "info": {},  # Which pycocotools 2.0.10 needs for `loadRes`.
      "images": [{"id": i, "width": 640, "height": 480} for i in image_ids],
      "categories": [{"id": i, "name": name} for i, name in zip(ids, NAMES)],
      "annotations": [{"id": i, **x} for i, x in enumerate(annotations)]}


def random_case(seed, n_images=4):
  """Objects and detections by image; some crowds, ties and empty images."""
  rng = np.random.default_rng(seed)
  images = []
  for _ in range(n_images):
    objects, detections = [], []
    for _ in range(rng.integers(0, 6)):
      label, side = rng.integers(3), 10 ** rng.uniform(0.8, 2.3)
      corner, sides = rng.uniform(0, 100, 2), side * rng.uniform(0.7, 1.4, 2)
      box = np.concatenate([corner, corner + sides])
      objects.append((label, box, sides.prod() * rng.uniform(0.5, 1),
                      rng.random() < 0.15))
      for _ in range(rng.integers(0, 4)):
        detections.append((label if rng.random() < 0.9 else rng.integers(3),
                           box + rng.normal(0, 0.08 * side, 4)))
    for _ in range(rng.integers(0, 3)):
      corner = rng.uniform(0, 200, 2)
      detections.append((rng.integers(3), np.concatenate(
          [corner, corner + rng.uniform(3, 120, 2)])))
    scores = -np.sort(-rng.integers(1, 20, len(detections)) / 20)
    detections = [(label, np.concatenate([
        box[:2], np.maximum(box[2:], box[:2] + 1)]).astype(np.float32),
                   np.float32(score))
                  for (label, box), score in zip(detections, scores)]
    images.append((objects, detections))
  return images


def batches(detections, batch_size, k=40):
  """Outputs and batches, of which the last one is padded."""
  for first in range(0, len(detections), batch_size):
    shape = (batch_size, k)
    # What is not valid may be anything.
    outputs = {"boxes": np.full((*shape, 4), np.nan, np.float32),
               "scores": np.ones(shape, np.float32),
               "labels": np.zeros(shape, np.int32),
               "valid": np.zeros(shape, bool)}
    batch = {"index": np.zeros(batch_size, np.int32),
             "mask": np.zeros(batch_size, bool)}
    for i, found in enumerate(detections[first:first + batch_size]):
      batch["index"][i], batch["mask"][i] = first + i, True
      for j, (label, box, score) in enumerate(found):
        for name, value in zip(outputs, (box, score, label, True)):
          outputs[name][i, j] = value
    yield outputs, batch


def measured(truth, detections, batch_size=3, ids=IDS, names=NAMES):
  """An evaluator that has seen the detections by image."""
  evaluator = coco_ap.AveragePrecision(
      lambda: coco_ap.GroundTruth(truth, ids), names)
  for outputs, batch in batches(detections, batch_size):
    evaluator.update(jax.device_get(STATISTICS(outputs, batch)))
  return evaluator


def boxes_of(objects, score=0.5, shift=0.0):
  """Each object as a detection, moved to the right by a part of its width."""
  return [[(label, box + shift * np.array([1, 0, 1, 0]) * (box[2] - box[0]),
            score) for label, box, *_ in of_image] for of_image in objects]


def squares(*sides, label=0):
  """An object of each side, each in an image of its own."""
  return [[(label, np.array([10.0, 20, 10 + side, 20 + side]), side**2, False)]
          for side in sides]


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_definition(seed):
  images = random_case(seed)
  objects, detections = map(list, zip(*images))
  found = measured(data_set(objects), detections).result()
  expected = plain_ap.measures(images)
  assert found.pop("n_examples") == len(images)
  assert {name: pytest.approx(value, abs=1e-9, nan_ok=True)
          for name, value in expected.items()} == found


def test_equals_pycocotools_from_files(tmp_path):
  """Of results that are written, with ids in another order than the images."""
  objects, detections = map(list, zip(*random_case(3, 30)))
  image_ids = np.random.default_rng(0).permutation(30).tolist()
  truth = data_set(objects, image_ids)
  evaluator = measured(truth, detections)
  for name, content in (("truth", truth | {"annotations": [
      {**x, "id": x["id"] + 1} for x in truth["annotations"]]}),
                        ("results", evaluator.predictions())):
    (tmp_path / name).write_text(json.dumps(content, allow_nan=False))
  theirs = coco.COCO(str(tmp_path / "truth"))
  official = cocoeval.COCOeval(
      theirs, theirs.loadRes(str(tmp_path / "results")), "bbox")
  official.evaluate()
  official.accumulate()
  official.summarize()
  found = evaluator.result()
  np.testing.assert_allclose([found[name] for name in MEASURES],
                             official.stats[:6], rtol=1e-12)


def test_batches_hosts_and_duplicates_change_nothing():
  objects, detections = map(list, zip(*random_case(1, 11)))
  truth = data_set(objects)
  expected = measured(truth, detections, 1).result()
  for batch_size in (2, 4, 16):
    assert measured(truth, detections, batch_size).result() == expected
  # Two hosts, of which the second one repeats an image of the first.
  merged = measured(truth, [])
  (outputs, batch), = batches(detections, 11)
  for part in np.s_[:6], np.s_[5:]:
    merged.update(STATISTICS(
        {name: x[part] for name, x in outputs.items()},
        {name: x[part] for name, x in batch.items()}))
  assert merged.result() == expected
  merged.reset()
  assert merged.result()["n_examples"] == 0


def test_perfect_and_shifted_boxes():
  objects = squares(20, 50, 100, 200)
  truth = data_set(objects)
  assert measured(truth, boxes_of(objects)).result() == {
      **dict.fromkeys(MEASURES, ONE), "n_examples": 4}
  # An IoU of 0.9 / 1.1: right for .5, .55, ..., .8.
  found = measured(truth, boxes_of(objects, shift=0.1)).result()
  assert found["box_ap"] == pytest.approx(0.7, abs=1e-12)
  assert found["box_ap50"] == found["box_ap75"] == ONE


def test_areas():
  """By the area that the data set has, which is not that of the box."""
  objects = squares(40, 40, 40)
  for i, area in enumerate((1000, 1200, 10000)):
    objects[i][0] = (*objects[i][0][:2], area, False)
  found = measured(data_set(objects),
                   [*boxes_of(objects[:1]), [], *boxes_of(objects[2:])])
  found = found.result()
  assert [found[f"box_ap_{name}"] for name in ("small", "medium", "large")] == [
      pytest.approx(x) for x in (1, 0, 1)]


def test_a_detection_in_a_crowd_does_not_count():
  objects = squares(50, 50)
  crowd = (0, np.array([100.0, 100, 300, 300]), 4e4, True)
  inside = (0, np.array([120.0, 120, 150, 150]), 0.9)
  detections = boxes_of(objects)
  assert measured(data_set(objects), [[*detections[0], inside],
                                      detections[1]]).result()["box_ap"] < 1
  objects[0].append(crowd)
  detections[0] += [inside, inside]
  found = measured(data_set(objects), detections)
  assert found.result()["box_ap"] == ONE
  assert found.table()[0]["objects"] == 2
  # Crowds only: nothing counts.
  found = measured(data_set([[crowd]]), [[inside]])
  assert np.isnan(found.result()["box_ap"])


def test_an_unusable_image_is_left_out_with_its_objects():
  objects = squares(50, 60, 70)
  evaluator = measured(data_set(objects), [])
  for outputs, batch in batches(boxes_of(objects), 3):
    batch["mask"][1] = False
    outputs["boxes"][1] = 5
    evaluator.update(STATISTICS(outputs, batch))
  assert evaluator.result() == {
      "box_ap": ONE, "box_ap50": ONE, "box_ap75": ONE, "n_examples": 2,
      "box_ap_small": pytest.approx(np.nan, nan_ok=True), "box_ap_medium": ONE,
      "box_ap_large": pytest.approx(np.nan, nan_ok=True)}
  assert len(evaluator.predictions()) == 2


def test_nothing_detected_and_nothing_there():
  objects = squares(50)
  assert measured(data_set(objects), [[]]).result()["box_ap"] == 0
  empty = measured(data_set([[], []]), [*boxes_of(objects), []])
  assert np.isnan([empty.result()[name] for name in MEASURES]).all()
  assert [row["ap"] for row in empty.table()] == [None] * 3
  assert empty.result()["n_examples"] == 2


def test_what_is_not_finite_is_no_detection():
  objects = squares(50)
  box = objects[0][0][1]
  bad = [(0, box, np.nan), (0, np.array([np.inf, 0, 1, 1]), 0.9)]
  evaluator = measured(data_set(objects), [bad + boxes_of(objects)[0]])
  assert evaluator.result()["box_ap"] == ONE
  assert len(evaluator.predictions()) == 1


def test_table_by_class():
  objects = squares(50, 60)
  objects[1].append((1, np.array([200.0, 0, 300, 100]), 1e4, False))
  detections = boxes_of(objects[:1], shift=0.1) + [[]]
  rows = measured(data_set(objects), detections).table()
  assert rows[0] == {
      "class": 0, "name": "cat", "ap": pytest.approx(0.7 * 51 / 101),
      "ap50": pytest.approx(51 / 101), "ap75": pytest.approx(51 / 101),
      "objects": 2}
  assert rows[1] == {"class": 1, "name": "person", "ap": 0, "ap50": 0,
                     "ap75": 0, "objects": 1}
  assert rows[2]["ap"] is None and rows[2]["objects"] == 0


def test_data_with_fewer_classes_than_the_model():
  """Classes that the data lacks do not count; nor are they written."""
  objects = squares(50, label=1)
  truth = data_set(objects, ids=(None, 5, None))
  other = (0, np.array([1.0, 2, 30, 40]), 0.9)
  evaluator = measured(truth, [[other, *boxes_of(objects)[0]]],
                       ids=(None, 5), names=("a", "b", "c", "d"))
  assert evaluator.result()["box_ap"] == ONE
  assert [row["objects"] for row in evaluator.table()] == [0, 1, 0, 0]
  assert [row["category_id"] for row in evaluator.predictions()] == [5]


def test_an_object_of_no_class_is_an_error():
  evaluator = measured(data_set(squares(50)), [[]], ids=(18, 1))
  with pytest.raises(ValueError, match="category_id 17"):
    evaluator.result()


@pytest.mark.parametrize("image_ids", [
    [2**53 + 1, 2**53], ["b.jpg", "a.jpg"], [0, -1]])
def test_ids_of_any_kind(image_ids):
  """Also 0, which pycocotools takes for none."""
  objects = squares(50, 60)
  evaluator = measured(data_set(objects, image_ids), boxes_of(objects))
  assert evaluator.result()["box_ap"] == ONE
  assert [row["image_id"] for row in evaluator.predictions()] == image_ids


def test_predictions_are_plain_and_rounded():
  box = np.array([1 / 3, 2, 10 + 1 / 3, 22.12345], np.float32)
  evaluator = measured(data_set(squares(5)), [[(2, box, np.float32(0.1))]])
  row, = evaluator.predictions()
  assert row == {"image_id": 0, "category_id": 90, "score": 0.1,
                 "bbox": [0.333, 2.0, 10.0, 20.123]}
  assert {type(x) for x in (row["score"], *row["bbox"])} == {float}
  assert json.loads(json.dumps(row)) == row


def test_pycocotools_prints_nothing(capsys):
  measured(data_set(squares(50)), boxes_of(squares(50))).result()
  assert capsys.readouterr().out == ""


def test_the_data_set_is_not_changed_and_read_once():
  truth = data_set(squares(50))
  before, calls = json.dumps(truth), []
  evaluator = coco_ap.AveragePrecision(
      lambda: calls.append(1) or coco_ap.GroundTruth(truth, IDS), NAMES)
  for _ in range(2):
    evaluator.reset()
    for outputs, batch in batches(boxes_of(squares(50)), 2):
      evaluator.update(STATISTICS(outputs, batch))
    assert evaluator.result()["box_ap"] == ONE
    assert evaluator.table() and evaluator.predictions()
  assert calls == [1] and json.dumps(truth) == before
