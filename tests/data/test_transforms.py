"""Crops and resizing of any size, against rules and pixels given here."""

import dataclasses
import math

import numpy as np
import preprocessing
import pytest
from image_files import encode
from PIL import Image

from metaformer_jax.config import schema, tasks
from metaformer_jax.data.transforms import classification as transforms

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC


def pixels(picture):
  return np.asarray(picture).tolist()


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(
      0, 256, (height, width, 3), np.uint8)


# The training crop.


class Scripted:
  """An rng that makes its draws from given numbers in [0, 1)."""

  def __init__(self, tries, place):
    self._tries, self._place = iter(tries.ravel()), iter(place)

  def uniform(self, low, high):
    return low + (high - low) * next(self._tries)

  def integers(self, high, *, endpoint):
    assert endpoint
    return math.floor((high + 1) * next(self._place))


def get_params(width, height, scale, ratio, tries, x, y):
  """torchvision's RandomResizedCrop.get_params, with given draws.

  Args:
    width, height, scale, ratio: as there.
    tries: (area, aspect) in [0, 1) of each of the ten tries.
    x, y: position of the box in [0, 1).
  """
  for area, aspect in tries:
    target = width * height * (scale[0] + (scale[1] - scale[0]) * area)
    low, high = np.log(ratio)
    aspect = math.exp(low + (high - low) * aspect)
    w = round(math.sqrt(target * aspect))
    h = round(math.sqrt(target / aspect))
    if 0 < w <= width and 0 < h <= height:
      i = math.floor((height - h + 1) * y)
      j = math.floor((width - w + 1) * x)
      return j, i, j + w, i + h
  in_ratio = width / height
  if in_ratio < min(ratio):
    w, h = width, round(width / min(ratio))
  elif in_ratio > max(ratio):
    w, h = round(height * max(ratio)), height
  else:
    w, h = width, height
  i, j = (height - h) // 2, (width - w) // 2
  return j, i, j + w, i + h


@pytest.mark.parametrize("size", [
    (224, 224), (500, 375), (375, 500), (31, 33), (8, 8), (300, 40), (2, 90),
    (1, 500), (500, 1), (1, 1)])
@pytest.mark.parametrize("scale, ratio", [
    ((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 2.0)),
    ((0.25, 0.25), (1.0, 1.0))])
def test_box_follows_torchvisions_rule(size, scale, ratio):
  rng = np.random.default_rng(0)
  for _ in range(50):
    tries, place = rng.random((10, 2)), rng.random(2)
    got = transforms.random_resized_crop_box(*size, scale, ratio,
                                             Scripted(tries, place))
    assert got == get_params(*size, scale, ratio, tries, *place)


@pytest.mark.parametrize("size", [
    (500, 375), (33, 31), (7, 3), (1, 1), (1, 500), (500, 1), (3, 200)])
def test_box_is_inside_and_never_empty(size):
  rng = np.random.default_rng(0)
  width, height = size
  for _ in range(1000):
    left, top, right, bottom = transforms.random_resized_crop_box(
        width, height, (0.08, 1.0), (3 / 4, 4 / 3), rng)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert all(isinstance(v, int) for v in (left, top, right, bottom))


@pytest.mark.parametrize("size, ratio", [
    ((9, 1), (0.2, 0.4)), ((1, 9), (2.5, 5.0))])
def test_fallback_box_is_never_empty(size, ratio):
  left, top, right, bottom = transforms.random_resized_crop_box(
      *size, (0.01, 0.02), ratio, np.random.default_rng(0))
  assert left < right and top < bottom


def from_uniform(values):
  """Kolmogorov-Smirnov's statistic of values, against uniform on [0, 1]."""
  values = np.sort(values)
  n = len(values)
  return max(np.max(np.arange(1, n + 1) / n - values),
             np.max(values - np.arange(n) / n))


