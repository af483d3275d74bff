"""RoIAlign against mmdetection's, and its properties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import roi_cases as cases

from metaformer_jax.ops import roi_align

align = jax.jit(roi_align.roi_align, static_argnames=("strides", "out"))


def whole(maps):
  return jnp.array([x.shape[:2] for x in maps], jnp.int32)


def features(boxes, out, maps=None, sizes=None, is_box=None):
  maps = cases.maps() if maps is None else maps
  return np.asarray(align(
      maps, whole(cases.maps()) if sizes is None else sizes,
      strides=cases.STRIDES, boxes=jnp.asarray(boxes), out=out,
      is_box=jnp.ones(len(boxes), bool) if is_box is None else is_box))


@functools.cache
def small():
  """Maps of a canvas of 64 x 96 pixels with 3 channels, and 20 boxes.

  The last three, beyond the canvas, are of the coarser levels.
  """
  rng = np.random.default_rng(0)
  maps = [jnp.array(rng.normal(size=(64 // s, 96 // s, 3)), jnp.float32)
          for s in cases.STRIDES]
  boxes = cases.around(rng, 20, 64, 96, 10, 90)
  boxes[17:] = np.array([[-0.4, -0.5, 1.1, 1.2]]) * [[100], [200], [400]]
  return maps, jnp.array(boxes, jnp.float32)


@pytest.mark.parametrize("out", [
    7, pytest.param(14, marks=pytest.mark.slow)])
def test_500_boxes_as_mmdetection(out):
  boxes = cases.boxes()[::1 if out == 7 else 5]
  np.testing.assert_allclose(features(boxes, out)[..., 0],
                             cases.golden()[str(out)], rtol=0, atol=1e-4)


def test_levels_as_mmdetection():
  found = roi_align.levels(jnp.asarray(cases.boxes()))
  np.testing.assert_array_equal(found, cases.golden()["levels"])
  assert set(found.tolist()) == {0, 1, 2, 3}
  sides = jnp.array([111.9, 112, 223.9, 224, 447.9, 448, 10_000])
  squares = jnp.stack([0 * sides, 0 * sides, sides, sides], 1)
  assert roi_align.levels(squares).tolist() == [0, 1, 1, 2, 2, 3, 3]
  assert roi_align.levels(squares, n_levels=2).tolist() == [0] + 6 * [1]
  assert roi_align.levels(squares, finest=112.0).tolist() == [
      0, 0, 0, 1, 1, 2, 3]


def test_the_padding_of_the_canvas_is_not_seen():
  maps, boxes = small()
  larger = [jnp.pad(x, ((0, 3), (0, 5), (0, 0)), constant_values=1e3)
            for x in maps]
  np.testing.assert_allclose(features(boxes, 7, larger, whole(maps)),
                             features(boxes, 7, maps, whole(maps)), rtol=0,
                             atol=1e-5)


def test_more_boxes_than_a_chunk():
  maps, boxes = small()
  found = features(jnp.resize(boxes, (65, 4)), 7, maps, whole(maps))
  np.testing.assert_allclose(
      found, np.resize(features(boxes, 7, maps, whole(maps)), (65, 7, 7, 3)),
      rtol=0, atol=1e-5)


def test_what_is_no_box_is_zero_whatever_it_is():
  maps, boxes = small()
  expected = features(boxes, 7, maps, whole(maps))
  is_box = jnp.arange(20) % 3 != 0
  boxes = jnp.where(is_box[:, None], boxes, jnp.nan)
  found = features(boxes, 7, maps, whole(maps), is_box)
  np.testing.assert_array_equal(found[is_box], expected[is_box])
  assert not found[~is_box].any()


def test_a_flipped_image_has_flipped_features():
  maps, boxes = small()
  flipped = jnp.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0],
                       boxes[:, 3]], 1)
  np.testing.assert_allclose(
      features(flipped, 7, [x[:, ::-1] for x in maps], whole(maps))[:, :, ::-1],
      features(boxes, 7, maps, whole(maps)), rtol=0, atol=1e-4)


def test_height_and_width_are_alike():
  maps, boxes = small()
  found = features(boxes[:, jnp.array([1, 0, 3, 2])], 7,
                   [x.swapaxes(0, 1) for x in maps], whole(maps)[:, ::-1])
  np.testing.assert_allclose(found.swapaxes(1, 2),
                             features(boxes, 7, maps, whole(maps)), rtol=0,
                             atol=1e-5)


def test_the_gradient_is_that_of_a_linear_function():
  """<gradient for c, x> = <c, features of x>, in float32, for any x."""
  maps, boxes = small()
  is_box = jnp.arange(20) != 5

  def of(maps, boxes):
    return align(maps, whole(small()[0]), strides=cases.STRIDES, boxes=boxes,
                 is_box=is_box, out=7)

  rng = np.random.default_rng(2)
  cotangent = jnp.array(rng.normal(size=(20, 7, 7, 3)), jnp.float32)
  found, pull = jax.vjp(of, maps, boxes)
  gradient, of_boxes = pull(cotangent)
  assert not np.asarray(of_boxes).any()
  for i in range(3):
    other = [jnp.array(rng.normal(size=x.shape), jnp.float32) for x in maps]
    value = of(other, boxes) if i else found
    other = other if i else maps
    np.testing.assert_allclose(
        sum(jnp.vdot(g, x) for g, x in zip(gradient, other)),
        jnp.vdot(cotangent, value), rtol=1e-4, atol=1e-3)
  assert all(np.asarray(g).any() for g in gradient)


def test_the_gradient_is_summed_in_float32():
  """Of 16 equal chunks it is 16 times that of one, but for a few roundings."""
  maps = [jnp.zeros((16, 24, 1), jnp.bfloat16)]
  box = jnp.array([[3.0, 5, 33, 41]])

  def gradient(n):
    return jax.grad(lambda maps: align(
        maps, whole(maps), strides=(4,), boxes=jnp.tile(box, (n, 1)),
        is_box=jnp.ones(n, bool), out=7).astype(jnp.float32).sum())(maps)[0]

  found, expected = gradient(1024), 16 * gradient(64)
  assert found.dtype == jnp.bfloat16
  assert np.asarray(expected != 0).sum() > 80
  assert np.asarray(found == expected).mean() > 0.99


def test_bfloat16_differs_by_its_rounding():
  maps, boxes = small()
  exact = features(boxes, 7, maps, whole(maps))
  found = features(boxes, 7, [x.astype(jnp.bfloat16) for x in maps],
                   whole(maps))
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(found.astype(np.float32), exact, rtol=0,
                             atol=3e-2)


def test_a_batch_is_its_images():
  maps, boxes = small()
  images = [jnp.stack([x, 2 * x + 1]) for x in maps]
  both = jnp.stack([boxes, boxes[::-1]])
  sizes = jnp.stack([whole(maps), jnp.maximum(whole(maps) // 2, 1)])
  found = jax.vmap(
      lambda maps, sizes, boxes: roi_align.roi_align(
          maps, sizes, cases.STRIDES, boxes, jnp.ones(20, bool), 7))(
              images, sizes, both)
  for i in range(2):
    np.testing.assert_allclose(
        found[i], features(both[i], 7, [x[i] for x in images], sizes[i]),
        rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_bins", (7, 5))
def test_whole_bins_have_no_sample_too_many(n_bins):
  """The number of samples is the bin's length, rounded up; not L * (1 / n)."""
  n_samples = np.arange(1, 60)
  lengths = jnp.array(n_samples * n_bins, jnp.float32)
  just_above = jnp.nextafter(lengths, jnp.inf)
  weights = jax.jit(roi_align.bin_weights, static_argnums=(3, 4))
  for length, n in ((lengths, n_samples), (just_above, n_samples + 1)):
    found = weights(jnp.zeros(59), length, 2.0**20, n_bins, 60 * n_bins + 2)
    # By samples, one after the other, in float64.
    expected = np.zeros(found.shape)
    for row, (side, count) in enumerate(zip(np.asarray(length, float), n)):
      position = (np.arange(count * n_bins) + 0.5) * side / (count * n_bins)
      low, part = np.divmod(position, 1)
      of_bin = np.arange(count * n_bins) // count
      np.add.at(expected[row], (of_bin, low.astype(int)), (1 - part) / count)
      np.add.at(expected[row], (of_bin, low.astype(int) + 1), part / count)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
