"""Transforms of images with label maps, compared with mmsegmentation's.

The golden file is made by tests/golden/make_segmentation_transforms.py.
"""

import dataclasses
import pathlib

import numpy as np
import pytest
import segmentation_cases as cases
from scipy import stats

from metaformer_jax.config import schema
from metaformer_jax.config.tasks import segmentation as section
from metaformer_jax.data.augment import photometric
from metaformer_jax.data.transforms import segmentation

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" /
                 "segmentation_transforms.npz")
TASK = section.Segmentation(
    num_classes=150, reduce_zero_label=True, scale=cases.SCALE,
    crop_size=cases.CROP)
DATA = schema.Data()


def task(**changes):
  return dataclasses.replace(TASK, **changes)


def record(image, labels):
  return {"image": image, "label": labels}


class Script:
  """A generator that returns given draws, in the order of our transform."""

  def __init__(self, draws):
    self._uniform = [draws.scale]
    self._integers = [v for corner in draws.corners for v in corner]
    self._flip = draws.flip
    for name in ("brightness", "contrast", "saturation", "hue"):
      value = getattr(draws.change, name)
      (self._integers if name == "hue" else self._uniform).append(value or 0)
      self._integers.append(int(value is not None))
    self._integers.append(int(draws.change.contrast_last))
    self._first = True

  def uniform(self, low, high):
    value = self._uniform.pop(0)
    if self._first:
      value, self._first = low + (high - low) * value, False
    return value

  def integers(self, *limits, endpoint=False):
    del limits, endpoint
    return self._integers.pop(0)

  def random(self):
    return 0.0 if self._flip else 1.0

  def is_used_up(self):
    return not self._uniform and not self._integers


# Training, against mmsegmentation.


@pytest.mark.parametrize("name", cases.TRAIN)
def test_training_equals_mmsegmentation_at_fixed_draws(name):
  case = cases.TRAIN[name]
  script = Script(case.draws)
  example = segmentation.TrainTransform(
      DATA, task(cat_max_ratio=case.cat_max_ratio))(
          record(*cases.picture(case)), script)
  assert script.is_used_up()
  np.testing.assert_array_equal(example["label"], GOLDEN[f"train/{name}/label"])
  got = example["image"]
  np.testing.assert_array_equal(got, GOLDEN[f"train/{name}/image"])
  height, width = example["size"]
  assert not got[height:].any() and not got[:, width:].any()
  assert (example["label"][height:] == 255).all()
  assert (example["label"][:, width:] == 255).all()


def test_a_distortion_by_nothing_changes_nothing():
  image = np.random.default_rng(0).integers(0, 256, (7, 40, 3), np.uint8)
  np.testing.assert_array_equal(
      photometric.apply(image, photometric.Distortion()), image)
  np.testing.assert_array_equal(
      photometric.apply(image, photometric.Distortion(0.0, 1.0)), image)


# Evaluation, against the official AlignResize.


@pytest.mark.parametrize("size", cases.EVAL_SIZES)
def test_evaluation_equals_align_resize(size):
  image, labels = cases.picture(cases.Case(*size))
  transform = segmentation.EvalTransform(DATA, task(
      eval_scales=cases.EVAL_SCALES))
  example = transform(record(image, labels))
  for i, suffix in enumerate(("", "1", "2")):
    expected = GOLDEN["eval/{}x{}/{}".format(*size, i)]
    height, width = example[f"size{suffix}"]
    assert (height, width) == expected.shape[:2]
    got = example[f"image{suffix}"]
    np.testing.assert_array_equal(got[:height, :width], expected)
    assert not got[height:].any() and not got[:, width:].any()
    assert not any(side % 128 for side in got.shape[:2])
  assert example["label_size"].tolist() == list(size)
  height, width = size
  np.testing.assert_array_equal(example["label"][:height, :width],
                                cases.reduced(labels))
  assert (example["label"][height:] == 255).all()
  assert (example["label"][:, width:] == 255).all()
  alone = transform.preprocess(image)
  assert alone.keys() == example.keys()
  assert alone.pop("label").shape == example["label"].shape
  for key, value in alone.items():
    np.testing.assert_array_equal(value, example[key])


