"""Labels of ImageNet-ReaL and ImageNet-V2, and damaged files of them."""

import json

import image_files
import numpy as np
import pytest
import source_files
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import resolve, typed
from metaformer_jax.evaluation import topk
from metaformer_jax.tasks import classification

JPEG = image_files.encode(Image.new("RGB", (9, 9)), "JPEG")


@pytest.fixture
def imagenet(tmp_path):
  """Twenty classes, three validation images, and numbered folders in v2/.

  Sorted by class, image 2 comes before image 1.
  """
  source_files.write(
      tmp_path, *(f"train/n{i:02}/x.JPEG" for i in range(1, 21)),
      "val/n01/ILSVRC2012_val_00000002.JPEG",
      "val/n02/ILSVRC2012_val_00000001.JPEG",
      "val/n02/ILSVRC2012_val_00000003.JPEG",
      *(f"v2/{name}.jpeg" for name in ("0/a", "10/b", "2/c", "2/d")), data=JPEG)
  (tmp_path / "real.json").write_text(json.dumps([[1, 4], [], [7]]))
  return tmp_path


def task(path, split="val", **kw):
  made = typed.default()
  made.model.name = "poolformer_s12"
  made.data.path, made.data.eval_split = str(path), split
  made.eval.batch_size = 8
  made.task.update({"image_size": 32, "num_classes": 20, **kw})
  return classification.create(resolve.resolve(made))[1]


def real(path, **kw):
  return task(path, eval_labels="real", real_path=str(path / "real.json"), **kw)


def test_real_labels_follow_the_files_names(imagenet):
  made = real(imagenet)
  batch, = made.make_data("eval").eval_batches()
  assert batch["label"][:3].tolist() == [0, 1, 1]
  assert batch["labels"][:3].tolist() == [[-1, -1], [1, 4], [7, -1]]
  assert batch["mask"].tolist() == [True] * 3 + [False] * 5
  assert "labels" not in next(made.make_data("train").train_batches(0))
  evaluator = made.make_evaluators()["classification"]
  logits = np.zeros((8, 20), np.float32)
  logits[0, 3] = logits[1, 4] = logits[2, 5] = 1
  logits[2, 7] = 0.5
  evaluator.update(evaluator.statistics(logits, batch))
  result = evaluator.result()
  # The first has no labels, the second is right, the third in second place.
  assert (result["top1"], result["top5"]) == (0.5, 1.0)
  assert result["n_examples"] == 2


def test_a_single_label_counts_like_a_list_of_one():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(50, 9)).astype(np.float32)
  label = rng.integers(0, 9, 50)
  batch = {"label": label, "mask": rng.random(50) < 0.8}
  one, other = topk.TopK(), topk.TopK()
  one.update(one.statistics(logits, batch))
  labels = np.stack([label, np.full(50, -1)], -1)
  other.update(other.statistics(logits, {**batch, "labels": labels}))
  assert one.result() == other.result()


@pytest.mark.parametrize("text, words", [
    ("[[1]", "cannot be read as JSON"), ("{}", "not a list of lists"),
    ("[]", "not a list of lists"), ("[[1], 3]", "image 2 has 3"),
    ("[[1], [20]]", "image 2 has [20]"), ("[[true]]", "image 1 has [True]"),
    ("\xff", "cannot be read as JSON")])
def test_a_malformed_file_is_a_line(imagenet, text, words):
  (imagenet / "real.json").write_bytes(text.encode("latin1"))
  with pytest.raises(errors.ConfigError) as caught:
    real(imagenet).make_data("eval")
  line = str(caught.value)
  assert line.startswith("config.task.real_path: ") and words in line
  assert "\n" not in line


def test_images_without_an_entry_in_the_file_are_named(imagenet):
  source_files.write(imagenet, "val/n01/ILSVRC2012_val_00000004.JPEG",
                     data=JPEG)
  with pytest.raises(errors.ConfigError, match=(
      r"^config.task.real_path: .* has labels of ILSVRC2012_val_00000001 to "
      r"00000003, not of .*n01/ILSVRC2012_val_00000004\.JPEG$")):
    real(imagenet).make_data("eval")


@pytest.mark.parametrize("values, words", [
    ({"real_path": None}, "config.task.real_path: None is not a file"),
    ({"real_path": "/nowhere.json"}, "'/nowhere.json' is not a file")])
def test_an_absent_file_is_a_line(imagenet, values, words):
  with pytest.raises(errors.ConfigError, match=words):
    task(imagenet, eval_labels="real", **values)


def test_other_labels_need_folders():
  made = typed.default()
  made.data.source, made.task.eval_labels = "digits", "number"
  with pytest.raises(errors.ConfigError, match="eval_labels: number"):
    resolve.resolve(made)


def test_folders_can_be_numbers_of_classes(imagenet):
  made = task(imagenet, split="v2", eval_labels="number")
  batch, = made.make_data("eval").eval_batches()
  assert sorted(batch["label"][batch["mask"]].tolist()) == [0, 2, 2, 10]


def test_a_folder_that_is_not_a_number_is_a_line(imagenet):
  source_files.write(imagenet, "v2/n03/e.jpeg", data=JPEG)
  with pytest.raises(errors.ConfigError,
                     match="v2 has the folder 'n03', which is not the number"):
    task(imagenet, split="v2", eval_labels="number").make_data("eval")


def test_a_number_beyond_the_head_is_a_line(imagenet):
  made = task(imagenet, split="v2", eval_labels="number", num_classes=10)
  with pytest.raises(errors.ConfigError, match="num_classes: 10"):
    made.make_data("eval")
