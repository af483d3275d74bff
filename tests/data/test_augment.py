"""Random choices against timm's; policies; the stream with augmentation.

tests/golden/make_augment.py ran timm.
"""

import dataclasses
import math
import pathlib

import distributions
import image_files
import numpy as np
import preprocessing
import pytest

from metaformer_jax import errors
from metaformer_jax.config import policies, resolve, schema, tasks, typed
from metaformer_jax.data import loader
from metaformer_jax.data.augment import draw, pixels
from metaformer_jax.data.transforms import classification as transforms

TIMM = np.load(
    pathlib.Path(__file__).parents[1] / "golden" / "augment-timm.npz")
RECIPE = "rand-m9-mstd0.5-inc1"
N = 10_000


# Draws.


def chi_square(counts, expected):
  """(statistic - degrees of freedom) in standard deviations."""
  statistic = ((counts - expected) ** 2 / expected).sum()
  n = len(counts) - 1
  return (statistic - n) / math.sqrt(2 * n)


@pytest.fixture(scope="module")
def drawn():
  policy, rng = policies.parse(RECIPE), np.random.default_rng(0)
  return [draw.draw_rand(policy, "random", rng) for _ in range(N)]


def test_operations_are_as_likely(drawn):
  ops = [op for one in drawn for op in one]
  index = np.array([policies.RAND_OPS.index(op.name) for op in ops])
  counts = np.bincount(index, minlength=15)
  assert abs(chi_square(counts, np.full(15, len(index) / 15))) < 4
  theirs = np.bincount(TIMM["draw op"], minlength=15)
  assert abs(chi_square(theirs, np.full(15, theirs.sum() / 15))) < 4
  # 0, 1 or 2 are applied: 1/4, 1/2, 1/4.
  for n_ops in (np.array([len(one) for one in drawn]), TIMM["draw n_ops"]):
    assert abs(chi_square(np.bincount(n_ops), N * np.array(
        [0.25, 0.5, 0.25]))) < 4
  bicubic = np.mean([op.filter == "bicubic" for op in ops])
  assert abs(bicubic - 0.5) < 4 * 0.5 / math.sqrt(len(ops))


@pytest.mark.parametrize("index, name", list(enumerate(policies.RAND_OPS)))
def test_arguments_are_distributed_as_timms(drawn, index, name):
  ours = np.array([op.argument for one in drawn for op in one
                   if op.name == name])
  theirs = TIMM["draw argument"][TIMM["draw op"] == index]
  if name.startswith("translate"):  # As float32 in the file.
    assert np.abs(ours).max() <= 0.45 and np.abs(theirs).max() <= 0.4501
  assert distributions.ks(ours.astype(np.float32), theirs) < 1


def test_noise_can_be_uniform_none_or_clipped_elsewhere():
  rng = np.random.default_rng(0)

  def magnitudes(text):
    ops = [op for _ in range(4000) for op in
           draw.draw_rand(policies.parse(text), "bicubic", rng)]
    assert {op.filter for op in ops} == {"bicubic"}
    return np.array([abs(op.argument) / 3 for op in ops if op.name == "rotate"])

  assert set(magnitudes("rand-m9-inc1")) == {9.0}
  uniform = magnitudes("rand-m9-mstd101-inc1-p1-n3")
  assert distributions.ks(uniform, np.linspace(0, 9, N)) < 1
  wide = magnitudes("rand-m12-mstd0.5-mmax13-inc1")
  assert wide.min() > 10 and wide.max() <= 13


@pytest.mark.parametrize("name", policies.RAND_OPS)
def test_magnitudes_above_ten_can_be_applied(name):
  """As timm's can: posterize to fewer than 0 bits gives black there."""
  image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
  rng = np.random.default_rng(0)
  for magnitude in (12.4, 12.5, 15, 30):
    op = draw.Op(name, draw.argument(name, magnitude, rng))
    got = pixels.apply(image, op, (0, 0, 0))
    assert got.shape == image.shape and got.dtype == np.uint8
    assert name != "posterize" or not got.any()