def test_without_alignment_the_image_is_not_stretched():
  image, labels = cases.picture(cases.Case(33, 47))
  example = segmentation.EvalTransform(DATA, task(eval_align=1))(
      record(image, labels))
  # 32 / 33 of the sides.
  assert example["size"].tolist() == [32, 46]


# Label maps.


@pytest.mark.parametrize("reduce, label, expected", [
    (True, 0, 255), (True, 1, 0), (True, 150, 149), (True, 255, 255),
    (False, 0, 0), (False, 149, 149), (False, 255, 255)])
def test_labels_become_classes(reduce, label, expected):
  labels = np.full((32, 32), label, np.uint8)
  example = segmentation.EvalTransform(DATA, task(reduce_zero_label=reduce))(
      record(np.zeros((32, 32, 3), np.uint8), labels))
  assert (example["label"][:32, :32] == expected).all()


@pytest.mark.parametrize("reduce, label, dtype", [
    (True, 151, np.uint8), (False, 150, np.uint8), (False, 254, np.uint8),
    (True, 256, np.uint16), (False, 511, np.int32), (False, -1, np.int16)])
def test_a_label_out_of_range_is_named(reduce, label, dtype):
  labels = np.ones((5, 7), dtype)
  labels[3, 2] = label
  with pytest.raises(ValueError, match=f"has {label} at row 3, column 2; .* "
                     f"0 to {150 if reduce else 149}, and 255"):
    segmentation.EvalTransform(DATA, task(reduce_zero_label=reduce))(
        record(np.zeros((5, 7, 3), np.uint8), labels))


def test_up_to_255_classes_fit():
  labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
  example = segmentation.EvalTransform(DATA, task(
      num_classes=255, reduce_zero_label=False))(
          record(np.zeros((16, 16, 3), np.uint8), labels))
  np.testing.assert_array_equal(example["label"][:16, :16], labels)


def test_a_label_map_of_another_size_is_an_error():
  with pytest.raises(ValueError, match="7 x 5, but the image is 5 x 7 pixels"):
    segmentation.TrainTransform(DATA, TASK)(
        record(np.zeros((7, 5, 3), np.uint8), np.ones((5, 7), np.uint8)),
        np.random.default_rng(0))


# Draws.


def draws(n=4000, **changes):
  """The generator's draws of n examples: sizes, boxes and distortions."""
  made = task(**changes)
  sizes, boxes, distortions = [], [], []
  labels = np.ones((300, 400), np.uint8)
  for i in range(n):
    rng = np.random.default_rng((i, 7))
    size = segmentation.draw_size(*labels.shape, made, rng)
    sizes.append(size)
    boxes.append(segmentation.draw_box(labels, size, made, rng))
    distortions.append(photometric.draw(rng))
  return np.array(sizes), np.array(boxes), distortions


@pytest.fixture(scope="module")
def drawn():
  return draws(scale=(20_480, 5_120), cat_max_ratio=1.0)


def is_uniform(values, low, high):
  """Kolmogorov and Smirnov's test."""
  return stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3


def are_even(counts):
  return stats.chisquare(counts).pvalue > 1e-3


def test_scales_are_uniform(drawn):
  factors = drawn[0] / (5_120, 5_120 * 4 / 3)
  np.testing.assert_allclose(factors[:, 0], factors[:, 1], rtol=1e-3)
  assert is_uniform(factors[:, 0], 0.5, 2)


def test_crops_are_uniform_in_the_resized_image(drawn):
  sizes, boxes, _ = drawn
  assert (boxes[:, 2:] == 32).all()
  assert (boxes[:, :2] >= 0).all()
  assert (boxes[:, :2] + 32 <= sizes).all()
  for axis in (0, 1):
    # In the middle of its interval, as offsets are integers.
    assert is_uniform((boxes[:, axis] + 0.5) / (sizes[:, axis] - 31), 0, 1)
  assert abs(np.corrcoef(boxes[:, 0] / sizes[:, 0],
                         boxes[:, 1] / sizes[:, 1])[0, 1]) < 0.06


