"""Augmentation against timm: pixels of each operation, and what is drawn.

tests/golden/make_augment.py ran timm.
"""

import dataclasses
import io
import math
import pathlib

import augment_cases
import numpy as np
import pytest
from numba.core import caching
from PIL import Image

from metaformer_jax import errors
from metaformer_jax.config import policies, schema
from metaformer_jax.config import resolve as config
from metaformer_jax.data import loader
from metaformer_jax.data.augment import draw as augment
from metaformer_jax.data.augment import pixels
from metaformer_jax.data.transforms import classification as transforms

TIMM = np.load(pathlib.Path(__file__).parent / "golden" / "augment-timm.npz")
RECIPE = "rand-m9-mstd0.5-inc1"
N = 10_000
MOVING = {case[0] for case in augment_cases.MOVING}


def difference(got, want):
  got, want = (np.asarray(v).astype(int) for v in (got, want))
  assert got.shape == want.shape
  return np.abs(got - want).max()


# Pixels.


@pytest.mark.parametrize("kind", augment_cases.FILTERS)
@pytest.mark.parametrize("name", list(augment_cases.encoded_images()))
def test_evaluation_gives_timms_pixels(name, kind):
  cfg = schema.Data(image_size=32, crop_pct=0.9, interpolation=kind)
  data = TIMM[f"file {name}"].tobytes()
  got = transforms.EvalTransform(cfg)({"image": data, "label": 0})["image"]
  assert difference(got, TIMM[f"eval {name} {kind}"]) <= 1


def test_there_are_twenty_images_to_evaluate():
  assert len(augment_cases.encoded_images()) == 20


# With Numba and without.


@pytest.fixture(params=["pillow", "numba"])
def engine(request, monkeypatch):
  if request.param == "pillow":
    monkeypatch.setattr(pixels, "kernels", None)


@pytest.mark.parametrize(
    "case", list(augment_cases.pixel_cases()), ids=lambda case: case[0])
@pytest.mark.usefixtures("engine")
def test_an_operation_gives_timms_pixels(case):
  key, name, _, value, kind = case
  image = np.array(augment_cases.picture())
  before = image.copy()
  got = augment.apply(image, augment.Op(name, value, kind),
                      augment.fill_colour(augment_cases.MEAN))
  assert got.dtype == np.uint8
  assert difference(got, TIMM[f"op {key}"]) <= 1
  np.testing.assert_array_equal(image, before)


# Beyond what a recipe draws, too.
ARGUMENTS = {
    "posterize": (1, 4, 8), "solarize": (0, 100, 256),
    "solarize_add": (0, 60, 128),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"),
                    (0.0, 0.1, 0.73, 1.0, 1.9, 5.0)),
    "rotate": (-180, -45, -1e-3, 0, 17.3, 90),
    **dict.fromkeys(("shear_x", "shear_y"), (-1.7, 0, 0.013, 0.3)),
    **dict.fromkeys(("translate_x", "translate_y"), (-0.45, 0, 0.1, 0.5, 1.2))}


@pytest.mark.parametrize("name", policies.RAND_OPS)
@pytest.mark.usefixtures("engine")
def test_an_operation_gives_pillows_pixels_exactly(name):
  for case, image in augment_cases.odd_pictures():
    for value in ARGUMENTS.get(name, (0,)):
      for kind in augment_cases.FILTERS if name in MOVING else ("bilinear",):
        want = augment_cases.by_pillow(Image.fromarray(image), name, value,
                                       kind, (7, 0, 255))
        got = augment.apply(image, augment.Op(name, value, kind), (7, 0, 255))
        np.testing.assert_array_equal(got, np.asarray(want),
                                      f"{case}, {value}, {kind}")


@pytest.mark.parametrize("kind", augment_cases.FILTERS)
@pytest.mark.usefixtures("engine")
def test_a_resized_crop_has_pillows_pixels_exactly(kind):
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8))
  for size in (1, 7, 32, 50, 224):
    for width, height in (*rng.integers(1, 400, (12, 2)), (1, 1), (400, 1),
                          (1, 400), (16, 17), (400, 400)):
      left, top = rng.integers(401 - width), rng.integers(401 - height)
      box = tuple(map(int, (left, top, left + width, top + height)))
      want = picture.crop(box).resize((size, size), pixels.FILTERS[kind])
      for flip in (False, True):
        got = pixels.crop_resize(picture, box, size, kind, flip)
        np.testing.assert_array_equal(
            got[:, ::-1] if flip else got, np.asarray(want), str((box, size)))


def test_kernels_compile_where_nothing_can_be_kept(monkeypatch):
  """As in a read-only installation without a home directory."""
  monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
  assert pixels.kernels._compile(lambda x: x + 1)(2) == 3


# Draws.


def ks(got, want):
  """Kolmogorov-Smirnov's two-sample statistic over its 0.1 % critical value."""
  at = np.concatenate([got, want])
  one, other = (np.searchsorted(np.sort(v), at, side="right") / len(v)
                for v in (got, want))
  critical = 1.95 * math.sqrt((len(got) + len(want)) / len(got) / len(want))
  return np.abs(one - other).max() / critical


def chi_square(counts, expected):
  """(statistic - degrees of freedom) in standard deviations."""
  statistic = ((counts - expected) ** 2 / expected).sum()
  n = len(counts) - 1
  return (statistic - n) / math.sqrt(2 * n)


@pytest.fixture(scope="module")
def drawn():
  policy, rng = policies.parse(RECIPE), np.random.default_rng(0)
  return [augment.draw_rand(policy, "random", rng) for _ in range(N)]


