"""ImageNet-ReaL's and ImageNet-V2's labels, and what is wrong with files."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import resolve as config
from metaformer_jax.evaluation import topk
from metaformer_jax.tasks import classification


def save(path):
  out = io.BytesIO()
  Image.new("RGB", (9, 9)).save(out, "JPEG")
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(out.getvalue())


@pytest.fixture
def imagenet(tmp_path):
  """Two classes, three validation images, and ImageNet-V2's manner of folders.

  Image 2 lies before image 1, as sorted by class.
  """
  for name in ("n01", "n02"):
    save(tmp_path / "train" / name / "x.JPEG")
  for name in ("n01/ILSVRC2012_val_00000002", "n02/ILSVRC2012_val_00000001",
               "n02/ILSVRC2012_val_00000003"):
    save(tmp_path / "val" / f"{name}.JPEG")
  for name in ("0/a", "10/b", "2/c", "2/d"):
    save(tmp_path / "v2" / f"{name}.jpeg")
  (tmp_path / "real.json").write_text(json.dumps([[1, 4], [], [7]]))
  return tmp_path


def task(path, num_classes=20, **eval_):
  made = config.default()
  made.data.path, made.data.image_size = str(path), 32
  made.model.num_classes, made.eval.batch_size = num_classes, 8
  made.data.eval_split = eval_.pop("split", "val")
  made.eval.update(eval_)
  return classification.create(config.resolve(made))


def real(path, **kw):
  return task(path, labels="real", real_path=str(path / "real.json"), **kw)


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
  # The first has no labels; the second is right; the third at second place.
  assert (result["top1"], result["top5"]) == (0.5, 1.0)
  assert result["n_examples"] == 2


def test_one_label_an_image_counts_as_labels_do():
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
    ("[[1]", "cannot be read as JSON"), ("{}", "no list of lists"),
    ("[]", "no list of lists"), ("[[1], 3]", "image 2 has 3"),
    ("[[1], [20]]", "image 2 has [20]"), ("[[true]]", "image 1 has [True]"),
    ("\xff", "cannot be read as JSON")])
def test_a_malformed_file_is_a_line(imagenet, text, words):
  (imagenet / "real.json").write_bytes(text.encode("latin1"))
  with pytest.raises(errors.ConfigError) as caught:
    real(imagenet).make_data("eval")
  line = str(caught.value)
  assert line.startswith("config.eval.real_path: ") and words in line
  assert "\n" not in line


def test_images_that_the_file_does_not_know_are_named(imagenet):
  save(imagenet / "val" / "n01" / "ILSVRC2012_val_00000004.JPEG")
  with pytest.raises(errors.ConfigError, match=(
      r"^config.eval.real_path: .* has labels of ILSVRC2012_val_00000001 to "
      r"00000003, not of .*n01/ILSVRC2012_val_00000004\.JPEG$")):
    real(imagenet).make_data("eval")


@pytest.mark.parametrize("values, words", [
    ({"real_path": None}, "config.eval.real_path: None is not a file"),
    ({"real_path": "/nowhere.json"}, "'/nowhere.json' is not a file")])
def test_an_absent_file_is_a_line(imagenet, values, words):
  with pytest.raises(errors.ConfigError, match=words):
    task(imagenet, labels="real", **values)


def test_only_folders_have_other_labels():
  made = config.default()
  made.data.source, made.eval.labels = "digits", "number"
  with pytest.raises(errors.ConfigError, match=r"config.eval.labels: number"):
    config.resolve(made)


def test_folders_can_be_numbers_of_classes(imagenet):
  made = task(imagenet, split="v2", labels="number")
  batch, = made.make_data("eval").eval_batches()
  assert sorted(batch["label"][batch["mask"]].tolist()) == [0, 2, 2, 10]


def test_a_folder_that_is_no_number_is_a_line(imagenet):
  save(imagenet / "v2" / "n03" / "e.jpeg")
  with pytest.raises(errors.ConfigError,
                     match="v2 has the folder 'n03', which is no number"):
    task(imagenet, split="v2", labels="number").make_data("eval")


def test_a_number_beyond_the_head_is_a_line(imagenet):
  made = task(imagenet, split="v2", labels="number", num_classes=10)
  with pytest.raises(errors.ConfigError, match="num_classes: 10"):
    made.make_data("eval")