def test_area_aspect_and_place_are_uniform():
  """Every first try fits, so that no rejection changes the distributions."""
  rng = np.random.default_rng(0)
  n, side, scale, ratio = 4000, 10_000, (0.08, 0.5), (3 / 4, 4 / 3)
  left, top, right, bottom = np.array([
      transforms.random_resized_crop_box(side, side, scale, ratio, rng)
      for _ in range(n)]).T
  w, h = right - left, bottom - top
  area = (w * h / side**2 - scale[0]) / (scale[1] - scale[0])
  aspect = (np.log(w / h) - np.log(ratio[0])) / np.log(ratio[1] / ratio[0])
  draws = (area, aspect, left / (side - w), top / (side - h))
  for draw in draws:
    assert from_uniform(draw) < 1.63 / math.sqrt(n)  # The 1 % level.
  correlation = np.corrcoef(draws) - np.eye(4)
  assert np.abs(correlation).max() < 4 / math.sqrt(n)


def test_box_of_extreme_shapes_is_the_centre():
  rng = np.random.default_rng(0)
  box = transforms.random_resized_crop_box
  area, ratio = (0.5, 1.0), (3 / 4, 4 / 3)
  for _ in range(20):
    assert box(500, 1, area, ratio, rng) == (249, 0, 250, 1)
    assert box(1, 500, area, ratio, rng) == (0, 249, 1, 250)
    assert box(500, 30, area, ratio, rng) == (230, 0, 270, 30)
    assert box(30, 501, area, ratio, rng) == (0, 230, 30, 270)


# Resize and centre crop.


@pytest.mark.parametrize("size, shorter, expected", [
    # The longer side is rounded down: 248 * 500 / 375 = 330.67.
    ((500, 375), 248, (330, 248)), ((375, 500), 248, (248, 330)),
    ((333, 500), 248, (248, 372)), ((500, 333), 248, (372, 248)),
    ((101, 99), 7, (7, 7)), ((3, 3), 10, (10, 10)), ((2, 3), 9, (9, 13)),
    ((3, 2), 9, (13, 9)), ((1, 500), 4, (4, 2000)), ((500, 1), 4, (2000, 4)),
    ((640, 480), 480, (640, 480)),
])
def test_resize_shorter_gives_torchvisions_size(size, shorter, expected):
  picture = Image.fromarray(noise(size[1], size[0]))
  got = transforms.resize_shorter(picture, (shorter, shorter), "bicubic")
  assert got.size == expected
  np.testing.assert_array_equal(got, picture.resize(expected, BICUBIC))


@pytest.mark.parametrize("size, target, expected", [
    # (width, height), then (height, width), then (width, height).
    ((500, 375), (248, 100), (330, 248)), ((500, 375), (100, 248), (248, 186)),
    ((500, 375), (3, 4), (4, 3)), ((40, 40), (20, 60), (60, 60)),
    ((7, 3), (30, 71), (71, 30)), ((7, 3), (31, 71), (72, 31)),
    ((1, 500), (10, 4), (4, 2000)), ((500, 1), (4, 10), (2000, 4))])
@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_resize_covers_a_size_that_is_not_square(size, target, expected, kind):
  picture = Image.fromarray(noise(size[1], size[0]))
  got = transforms.resize_shorter(picture, target, kind)
  assert got.size == expected
  np.testing.assert_array_equal(
      got, picture.resize(expected, Image.Resampling[kind.upper()]))


def test_resize_covers_any_size_with_no_pixel_to_spare():
  rng = np.random.default_rng(0)
  for w, h, height, width in rng.integers(1, 50, (300, 4)).tolist():
    got = transforms.resize_shorter(
        Image.new("L", (w, h)), (height, width), "bilinear")
    assert got.width >= width and got.height >= height
    assert got.width == width or got.height == height


def test_resize_averages_all_pixels_when_it_shrinks():
  """A checkerboard becomes gray: it does not sample single pixels."""
  board = np.indices((64, 64)).sum(0) % 2 * 255
  for name in ("bilinear", "bicubic"):
    small = transforms.resize_shorter(
        Image.fromarray(board.astype(np.uint8)), (8, 8), name)
    assert np.abs(np.asarray(small).astype(int) - 127).max() <= 6


def columns(width, height=3):
  """A picture whose values are the column, counted from 1."""
  row = np.arange(1, width + 1, dtype=np.uint8)
  return Image.fromarray(np.tile(row, (height, 1)))