def test_operations_are_as_likely(drawn):
  ops = [op for one in drawn for op in one]
  index = np.array([policies.RAND_OPS.index(op.name) for op in ops])
  counts = np.bincount(index, minlength=15)
  assert abs(chi_square(counts, np.full(15, len(index) / 15))) < 4
  theirs = np.bincount(TIMM["draw op"], minlength=15)
  assert abs(chi_square(theirs, np.full(15, theirs.sum() / 15))) < 4
  # 0, 1 or 2 are done: 1/4, 1/2, 1/4.
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
  assert ks(ours.astype(np.float32), theirs) < 1


def test_noise_can_be_uniform_none_or_clipped_elsewhere():
  rng = np.random.default_rng(0)

  def magnitudes(text):
    ops = [op for _ in range(4000) for op in
           augment.draw_rand(policies.parse(text), "bicubic", rng)]
    assert {op.filter for op in ops} == {"bicubic"}
    return np.array([abs(op.argument) / 3 for op in ops if op.name == "rotate"])

  assert set(magnitudes("rand-m9-inc1")) == {9.0}
  uniform = magnitudes("rand-m9-mstd101-inc1-p1-n3")
  assert ks(uniform, np.linspace(0, 9, N)) < 1
  wide = magnitudes("rand-m12-mstd0.5-mmax13-inc1")
  assert wide.min() > 10 and wide.max() <= 13


def test_crops_are_distributed_as_timms():
  rng = np.random.default_rng(0)
  boxes = np.array([transforms.random_resized_crop_box(
      500, 375, (0.08, 1.0), (3 / 4, 4 / 3), rng) for _ in range(N)])
  left, top, right, bottom = boxes.T
  ours = np.stack([top, left, bottom - top, right - left], -1)
  for got, want in zip(ours.T, TIMM["draw crop"].T):
    assert ks(got, want) < 1
  assert ks(ours[:, 2] * ours[:, 3],
            TIMM["draw crop"][:, 2].astype(int) * TIMM["draw crop"][:, 3]) < 1


def test_three_augment_is_one_of_three_and_jitter_all_in_any_order():
  cfg = schema.Data(auto_augment="3a", color_jitter=0.3)
  rng = np.random.default_rng(0)
  ops = [augment.draw(cfg, rng) for _ in range(3000)]
  firsts = [one[0] for one in ops]
  counts = np.array([sum(op.name == name for op in firsts)
                     for name in ("solarize", "color", "blur")])
  assert abs(chi_square(counts, np.full(3, 1000))) < 4
  assert {op.argument for op in firsts if op.name != "blur"} == {128, 0.0}
  assert ks(np.array([op.argument for op in firsts if op.name == "blur"]),
            np.linspace(0.1, 2.0, N)) < 1
  orders = {tuple(op.name for op in one[1:]) for one in ops}
  assert len(orders) == 6 and {len(order) for order in orders} == {3}
  factors = np.array([op.argument for one in ops for op in one[1:]])
  assert ks(factors, np.linspace(0.7, 1.3, N)) < 1


def test_jitter_is_inert_beside_rand_augment_only():
  rng = np.random.default_rng(0)
  rand = schema.Data(auto_augment=RECIPE, color_jitter=0.4)
  plain = schema.Data(color_jitter=0.4)
  for _ in range(100):
    assert len(augment.draw(rand, rng)) <= 2
    assert len(augment.draw(plain, rng)) == 3
    assert augment.draw(schema.Data(), rng) == []


# Configuration.


@pytest.mark.parametrize("text, words", [
    ("rand-m9-mstd0.5", "lacks inc1"), ("augmix-m3", "neither 3a nor like"),
    ("rand-q9-inc1", "'q9'"), ("rand-m9-m8-inc1", "'m8'"),
    ("rand-m9.5-inc1", "m that is not whole"), ("rand-p1.5-inc1", "above 1"),
    ("rand-mx-inc1", "'mx'"), ("rand", "lacks inc1"), ("3b", "neither")])
def test_a_bad_policy_is_a_line(text, words):
  wrong = config.default()
  wrong.data.source, wrong.model.num_classes = "digits", 10
  wrong.data.auto_augment = text
  with pytest.raises(errors.ConfigError) as caught:
    config.resolve(wrong)
  line = str(caught.value)
  assert line.startswith(f"config.data.auto_augment: {text!r} ")
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
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(index).integers(
        0, 256, (40, 50, 3), np.uint8)).save(out, "PNG")
    return {"image": out.getvalue(), "label": index}


def batches(n, position=0, batch_size=10, **kw):
  cfg = schema.Data(image_size=16, auto_augment=RECIPE)
  made = loader.Loader(Pictures(), transforms.TrainTransform(cfg), batch_size,
                       **kw)
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
  # The first of each is what it is without repeats.
  np.testing.assert_array_equal(got["image"][0], plain["image"][0])
  np.testing.assert_array_equal(
      batches(1, position=7, repeats=repeats)["image"], got["image"][7:17])


def test_the_recipe_in_one_transform():
  """Crop, flip and the drawn operations, done one by one."""
  cfg = schema.Data(image_size=24, auto_augment=RECIPE, mean=(0.1, 0.5, 1))
  record = Pictures()[3]
  plain = dataclasses.replace(cfg, auto_augment="")
  changed = 0
  for seed in range(40):
    rng = np.random.default_rng(seed)
    image = transforms.TrainTransform(plain)(record, rng)["image"]
    for op in augment.draw(cfg, rng):
      image = augment.apply(image, op, (26, 128, 255))
      changed += 1
    got = transforms.TrainTransform(cfg)(record, np.random.default_rng(seed))
    np.testing.assert_array_equal(got["image"], image)
  assert 20 < changed < 60
