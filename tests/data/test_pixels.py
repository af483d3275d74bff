"""The pixels of each operation: timm's, and exactly Pillow's.

tests/golden/make_augment.py ran timm.
"""

import pathlib

import augment_cases
import numpy as np
import PIL
import preprocessing
import pytest
from numba.core import caching
from PIL import Image, ImageStat

from metaformer_jax.config import policies, schema, tasks
from metaformer_jax.data.augment import draw, kernels, pixels
from metaformer_jax.data.transforms import classification as transforms

TIMM = np.load(
    pathlib.Path(__file__).parents[1] / "golden" / "augment-timm.npz")
MOVING = {case[0] for case in augment_cases.MOVING}


def difference(got, want):
  got, want = (np.asarray(v).astype(int) for v in (got, want))
  assert got.shape == want.shape
  return np.abs(got - want).max()


# timm.


@pytest.mark.parametrize("kind", augment_cases.FILTERS)
@pytest.mark.parametrize("name", list(augment_cases.encoded_images()))
def test_evaluation_gives_timms_pixels(name, kind):
  task = tasks.Classification(image_size=32, crop_pct=0.9, interpolation=kind)
  data = TIMM[f"file {name}"].tobytes()
  got = preprocessing.made(transforms.EvalTransform, schema.Data(), task)(
      {"image": data, "label": 0})["image"]
  assert difference(got, TIMM[f"eval {name} {kind}"]) <= 1


def test_there_are_twenty_images_to_evaluate():
  assert len(augment_cases.encoded_images()) == 20


@pytest.mark.parametrize(
    "case", list(augment_cases.pixel_cases()), ids=lambda case: case[0])
def test_an_operation_gives_timms_pixels(case):
  key, name, _, value, kind = case
  image = np.array(augment_cases.picture())
  before = image.copy()
  got = pixels.apply(image, draw.Op(name, value, kind),
                     pixels.fill_colour(augment_cases.MEAN))
  assert got.dtype == np.uint8
  assert difference(got, TIMM[f"op {key}"]) <= 1
  np.testing.assert_array_equal(image, before)


# Pillow.

# Including values that no recipe draws.
ARGUMENTS = {
    "posterize": (1, 4, 8), "solarize": (0, 100, 256),
    "solarize_add": (0, 60, 128),
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"),
                    (0.0, 0.1, 0.73, 1.0, 1.9, 5.0)),
    "rotate": (-180, -45, -1e-3, 0, 17.3, 90),
    **dict.fromkeys(("shear_x", "shear_y"), (-1.7, 0, 0.013, 0.3)),
    **dict.fromkeys(("translate_x", "translate_y"), (-0.45, 0, 0.1, 0.5, 1.2)),
    "blur": (0.1, 0.7, 1.9)}


@pytest.mark.parametrize("name", (*policies.RAND_OPS, "blur"))
def test_an_operation_gives_pillows_pixels_exactly(name):
  for case, image in augment_cases.odd_pictures():
    for value in ARGUMENTS.get(name, (0,)):
      for kind in augment_cases.FILTERS if name in MOVING else ("bilinear",):
        want = augment_cases.by_pillow(Image.fromarray(image), name, value,
                                       kind, (7, 0, 255))
        got = pixels.apply(image, draw.Op(name, value, kind), (7, 0, 255))
        np.testing.assert_array_equal(got, np.asarray(want),
                                      f"{case}, {value}, {kind}")


def test_statistics_and_tables_are_pillows():
  tables = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint8)
  for case, image in augment_cases.odd_pictures():
    picture = Image.fromarray(image)
    np.testing.assert_array_equal(
        kernels.histogram(image), np.reshape(picture.histogram(), (3, 256)),
        case)
    assert kernels.mean_gray(image) == (
        ImageStat.Stat(picture.convert("L")).mean[0]), case
    np.testing.assert_array_equal(
        kernels.look_up(image, tables),
        np.asarray(picture.point(tables.ravel().tolist())), case)


SIZES = ((1, 1), (7, 7), (32, 32), (224, 224), (1, 9), (9, 1), (17, 50),
         (50, 17), (33, 32), (128, 40), (20, 300))  # (height, width)


@pytest.mark.parametrize("kind", augment_cases.FILTERS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_resized_crop_has_pillows_pixels_exactly(size, kind):
  rng = np.random.default_rng(0)
  picture = Image.fromarray(rng.integers(0, 256, (400, 400, 3), np.uint8))
  for width, height in (*rng.integers(1, 400, (12, 2)), (1, 1), (400, 1),
                        (1, 400), (16, 17), size, size[::-1], (400, 400)):
    left, top = rng.integers(401 - width), rng.integers(401 - height)
    box = tuple(map(int, (left, top, left + width, top + height)))
    want = picture.crop(box).resize(size[::-1], pixels.FILTERS[kind])
    for flip in (False, True):
      got = pixels.crop_resize(picture, box, size, kind, flip)
      assert got.shape == (*size, 3) and got.flags.c_contiguous
      np.testing.assert_array_equal(
          got[:, ::-1] if flip else got, np.asarray(want), str(box))


@pytest.mark.parametrize("height_first", [False, True])
@pytest.mark.parametrize("kind", augment_cases.FILTERS)
def test_either_direction_can_come_first(kind, height_first):
  """Independent of Pillow's version, which resizes in two steps here."""
  rng = np.random.default_rng(1)
  order_matters = 0
  for _ in range(40):
    height, width, *size = map(int, rng.integers(1, 90, 4))
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    picture, how = Image.fromarray(image), pixels.FILTERS[kind]
    by_width = picture.resize((size[1], height), how).resize(size[::-1], how)
    by_height = picture.resize((width, size[0]), how).resize(size[::-1], how)
    order_matters += by_width != by_height
    values = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32)
    for flip in (False, True):
      got = kernels.resize(values.reshape(height, width), tuple(size),
                           kind == "bicubic", height_first, flip)
      np.testing.assert_array_equal(
          got[:, ::-1] if flip else got,
          np.asarray(by_height if height_first else by_width),
          str((height, width, *size)))
  assert order_matters > 30


@pytest.mark.parametrize("kind", augment_cases.FILTERS)
def test_the_order_of_directions_is_the_installed_pillows(kind):
  """Also at the limit of its rule: heights shrink twice as much as widths."""
  rng = np.random.default_rng(2)
  for height, width, size in (
      (60, 40, (40, 30)), (61, 40, (40, 30)), (59, 40, (40, 30)),
      (60, 40, (60, 80)), (61, 40, (60, 80)), (59, 40, (60, 80)),
      (50, 20, (49, 20)), (50, 21, (49, 20)), (52, 21, (49, 20))):
    picture = Image.fromarray(
        rng.integers(0, 256, (height, width, 3), np.uint8))
    got = pixels.crop_resize(picture, (0, 0, width, height), size, kind, False)
    np.testing.assert_array_equal(
        got, np.asarray(picture.resize(size[::-1], pixels.FILTERS[kind])),
        f"{height}, {width}, {size}, Pillow {PIL.__version__}")


def test_kernels_compile_without_a_cache_folder(monkeypatch):
  """As in a read-only installation without a home directory."""
  monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
  assert kernels.compiled(lambda x: x + 1)(2) == 3
