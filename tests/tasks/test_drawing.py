"""Label maps as pictures."""

import io

import numpy as np
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