# torchvision's crop begins at round((side - size) / 2), half to even.
@pytest.mark.parametrize("extra, start", [
    (0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4)])
def test_centre_crop_begins_where_torchvisions_does(extra, start):
  got = transforms.centre_crop(columns(5 + extra, 5), (5, 5))
  assert pixels(got) == [list(range(start + 1, start + 6))] * 5
  turned = columns(5 + extra, 5).transpose(Image.Transpose.TRANSPOSE)
  got = transforms.centre_crop(turned, (5, 5))
  assert pixels(got) == [[i] * 5 for i in range(start + 1, start + 6)]


# It pads smaller pictures by (size - side) // 2 on the left and the top.
@pytest.mark.parametrize("missing", [
    1, 2, 3, 4, 5, 6, 7])
def test_centre_crop_of_a_smaller_picture_pads_with_black(missing):
  size = 2 + missing
  before = missing // 2
  row = [0] * before + [1, 2] + [0] * (missing - before)
  got = pixels(transforms.centre_crop(columns(2, size), (size, size)))
  assert got == [row] * size


@pytest.mark.parametrize("size", [(3, 7), (7, 3), (1, 20), (20, 1), (9, 12)])
def test_centre_crop_treats_each_side_alone(size):
  image = noise(9, 12)
  got = np.asarray(transforms.centre_crop(Image.fromarray(image), size))
  assert got.shape == (*size, 3)
  expected = np.zeros((*size, 3), np.uint8)
  places = []
  for side, wanted in zip(image.shape, size):
    if side >= wanted:
      start = round((side - wanted) / 2)
      places.append((slice(start, start + wanted), slice(None)))
    else:
      start = (wanted - side) // 2
      places.append((slice(None), slice(start, start + side)))
  (rows, to_rows), (cols, to_cols) = places
  expected[to_rows, to_cols] = image[rows, cols]
  np.testing.assert_array_equal(got, expected)


# Whole transforms.


@dataclasses.dataclass(frozen=True)
class Oblong(tasks.Classification):
  """Classification with an input that is not square."""

  size: tuple[int, int] = (0, 0)

  @property
  def input_size(self):
    return self.size


def task(**kw):
  section = Oblong if "size" in kw else tasks.Classification
  return section(**kw)


def evaluate(image, **kw):
  transform = preprocessing.made(transforms.EvalTransform, schema.Data(),
                                 task(**kw))
  return transform({"image": image, "label": 3})


def test_eval_of_a_fitting_image_changes_nothing():
  image = noise(12, 12)
  got = evaluate(image, image_size=12, crop_pct=1.0)
  np.testing.assert_array_equal(got["image"], image)
  assert got["label"] == 3 and got["label"].dtype == np.int32


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_pct, shorter", [
    (0.9, 35), (0.875, 36), (1.0, 32), (0.95, 33)])
def test_eval_of_a_gradient_is_pillows_resize_and_crop(
    interpolation, crop_pct, shorter):
  y, x = np.indices((60, 81))
  image = np.stack([x * 3, y * 4, (x + y) % 256], -1).astype(np.uint8)
  longer = shorter * 81 // 60
  resized = np.asarray(Image.fromarray(image).resize(
      (longer, shorter), getattr(Image.Resampling, interpolation.upper())))
  left, top = round((longer - 32) / 2), round((shorter - 32) / 2)
  got = evaluate(image, image_size=32, crop_pct=crop_pct,
                 interpolation=interpolation)["image"]
  np.testing.assert_array_equal(
      got, resized[top:top + 32, left:left + 32])
  rise = got.astype(int)  # Red to the right, green downwards.
  assert (np.diff(rise[..., 0], axis=1) >= 0).all()
  assert (np.diff(rise[..., 1], axis=0) >= 0).all()


def test_eval_takes_bytes_and_the_whole_batch_has_one_size():
  for size in ((1, 500), (500, 1), (1, 1), (9, 7), (75, 113)):
    image = noise(*size)
    got = evaluate(encode(Image.fromarray(image)), image_size=16)
    np.testing.assert_array_equal(
        got["image"], evaluate(image, image_size=16)["image"])
    assert got["image"].shape == (16, 16, 3)
    assert got["image"].dtype == np.uint8


