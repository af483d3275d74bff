"""Operations on the device against the host's, which are Pillow's."""

import functools

import augment_cases
import jax
import numpy as np
import pytest

from metaformer_jax.config import policies
from metaformer_jax.data.augment import draw, pixels
from metaformer_jax.ops import augment

FILL = pixels.fill_colour(augment_cases.MEAN)
PICTURE = np.asarray(augment_cases.picture())
NOISE = np.random.default_rng(0).integers(0, 256, PICTURE.shape, np.uint8)

# With the same values on any device; coordinates, quotients and radii are
# rounded elsewhere than on the host.
EXACT = {"equalize", "invert", "posterize", "solarize", "solarize_add"}


@functools.cache
def compiled():
  return jax.jit(functools.partial(augment.apply, fill=FILL))


def differences(image, name, value, kind):
  """How far each value is from the host's, with the same argument."""
  value = np.float32(value)
  got = compiled()(image, augment.NAMES.index(name), value, kind == "bicubic")
  want = pixels.apply(image, draw.Op(name, float(value), kind), FILL)
  return np.abs(np.asarray(got).astype(int) - want)


def test_it_has_all_operations_of_the_policies():
  assert augment.NAMES[0] == "none"
  assert {*augment.NAMES[1:]} == {*policies.RAND_OPS, "blur"}


@pytest.mark.parametrize("name", augment.NAMES[1:])
def test_operations_are_the_hosts(name):
  cases = [case for case in augment_cases.pixel_cases() if case[1] == name]
  assert cases
  for key, _, _, value, kind in cases:
    limit = 0 if name in EXACT else 1
    assert differences(PICTURE, name, value, kind).max() <= limit, key
    found = differences(NOISE, name, value, kind)
    # By a part of a pixel like 0.6, whole values are met, and cut either way.
    few = 0.15 if name.startswith(("shear", "translate")) else 0.005
    assert found.max() <= limit and (found > 0).mean() < few, key


@pytest.mark.slow
def test_odd_sizes_and_contents():
  for what, image in augment_cases.odd_pictures():
    for key, name, _, value, kind in augment_cases.pixel_cases():
      assert differences(image, name, value, kind).max() <= 1, (what, key)


@pytest.mark.slow
def test_arguments_beyond_the_usual():
  """Of magnitudes above 10: everything moves outside of the image."""
  for name, value in (("shear_x", 0.9), ("shear_y", -0.9), ("rotate", 90.0),
                      ("translate_x", 1.35), ("translate_y", -1.35)):
    assert differences(NOISE, name, value, "bicubic").max() <= 1, name


def test_none_changes_nothing():
  got = compiled()(PICTURE, 0, np.float32(0), False)
  np.testing.assert_array_equal(got, PICTURE)


@pytest.mark.parametrize("bicubic", [False, True])
def test_both_ways_to_turn_are_one_function(bicubic):
  """On a TPU and elsewhere; some tiles go beyond the image."""
  rng = np.random.default_rng(0)
  ways = [jax.jit(f) for f in (augment.turned_by_gathers,
                               augment.turned_by_products)]
  height, width = 70, 101
  image = rng.integers(0, 256, (3, height, width), np.int32)
  image[:, :20] = 255  # A flat part, in which a rounding would show.
  for angle in np.radians((0.0, 7.3, -30, 45, 133)):
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = width / 2, height / 2
    matrix = np.array([cos, sin, x - x * cos - y * sin,
                       -sin, cos, y + x * sin - y * cos], np.float32)
    one, other = (np.asarray(f(image, tuple(matrix), bicubic)) for f in ways)
    a, b, c, d, e, f = matrix
    x, y = np.arange(width)[None] + 0.5, np.arange(height)[:, None] + 0.5
    column, row = a * x + b * y + c, d * x + e * y + f
    inside = (column > 0) & (column < width) & (row > 0) & (row < height)
    found = np.abs(one - other)[:, inside]
    assert found.max() <= 1 and (found > 0).mean() < 0.005


def test_a_large_image_has_the_right_mean():
  """Contrast sums the gray values of an image in 32 bits."""
  n = augment.MAX_SIDE**2
  assert n * 255 + n // 2 < 2**32
