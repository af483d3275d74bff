"""Label maps and boxes as pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from metaformer_jax.tasks import drawing

# The first colours of Pascal VOC's development kit.
VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128),
       (128, 0, 128), (0, 128, 128), (128, 128, 128), (64, 0, 0), (192, 0, 0)]


def test_palette():
  colours = drawing.palette()
  assert [tuple(c) for c in colours[:10].tolist()] == VOC
  assert tuple(colours[255]) == (224, 224, 192)
  assert len({*map(tuple, drawing.colours_of(np.arange(256)))}) == 256
  assert drawing.colours_of(np.arange(256)).any(-1).all()


def test_labels_survive_a_file():
  label_map = np.random.default_rng(0).integers(0, 256, (7, 11), np.uint8)
  file = io.BytesIO()
  drawing.labels(label_map).save(file, "PNG")
  picture = Image.open(file)
  np.testing.assert_array_equal(np.asarray(picture), label_map)
  np.testing.assert_array_equal(np.asarray(picture.convert("RGB")),
                                drawing.colours_of(label_map))


def test_overlay_mixes_colours_and_lists_names():
  image = np.full((60, 40, 3), 100, np.uint8)
  label_map = np.zeros((60, 40), np.uint8)
  label_map[:10] = 3
  picture = np.asarray(drawing.overlay(image, label_map, list("abcd")), float)
  assert picture.shape[0] >= 60 and picture.shape[1] > 40
  for rows, label in ((np.s_[:10], 3), (np.s_[10:60], 0)):
    expected = 45 + 0.55 * drawing.colours_of(label).astype(float)
    assert np.abs(picture[rows, :40] - expected).max() <= 0.5
  legend = picture[:, 40:].reshape(-1, 3)
  found = [(legend == drawing.colours_of(i)).all(-1).any() for i in range(4)]
  assert found == [True, False, False, True]


def test_many_classes():
  label_map = np.arange(256, dtype=np.uint8).reshape(16, 16)
  image = np.zeros((16, 16, 3), np.uint8)
  picture = drawing.overlay(image, label_map, [f"name {i}" for i in range(256)])
  assert picture.height < 600


def drawn(boxes, labels=None, scores=None, names=("cat",) * 400,
          size=(240, 320)):
  """Boxes on mid gray, as an array."""
  n = len(boxes)
  image = np.full((*size, 3), 120, np.uint8)
  picture = drawing.boxes(
      image, np.reshape(boxes, (n, 4)).astype(np.float32),
      np.zeros(n, int) if labels is None else np.array(labels),
      np.full(n, 0.5, np.float32) if scores is None else np.array(scores),
      names)
  assert (image == 120).all()
  return np.array(picture)


def label_of(label=0, name="cat", score=0.5, size=(240, 320)):
  """The label of a box alone, above it."""
  names = [name] * (label + 1)
  y, x = size[0] // 2, size[1] // 4
  picture = drawn([[x, y, x + 20, y + 20]], [label], [score], names, size)
  rows, columns = np.nonzero((picture[:y] != 120).any(-1))
  return picture[rows.min():y, columns.min():columns.max() + 1]


def places(part, picture):
  """How often a part occurs in a picture, with all its pixels."""
  windows = np.lib.stride_tricks.sliding_window_view(
      picture, part.shape)[:, :, 0]
  candidates = (windows[..., 0, 0, :] == part[0, 0]).all(-1)
  return sum((windows[y, x] == part).all()
             for y, x in zip(*np.nonzero(candidates)))


def contrast(a, b):
  """Of two colours, by WCAG 2.1."""

  def luminance(colour):
    x = np.asarray(colour) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return linear @ (0.2126, 0.7152, 0.0722)

  low, high = sorted((luminance(a), luminance(b)))
  return (high + 0.05) / (low + 0.05)


def test_a_box_has_its_edges_in_the_colour_of_its_class():
  picture = drawn([[100.4, 80.2, 199.6, 160]], [7])
  colour = drawing.colours_of(7)
  for edge in (np.s_[80:160, 100], np.s_[80:160, 199], np.s_[80, 100:200],
               np.s_[159, 100:200]):
    assert (picture[edge] == colour).all()
  assert (picture[90:150, 110:190] == 120).all()
  picture[:160, 100:200] = 120
  assert (picture == 120).all()


def test_an_edge_is_seen_on_any_background():
  image = np.tile(drawing.colours_of(np.arange(64))[:, None, None],
                  (1, 40, 40, 1))
  for label in range(64):
    picture = drawing.boxes(image[label], np.array([[5, 5, 35, 35]]),
                            np.array([label]), np.ones(1), "x" * 64)
    assert contrast(*np.asarray(picture)[34:32:-1, 20]) > 4.5


@pytest.mark.parametrize("box", [
    (0, 0, 30, 30), (290, 0, 320, 30), (0, 210, 30, 240), (290, 210, 320, 240),
    (0, 0, 320, 240), (300, 100, 302, 101), (-50, -50, 400, 300),
    (330, 250, 340, 260), (319.9, 239.9, 320, 240)])
def test_a_label_is_inside_the_image(box):
  assert places(label_of(), drawn([box])) == 1


def test_text_is_legible_on_every_colour():
  for label in range(80):
    part = label_of(label)
    text = max(np.unique(part.reshape(-1, 3), axis=0).tolist(),
               key=lambda x: contrast(x, drawing.colours_of(label)))
    assert contrast(text, drawing.colours_of(label)) > 4.5
    assert (part == drawing.colours_of(label)).all(-1).mean() > 0.4


def test_better_boxes_are_on_top():
  box = [100, 80, 200, 160]
  for scores in ([0.9, 0.3], [0.3, 0.9]):
    picture = drawn([box, box], [1, 2], scores)
    best = int(np.argmax(scores))
    assert (picture[100:160, 100] == drawing.colours_of(best + 1)).all()
    for label, score in zip((1, 2), scores):  # Neither covers the other.
      assert places(label_of(label, score=score), picture) == 1


def test_hundreds_of_boxes():
  """Labels cover neither most of the image nor the best one."""
  corners = np.random.default_rng(0).uniform(0, 200, (300, 2))
  scores = np.append(0.99, np.linspace(0.9, 0.1, 299))
  picture = drawn(np.concatenate([corners, corners + 1], 1), scores=scores)
  assert 0.15 < (picture != 120).any(-1).mean() < 0.25
  assert places(label_of(score=0.99), picture) == 1


def test_text_grows_with_the_image():
  height = label_of(size=(960, 1280)).shape[0]
  assert height == pytest.approx(2 * label_of(size=(480, 640)).shape[0], rel=.1)


def test_odd_names_and_sizes():
  # A long name is cut off, but not the score.
  picture = drawn([[50, 100, 90, 120]], names=["a name " * 20])
  score = label_of(name="", size=(240, 320))[:, 6:]
  assert places(score, picture) == 1
  part = label_of(name="a b")
  assert places(part, drawn([[50, 100, 90, 120]], names=["a\nb"])) == 1
  assert places(label_of(300), drawn([[50, 100, 90, 120]], [300])) == 1
  # Too small for text: the outline only.
  colours = drawn([[0, 0, 9, 5]], size=(5, 9)).reshape(-1, 3)
  assert {tuple(c) for c in colours.tolist()} <= {
      (120,) * 3, (255,) * 3, tuple(drawing.colours_of(0).tolist())}
  assert (drawn([[0, 0, 1, 1]], size=(1, 1)) == drawing.colours_of(0)).all()
  assert (drawn([]) == 120).all()


# Masks.


def masked(masks, boxes, labels=None, scores=None, names=("cat",) * 400):
  """Masks on mid gray, as an array."""
  masks = np.array(masks, bool)
  image, n = np.full((*masks.shape[1:], 3), 120, np.uint8), len(masks)
  picture = drawing.masks(
      image, masks, np.reshape(boxes, (n, 4)).astype(np.float32),
      np.zeros(n, int) if labels is None else np.array(labels),
      np.full(n, 0.5, np.float32) if scores is None else np.array(scores),
      names)
  assert (image == 120).all()
  return np.array(picture)


def square(top, left, bottom, right, size=(240, 320)):
  mask = np.zeros(size, bool)
  mask[top:bottom, left:right] = True
  return mask


def test_a_mask_is_translucent_with_an_edge_and_the_label_of_its_box():
  mask = square(80, 100, 160, 200)
  mask[120:, 150:] = False
  picture = masked([mask], [[100, 80, 200, 160]], [7])
  colour = drawing.colours_of(7).astype(int)
  for edge in (np.s_[80:160, 100], np.s_[80, 100:200], np.s_[159, 100:150],
               np.s_[80:120, 199], np.s_[119, 150:200], np.s_[120:160, 149]):
    assert (picture[edge] == colour).all()
  for y, x in ((100, 150), (150, 120), (90, 190)):
    assert np.abs(picture[y, x] - (0.6 * 120 + 0.4 * colour)).max() <= 0.5
  assert places(label_of(7), picture) == 1
  picture[mask] = picture[:80] = 120
  assert (picture == 120).all()


def test_better_masks_are_on_top():
  mask = square(80, 100, 160, 200)
  for scores in ([0.9, 0.3], [0.3, 0.9]):
    picture = masked([mask, mask], [[100, 80, 200, 160]] * 2, [1, 2], scores)
    best = int(np.argmax(scores))
    assert (picture[100:160, 100] == drawing.colours_of(best + 1)).all()


@pytest.mark.parametrize("part", [
    (0, 0, 240, 320), (0, 0, 1, 1), (239, 319, 240, 320), (100, 50, 101, 300),
    (5, 5, 5, 5)])
def test_masks_of_any_part_of_the_image(part):
  mask = square(*part)
  top, left, bottom, right = part
  picture = masked([mask], [[left, top, right, bottom]])
  assert (picture[mask] != 120).any(-1).all()
  n_label = np.prod(label_of().shape[:2])
  assert ((picture != 120).any(-1) & ~mask).sum() <= n_label


def test_without_masks_the_image_stays():
  assert (masked(np.zeros((0, 24, 30)), []) == 120).all()
