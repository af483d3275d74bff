"""What tools write of detections, with a small task of one's own."""

import csv
import json

import box_task
import command_line
import numpy as np
import pytest
import small_runs
from PIL import Image
from pycocotools import coco, cocoeval
from pycocotools import mask as pymask

from metaformer_jax import tasks
from metaformer_jax.config import default, resolve
from metaformer_jax.tasks import drawing
from metaformer_jax.tools import predict

N = box_task.Pictures.n_examples


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  config = default()
  config.task = {"name": "box_task:BoxTask"}
  config.data.source = "digits"
  config.train.batch_size, config.train.steps = 8, 1
  config.log.tensorboard = False
  cfg, task = tasks.create(resolve.resolve(config))
  workdir = tmp_path_factory.mktemp("runs") / "boxes"
  assert small_runs.run(cfg, task, workdir)["box_ap"] == pytest.approx(1)
  return workdir


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  root = tmp_path_factory.mktemp("photos")
  for i in range(6):
    path = root / ("a" if i < 3 else "b") / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(box_task.picture(i)[0]).save(path)
  Image.new("RGB", (30, 20)).save(root / "a" / "0 empty.png")
  (root / "b" / "bad.png").write_bytes(b"no image")
  return root


def predicted(monkeypatch, capsys, run, *argv):
  monkeypatch.setattr("sys.argv", [
      "predict", f"--weights={run}", "--allow_import=box_task",
      *map(str, argv)])
  predict.main(predict.parse())
  return capsys.readouterr().out


def test_predictions_are_a_coco_data_set(run, photos, tmp_path, monkeypatch,
                                         capsys):
  out = predicted(monkeypatch, capsys, run, photos, "--json",
                  f"--output={tmp_path}")
  lines = [json.loads(line) for line in out.splitlines()]
  data = coco.COCO(str(tmp_path / "detections.json"))
  assert [(x["id"], x["name"]) for x in data.loadCats(data.getCatIds())] == [
      (3, "red"), (90, "green")]
  files = [data.imgs[i]["file_name"] for i in data.getImgIds()]
  assert files == ["a/0 empty.png", *(f"a/{i}.png" for i in range(3)),
                   *(f"b/{i}.png" for i in range(3, 6))]
  for image in data.imgs.values():
    with Image.open(photos / image["file_name"]) as picture:
      assert picture.size == (image["width"], image["height"])
    rows = data.imgToAnns[image["id"]]
    line, = (line for line in lines
             if line["image"] == str(photos / image["file_name"]))
    assert line["predictions"] == [
        {"class": box_task.IDS.index(row["category_id"]),
         "name": data.cats[row["category_id"]]["name"],
         "score": pytest.approx(row["score"]), "x1": x, "y1": y,
         "x2": x + width, "y2": y + height}
        for row in rows for x, y, width, height in [row["bbox"]]]
    for row in rows:
      assert row["area"] == pymask.area(row["segmentation"]) == (
          np.prod(row["bbox"][2:]))
      assert pymask.toBbox(row["segmentation"]).tolist() == row["bbox"]
    if "empty" not in image["file_name"]:
      _, expected = box_task.picture(int(image["file_name"][2]))
      assert [(x["class"], x["x1"], x["y1"], x["x2"], x["y2"])
              for x in line["predictions"]] == expected
      with Image.open(tmp_path / image["file_name"].replace(
          ".png", ".overlay.png")) as picture:
        overlay = np.asarray(picture)
      assert overlay.shape[:2] == (image["height"], image["width"])
      for label, x, y, *_ in expected[:1]:  # The best is on top.
        assert (overlay[y, x] == drawing.colours_of(label)).all()
  assert ["error" in line for line in lines] == [False] * 7 + [True]
  assert not list(tmp_path.rglob("*.partial"))


def test_the_first_image_has_nothing(run, photos, monkeypatch, capsys):
  """The header still comes once, before the first row."""
  out = predicted(monkeypatch, capsys, run, photos / "a", "--csv", "--top=1")
  rows = list(csv.DictReader(out.splitlines()))
  assert list(rows[0]) == ["image", "class", "name", "score", "x1", "y1", "x2",
                           "y2"]
  assert [row["image"][-5:] for row in rows] == ["0.png", "1.png", "2.png"]
  out = predicted(monkeypatch, capsys, run, photos / "a")
  assert out.splitlines()[:2] == [str(photos / "a" / "0 empty.png"),
                                  "  nothing found"]


def evaluate(*argv):
  return command_line.python(
      ["-m", "metaformer_jax.tools.evaluate", *map(str, argv)],
      cwd=command_line.ROOT / "tests")


def test_the_splits_predictions_for_pycocotools(run, tmp_path):
  written = tmp_path / "results.json"
  done = evaluate(f"--workdir={run}", f"--predictions={written}",
                  "--allow_import=box_task", "--per_class", "--csv")
  assert not done.returncode, done.stderr
  rows = list(csv.DictReader(done.stdout.splitlines()))
  assert [row["name"] for row in rows] == ["red", "green"]
  assert [float(row["ap"]) for row in rows] == [pytest.approx(1)] * 2
  (tmp_path / "truth.json").write_text(json.dumps({
      **box_task.data_set(N), "annotations": [
          {**x, "id": x["id"] + 1}
          for x in box_task.data_set(N)["annotations"]]}))
  truth = coco.COCO(str(tmp_path / "truth.json"))
  for file, kind, keys in (
      (written, "bbox", ("image_id", "category_id", "bbox", "score")),
      (tmp_path / "results.masks.json", "segm",
       ("image_id", "category_id", "score", "segmentation"))):
    measured = cocoeval.COCOeval(truth, truth.loadRes(str(file)), kind)
    measured.evaluate()
    measured.accumulate()
    measured.summarize()
    assert measured.stats[0] == pytest.approx(1)
    results = json.loads(file.read_text())
    assert len(results) == len(truth.anns) == sum(
        int(row["objects"]) for row in rows)
    assert {tuple(row) for row in results} == {keys}
  assert [float(row["mask_ap"]) for row in rows] == [pytest.approx(1)] * 2


@pytest.mark.parametrize("argv,words", [
    (["--workdir={run}", "--predictions={folder}/none/x.json",
      "--allow_import=box_task"], "not a file in a folder that can be written"),
    pytest.param(
        ["--weights={run}", "--weights={run}", "--predictions=x.json",
         "--allow_import=box_task"], "one of --weights at a time",
        marks=pytest.mark.slow),
    pytest.param(
        ["--weights={run}", "--predictions={folder}",
         "--allow_import=box_task"], "not a file in a folder",
        marks=pytest.mark.slow),
])
def test_mistakes_are_reported_before_the_evaluation(run, tmp_path, argv,
                                                     words):
  done = evaluate(*(a.format(run=run, folder=tmp_path) for a in argv))
  assert done.returncode == 2, done.stderr
  assert words in done.stderr.splitlines()[-1]
  assert not done.stdout and not list(tmp_path.iterdir())