def test_crops_are_distributed_as_timms():
  rng = np.random.default_rng(0)
  boxes = np.array([transforms.random_resized_crop_box(
      500, 375, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(N)])
  left, top, right, bottom = boxes.T
  ours = np.stack([top, left, bottom - top, right - left], -1)
  for got, want in zip(ours.T, TIMM["draw crop"].T):
    assert distributions.ks(got, want) < 1
  theirs = TIMM["draw crop"]
  assert distributions.ks(
      ours[:, 2] * ours[:, 3], theirs[:, 2].astype(int) * theirs[:, 3]) < 1


def test_three_augment_is_one_of_three_and_jitter_all_in_any_order():
  task = tasks.Classification(auto_augment="3a", color_jitter=0.3)
  rng = np.random.default_rng(0)
  ops = [draw.draw(task, rng) for _ in range(3000)]
  firsts = [one[0] for one in ops]
  counts = np.array([sum(op.name == name for op in firsts)
                     for name in ("solarize", "color", "blur")])
  assert abs(chi_square(counts, np.full(3, 1000))) < 4
  assert {op.argument for op in firsts if op.name != "blur"} == {128, 0.0}
  radii = np.array([op.argument for op in firsts if op.name == "blur"])
  assert distributions.ks(radii, np.linspace(0.1, 2.0, N)) < 1
  orders = {tuple(op.name for op in one[1:]) for one in ops}
  assert len(orders) == 6 and {len(order) for order in orders} == {3}
  factors = np.array([op.argument for one in ops for op in one[1:]])
  assert distributions.ks(factors, np.linspace(0.7, 1.3, N)) < 1


def test_only_rand_augment_disables_jitter():
  rng = np.random.default_rng(0)
  rand = tasks.Classification(auto_augment=RECIPE, color_jitter=0.4)
  plain = tasks.Classification(color_jitter=0.4)
  for _ in range(100):
    assert len(draw.draw(rand, rng)) <= 2
    assert len(draw.draw(plain, rng)) == 3
    assert draw.draw(tasks.Classification(), rng) == []


# Configuration.


@pytest.mark.parametrize("text, words", [
    ("rand-m9-mstd0.5", "has no inc1"), ("augmix-m3", "neither 3a nor like"),
    ("rand-q9-inc1", "'q9'"), ("rand-m9-m8-inc1", "'m8'"),
    ("rand-m9.5-inc1", "m that is not an integer"),
    ("rand-p1.5-inc1", "above 1"), ("rand-mx-inc1", "'mx'"),
    ("rand", "has no inc1"), ("3b", "neither")])
def test_a_bad_policy_is_a_line(text, words):
  wrong = typed.default()
  wrong.model.name = "poolformer_s12"
  wrong.data.source, wrong.task.num_classes = "digits", 10
  wrong.task.auto_augment = text
  with pytest.raises(errors.ConfigError) as caught:
    resolve.resolve(wrong)
  line = str(caught.value)
  assert line.startswith(f"config.task.auto_augment: {text!r} ")
  assert words in line and "\n" not in line


def test_policies_are_read_as_timm_reads_them():
  assert policies.parse("") is None
  assert policies.parse("3a") == policies.ThreeAugment()
  assert policies.parse(RECIPE) == policies.RandAugment(9, 2, 0.5, 0.5, 10)
  assert policies.parse("rand-n3-p0.7-mstd101-mmax15-inc1-m7") == (
      policies.RandAugment(7, 3, 0.7, math.inf, 15))


# In the stream.


class Pictures:
  """A source of ten pictures."""

  n_classes = None

  def __len__(self):
    return 10

  def __getitem__(self, index):
    return {"label": index, "image": image_files.encode(
        np.random.default_rng(index).integers(0, 256, (40, 50, 3), np.uint8))}


def batches(n, position=0, batch_size=10, **kw):
  task = tasks.Classification(image_size=16, auto_augment=RECIPE)
  transform = preprocessing.made(transforms.TrainTransform, schema.Data(), task)
  made = loader.Loader(Pictures(), transform, batch_size, **kw)
  stream = made.train_batches(position)
  got = [next(stream) for _ in range(n)]
  stream.close()
  return {key: np.concatenate([b[key] for b in got]) for key in got[0]}


def test_the_stream_with_augmentation_is_a_function_of_its_position():
  whole = batches(4)
  later = batches(5, position=15, batch_size=5)
  np.testing.assert_array_equal(later["image"], whole["image"][15:])


@pytest.mark.parametrize("repeats", [1, 3, 4])
def test_repeats_come_in_a_row_and_differ(repeats):
  plain, got = batches(2), batches(2, repeats=repeats)
  for start in (0, 10):  # Two epochs, each of ten positions.
    labels = got["label"][start:start + 10]
    order = plain["label"][start:start + 10]
    np.testing.assert_array_equal(labels, np.repeat(order, repeats)[:10])
  assert len({image.tobytes() for image in got["image"]}) == 20
  # The first of each is the same as without repeats.
  np.testing.assert_array_equal(got["image"][0], plain["image"][0])
  np.testing.assert_array_equal(
      batches(1, position=7, repeats=repeats)["image"], got["image"][7:17])


def test_the_recipe_in_one_transform():
  """The same as crop, flip and the drawn operations one by one."""
  data = schema.Data(mean=(0.1, 0.5, 1))
  task = tasks.Classification(image_size=24, auto_augment=RECIPE)
  plain = dataclasses.replace(task, auto_augment="")
  record, changed = Pictures()[3], 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    image = preprocessing.made(transforms.TrainTransform, data, plain)(
        record, rng)["image"]
    for op in draw.draw(task, rng):
      image = pixels.apply(image, op, (26, 128, 255))
      changed += 1
    got = preprocessing.made(transforms.TrainTransform, data, task)(
        record, np.random.default_rng(seed))
    np.testing.assert_array_equal(got["image"], image)
  assert 20 < changed < 60
