"""Pictures of data: what training is given; predictions beside the truth."""

import argparse
import functools

import command_line
import jax
import numpy as np
import pytest
import shipped
from PIL import Image
from test_inference import variables_of

import metaformer_jax
from metaformer_jax import errors, tasks
from metaformer_jax.config import resolve, saved, typed
from metaformer_jax.convert import files, layouts
from metaformer_jax.data import loader
from metaformer_jax.data.augment import cv_kernels
from metaformer_jax.data.sources import outlines
from metaformer_jax.data.transforms import framing
from metaformer_jax.tasks import objects
from metaformer_jax.tools import panels, show_data


def experiment(argument, **changed):
  config = shipped.load(argument)
  for key, value in changed.items():
    config.task[key] = value
  return resolve.resolve(config)


@functools.cache
def task_of(argument, **changed):
  return tasks.create(experiment(argument, **changed))


def arguments(**changed):
  return argparse.Namespace(**{
      "rows": 2, "columns": 2, "first": 0, "weights": [], "model": [],
      "allow_import": "", **changed})


class Numbers:
  """Records that are their index."""

  n_classes = 9

  def __len__(self):
    return 9

  def __getitem__(self, index):
    if index == 4:
      raise ValueError("damaged")
    return {"label": index}


def drawing(record, rng):
  return {"label": np.int32(record["label"]), "draw": rng.random()}


def test_training_examples_are_those_of_the_stream():
  data = loader.Loader(Numbers(), drawing, batch_size=3, seed=7)
  batches = data.train_batches(0)
  for epoch in range(2):
    for batch in (next(batches) for _ in range(3)):
      for label, draw, replaced in zip(*map(batch.get, (
          "label", "draw", "replaced"))):
        if not replaced:
          found = data.training_example(int(label), epoch)
          assert (found["label"], found["draw"]) == (label, draw)
  with pytest.raises(errors.DataError, match=r"example 4 .*damaged"):
    data.training_example(4, 0)
  np.testing.assert_array_equal(data.indices, np.arange(9))


def test_the_step_mixes_as_the_targets_say():
  _, task = task_of("configs/quickstart.py", mixup=0.8, label_smoothing=0.0)
  rng = np.random.default_rng(0)
  batch = {"image": rng.integers(0, 256, (4, 32, 32, 3), np.uint8),
           "label": np.array([3, 1, 2, 7], np.int32)}
  rngs = {"augment": jax.random.key(5)}
  plain, mixed = (task.training_examples(batch, keys) for keys in (None, rngs))
  for i, ((image, found), (after, shares)) in enumerate(zip(plain, mixed)):
    np.testing.assert_array_equal(image, batch["image"][i])
    assert found["classes"][0] == batch["label"][i]
    np.testing.assert_array_equal(found["probabilities"], [1] + [0] * 9)
    of = dict(zip(shares["classes"].tolist(), shares["probabilities"]))
    share = of[batch["label"][i]]
    assert 0.01 < share < 0.99
    other = (i + 2) % 4
    assert of[batch["label"][other]] == pytest.approx(1 - share, abs=1e-6)
    want = share * image + (1 - share) * batch["image"][other].astype(float)
    assert abs(after - want).max() <= 0.51


def test_the_grid_has_the_runs_own_draws_then_those_of_the_step():
  cfg = experiment("configs/quickstart.py", erasing=1.0, label_smoothing=0.0)
  rows = show_data.augmented(cfg, arguments(first=5))
  captions = [[panel.caption.split("\n") for panel in row] for row in rows]
  assert [title for title, _ in captions[0]] == [
      "example 5", "epoch 0", "epoch 1", "step 0", "step 1"]
  _, task = tasks.create(cfg)
  data = task.make_data("train")
  for index, row, titles in zip((5, 6), rows, captions):
    label = str(data.source[index]["label"])
    assert [words for _, words in titles] == [label] * 5
    # Enlarged to 192 pixels.
    images = [np.asarray(panel.picture)[::6, ::6] for panel in row[1:]]
    for epoch in range(2):
      want = data.training_example(index, epoch)["image"]
      np.testing.assert_array_equal(images[epoch], want)
      erased = abs(images[2 + epoch].astype(int) - want).max(-1) > 1
      assert 0.01 < erased.mean() < 0.5
  # Without what the device does there are no steps.
  rows = show_data.augmented(experiment("configs/quickstart.py"), arguments())
  assert len(rows[0]) == 3
  with pytest.raises(errors.ConfigError, match="--first: 5000, but the split"):
    show_data.augmented(cfg, arguments(first=5000))


