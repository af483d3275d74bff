"""Targets of masks against mmdetection's, and crops against whole bitmaps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import roi_cases as cases

from metaformer_jax.ops import masks

coverage = jax.jit(masks.coverage, static_argnames="out")
targets = jax.jit(masks.targets, static_argnames="out")
SIZE = jnp.array(cases.MASKED_SIZE)


def crops(side, offset=(0, 0)):
  """Exact crops of the cases' bitmaps, and their frames."""
  cropped, frames = [], []
  for bitmap in cases.masks().bitmaps:
    y, x = (int(i.min()) - d for i, d in zip(np.nonzero(bitmap), offset))
    padded = np.pad(bitmap, side)  # A frame may reach beyond the image.
    cropped.append(padded[y + side:y + 2 * side, x + side:x + 2 * side])
    frames.append((x, y, x + side, y + side))
  return jnp.array(np.stack(cropped)), jnp.array(frames, jnp.float32)


def of_cases(function, frames, **changes):
  case = cases.masks()
  return np.asarray(function(*frames, jnp.asarray(case.index),
                             jnp.asarray(case.boxes), SIZE, **changes))


@pytest.mark.parametrize("offset", ((0, 0), (5, 3)))
def test_exact_crops_as_mmdetection(offset):
  frames = crops(48, offset)
  found = of_cases(coverage, frames)
  np.testing.assert_allclose(found, cases.golden()["coverage"], rtol=0,
                             atol=1e-5)
  expected = np.unpackbits(cases.golden()["targets"]).reshape(found.shape)
  binary = of_cases(targets, frames)
  assert set(np.unique(binary)) == {0, 1}
  # Some are exactly one half, but for rounding.
  sure = abs(found - 0.5) > 1e-5
  assert sure.mean() > 0.999
  np.testing.assert_array_equal(binary[sure], expected[sure])


def test_larger_crops_are_close():
  """Of masks of 96 x 128 pixels, magnified and given in 48 x 48 cells."""
  cropped, frames = crops(48)
  case = cases.masks()
  enlarged = jnp.asarray(np.kron(case.bitmaps, np.ones((4, 4), np.uint8)))
  size = 4 * SIZE
  whole = jnp.tile(jnp.array([0.0, 0, 512, 512]), (12, 1))
  square = jnp.pad(enlarged, ((0, 0), (0, 512 - enlarged.shape[1]), (0, 0)))
  arguments = jnp.asarray(case.index), jnp.asarray(4 * case.boxes), size
  expected = targets(square, whole, *arguments)
  found = targets(cropped, 4 * frames, *arguments)
  solid = case.index % 3 != 1  # Not the noise.
  assert np.asarray(found != expected)[solid].mean() < 0.01
  assert np.asarray(found)[solid].any()


def test_what_has_no_area_is_empty():
  cropped, frames = crops(48)
  case = cases.masks()
  none = coverage(cropped, 0 * frames, jnp.asarray(case.index),
                  jnp.asarray(case.boxes), SIZE)
  assert not np.asarray(none).any()
  points = jnp.tile(jnp.array([[20.0, 20, 20, 20]]), (60, 1))
  found = coverage(cropped, frames, jnp.asarray(case.index), points, SIZE)
  assert not np.asarray(found).any()


def test_boxes_are_clipped_to_the_image():
  frames = crops(48)
  case = cases.masks()
  height, width = cases.MASKED_SIZE
  moved = case.boxes + np.array([-30, -30, 60, 60], np.float32)
  clipped = np.clip(moved, 0, (width, height) * 2)
  found, expected = (
      coverage(*frames, jnp.asarray(case.index), jnp.asarray(boxes), SIZE)
      for boxes in (moved, clipped))
  np.testing.assert_array_equal(found, expected)


def test_a_box_of_its_mask_has_its_pixels():
  bitmap = jnp.array(np.random.default_rng(0).integers(0, 2, (1, 28, 28)),
                     jnp.uint8)
  frame = jnp.array([[10.0, 20, 38, 48]])
  found = targets(bitmap, frame, jnp.zeros(1, int), frame,
                  jnp.array([64, 64]))
  np.testing.assert_array_equal(found, bitmap)