def test_all_crops_of_a_small_margin_are_equally_likely():
  """Both ends are drawn: 33 rows and 35 columns have 2 x 4 crops."""
  labels = np.ones((33, 35), np.uint8)
  rng = np.random.default_rng(0)
  boxes = [segmentation.draw_box(labels, (33, 35), task(cat_max_ratio=1.0), rng)
           for _ in range(2000)]
  counts = np.unique(boxes, axis=0, return_counts=True)[1]
  assert len(counts) == 8 and are_even(counts)


def test_distortions_are_drawn_as_in_mmsegmentation(drawn):
  changes = drawn[2]
  ranges = {"brightness": (-32, 32), "contrast": (0.5, 1.5),
            "saturation": (0.5, 1.5), "hue": None}
  used = {name: np.array([getattr(c, name) is not None for c in changes])
          for name in ranges}
  for name, limits in ranges.items():
    values = [getattr(c, name) for c in changes
              if getattr(c, name) is not None]
    assert are_even([len(values), len(changes) - len(values)])
    if limits:
      assert is_uniform(values, *limits)
    else:
      kinds, counts = np.unique(values, return_counts=True)
      assert kinds.tolist() == list(range(-18, 18)) and are_even(counts)
  last = np.array([c.contrast_last for c in changes])
  assert are_even(np.bincount(last))
  # All 32 combinations are equally likely, so that the draws are independent.
  bits = np.stack([*used.values(), last]).T @ (1, 2, 4, 8, 16)
  assert are_even(np.bincount(bits, minlength=32))


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_flips_have_their_probability(flip):
  """The red half of the picture tells on which side it is."""
  image = np.zeros((32, 32, 3), np.uint8)
  image[:, :16, 0] = 255
  labels = np.ones((32, 32), np.uint8)
  labels[:, :16] = 2
  transform = segmentation.TrainTransform(DATA, task(
      flip=flip, scale_range=(1.0, 1.0), photometric=False))
  flipped = 0
  for i in range(1000):
    example = transform(record(image, labels), np.random.default_rng(i))
    is_flipped = bool(example["image"][0, -1, 0])
    assert (example["label"][:, -16:] == 1).all() == is_flipped
    flipped += is_flipped
  assert stats.binomtest(flipped, 1000, flip).pvalue > 1e-3


def test_the_largest_class_of_a_crop_is_limited_where_it_can_be():
  """Left of the middle there is one class only, right of it there are many."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 20, (64, 256)).astype(np.uint8)
  labels[:, :192] = 3
  labels[:, 192:][rng.random((64, 64)) < 0.3] = 255  # These do not count.
  n = 400

  def shares(ratio):
    found = []
    for i in range(n):
      box = segmentation.draw_box(labels, (64, 256), task(cat_max_ratio=ratio),
                                  np.random.default_rng(i))
      crop = segmentation.crop_labels(labels, (64, 256), box, flip=False)
      counts = np.bincount(crop[crop != 255], minlength=255)
      found.append(counts.max() / counts.sum())
    return np.array(found)

  # The crop is good if its left is beyond 192 - 32 (1 - a), a share of p of
  # all; eleven draws all fail with a probability of (1 - p)^11.
  free = (shares(1.0) >= 0.75).mean()
  expected = free ** 11
  failed = int((shares(0.75) >= 0.75).sum())
  assert stats.binomtest(failed, n, expected).pvalue > 1e-3
  assert free > 0.6 and failed / n < free / 2


def test_an_example_depends_on_its_generator_only():
  image, labels = cases.picture(cases.Case(61, 47))
  transform = segmentation.TrainTransform(DATA, TASK)
  one, same, other = (transform(record(image, labels),
                                np.random.default_rng(seed))
                      for seed in (3, 3, 4))
  for key in one:
    np.testing.assert_array_equal(one[key], same[key])
  assert not np.array_equal(one["image"], other["image"])