def test_label_maps_follow_the_image():
  argument = "configs/segmentation_quickstart.py"
  _, task = task_of(argument)
  data = task.make_data("train")
  record = data.source[3]
  example = data.training_example(3, 0)
  ((image, found),) = task.training_examples(
      {name: x[None] for name, x in example.items()})
  height, width = example["size"]
  np.testing.assert_array_equal(image, example["image"][:height, :width])
  np.testing.assert_array_equal(found["label_map"],
                                example["label"][:height, :width])
  assert found["names"][0] == "background"
  truth = task.truth(record)["label_map"]
  np.testing.assert_array_equal(truth, record["label"])
  # What has no class keeps the image's colours, and is not in the legend.
  truth = np.where(truth == 0, 255, truth)
  picture = np.full((*truth.shape, 3), 90, np.uint8)
  drawn = np.asarray(task.drawn({"label_map": truth}, picture, 2))
  unchanged = (drawn[:2 * len(truth):2, :2 * truth.shape[1]:2] == 90).all(-1)
  np.testing.assert_array_equal(unchanged, truth == 255)
  nothing = task.drawn({"label_map": np.full_like(truth, 255)}, picture)
  np.testing.assert_array_equal(np.asarray(nothing), picture)


def test_masks_and_boxes_follow_the_image():
  cfg, task = task_of("configs/detection_quickstart.py:mask_rcnn", flip=1.0)
  data = task.make_data("train")
  index = data.indices[2]
  record = data.source[index]
  example = data.training_example(index, 0)
  ((image, found),) = task.training_examples(
      {name: x[None] for name, x in example.items()})
  truth = task.truth(record)
  size = truth["size"]
  assert found["scores"] is None and found["names"] == truth["names"]
  new = framing.rescaled(*size, cfg.task.scale)
  assert image.shape[:2] == new
  rows, columns = (cv_kernels.nearest(old, side, 0, side)
                   for old, side in zip(size, new))
  for i, (mask, box) in enumerate(zip(truth["masks"], truth["boxes"])):
    np.testing.assert_array_equal(
        mask, outlines.decode(record["segments"][i], size) > 0)
    np.testing.assert_array_equal(
        found["masks"][i], mask[rows][:, columns[::-1]])
    x1, _, x2, _ = box * new[1] / size[1]
    np.testing.assert_allclose(found["boxes"][i][[0, 2]],
                               [new[1] - x2, new[1] - x1], atol=1e-3)
  drawn = task.drawn(truth, np.zeros((*size, 3), np.uint8), 2)
  assert drawn.size == (2 * size[1], 2 * size[0])


def test_a_mask_that_ends_beyond_its_image_is_cut():
  cells = np.zeros((4, 4), np.uint8)
  cells[:, 2:] = 1
  found = objects._pasted(cells, np.array([1, 1, 9, 5], np.float32), (3, 8))
  want = np.zeros((3, 8), bool)
  want[1:, 5:] = True
  np.testing.assert_array_equal(found, want)


@pytest.mark.slow
def test_predictions_are_beside_the_truth(tmp_path):
  cfg, task = task_of("configs/segmentation_quickstart.py")
  variables = variables_of(cfg)
  path = tmp_path / "scenes.safetensors"
  files.write_safetensors(
      path, layouts.to_torch(task.family, variables, "flax"),
      {saved.METADATA: typed.to_json(cfg)})
  rows = show_data.predicted(cfg, arguments(weights=[str(path)], first=1))
  data = task.make_data("eval")
  records = [data.source[index] for index in (1, 2)]
  images = [np.asarray(record["image"]) for record in records]
  predictions = metaformer_jax.load(path).predict(images, 2)
  for index, row, record, image, prediction in zip(
      (1, 2), rows, records, images, predictions):
    assert [panel.caption for panel in row] == [
        f"example {index}", "ground truth", "scenes.safetensors"]
    factor = show_data._factor(image.shape)
    plain, truth, found = (
        np.asarray(panel.picture)[:factor * image.shape[0]:factor,
                                  :factor * image.shape[1]:factor]
        for panel in row)
    np.testing.assert_array_equal(plain, image)
    for drawn, label_map in ((truth, record["label"]),
                             (found, prediction["label_map"])):
      want = task.drawn({"label_map": label_map}, image, legend=False)
      np.testing.assert_array_equal(drawn, np.asarray(want))
  # Of several widths, one grid.
  whole = panels.grid(rows)
  assert whole.width > sum(panel.picture.width for panel in rows[0])


def test_a_damaged_image_is_one_line(tmp_path):
  for split in ("train", "val"):
    for name in ("a", "b"):
      folder = tmp_path / split / name
      folder.mkdir(parents=True)
      Image.new("RGB", (8, 8)).save(folder / "0.png")
  damaged = tmp_path / "train" / "a" / "0.png"
  damaged.write_bytes(damaged.read_bytes()[:40])
  done = command_line.python([
      "-m", "metaformer_jax.tools.show_data", "--config=configs/quickstart.py",
      "--config.data.source=folder", f"--config.data.path={tmp_path}",
      "--config.task.num_classes=2", f"--output={tmp_path / 'x.png'}"])
  assert done.returncode == 1 and not done.stdout
  line = done.stderr.splitlines()[-1]
  assert line.startswith("DataError: example 0 ") and "0.png" in line
  assert "Traceback" not in done.stderr