WHOLE = {"crop_area": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def train(image, seed, **kw):
  transform = preprocessing.made(
      transforms.TrainTransform,
      schema.Data(), task(**{"image_size": 16, **kw}))
  return transform({"image": image, "label": 7}, np.random.default_rng(seed))


def test_train_is_determined_by_its_rng():
  data = encode(Image.fromarray(noise(50, 70)), "JPEG")
  first = [train(data, seed)["image"] for seed in range(20)]
  again = [train(data, seed)["image"] for seed in range(20)]
  np.testing.assert_array_equal(first, again)
  assert len({image.tobytes() for image in first}) == 20
  got = train(data, 0)
  assert got["image"].dtype == np.uint8 and got["image"].shape == (16, 16, 3)
  assert got["image"].flags.c_contiguous
  assert got["label"] == 7 and got["label"].dtype == np.int32


def test_train_flips_always_or_never_or_half_of_the_time():
  image = noise(16, 16)
  for seed in range(50):
    np.testing.assert_array_equal(
        train(image, seed, flip=0.0, **WHOLE)["image"], image)
    np.testing.assert_array_equal(
        train(image, seed, flip=1.0, **WHOLE)["image"], image[:, ::-1])
  n = 400
  flipped = sum(
      (train(image, seed, flip=0.25, **WHOLE)["image"] != image).any()
      for seed in range(n))
  assert abs(flipped / n - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_train_resizes_by_the_named_or_by_either_filter():
  image = noise(40, 40)
  expected = {
      name: Image.fromarray(image).resize((16, 16), how).tobytes()
      for name, how in (("bilinear", BILINEAR), ("bicubic", BICUBIC))}
  for name, data in expected.items():
    got = train(image, 0, flip=0.0, train_interpolation=name, **WHOLE)
    assert got["image"].tobytes() == data
  got = [train(image, seed, flip=0.0, **WHOLE)["image"].tobytes()
         for seed in range(200)]
  assert set(got) == set(expected.values())
  assert abs(got.count(expected["bicubic"]) - 100) < 4 * math.sqrt(50)


def test_train_samples_nothing_outside_its_box():
  """A crop inside a gray square on white is all gray."""
  image = np.full((60, 60, 3), 255, np.uint8)
  area, ratio = (0.2, 0.2), (1.0, 1.0)
  for seed in range(20):
    left, top, right, bottom = transforms.random_resized_crop_box(
        60, 60, area, ratio, np.random.default_rng(seed))
    assert right - left == bottom - top == 27  # sqrt(0.2) * 60 = 26.8
    image[:] = 255
    image[top:bottom, left:right] = 90
    for name in ("bilinear", "bicubic"):
      got = train(image, seed, crop_area=area, crop_ratio=ratio,
                  train_interpolation=name)["image"]
      assert (got == 90).all()


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(16, 24), (24, 16), (5, 40)])
def test_train_and_eval_give_oblong_images(size, kind):
  """In one step each: a crop resized by Pillow; a resize, then the centre."""
  height, width = size
  image, how = noise(60, 81), Image.Resampling[kind.upper()]
  picture = Image.fromarray(image)
  for seed in range(20):
    box = transforms.random_resized_crop_box(
        81, 60, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(seed))
    want = np.asarray(picture.crop(box).resize((width, height), how))
    got = train(image, seed, size=size, flip=float(seed % 2),
                train_interpolation=kind)["image"]
    np.testing.assert_array_equal(got[:, ::-1] if seed % 2 else got, want)
  scaled = math.floor(height / 0.9), math.floor(width / 0.9)
  resized = np.asarray(transforms.resize_shorter(picture, scaled, kind))
  top, left = (round((a - b) / 2) for a, b in zip(resized.shape, size))
  got = evaluate(image, size=size, crop_pct=0.9, interpolation=kind)["image"]
  np.testing.assert_array_equal(
      got, resized[top:top + height, left:left + width])
