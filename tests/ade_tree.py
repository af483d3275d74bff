"""A small tree in the form of ADE20K, for tests.

    path = ade_tree.make(folder, n_train=16, n_val=5, seed=0)

gives folder/ADEChallengeData2016 with images/ and annotations/. Pictures are
rectangles of one colour each, drawn from a palette of the classes, so that
something can be learned from them.
"""

import pathlib

import numpy as np
from PIL import Image

# The labels that occur; 0 is what has no class.
LABELS = (0, 1, 2, 3, 17, 150)

# (height, width), of both orientations, odd and even.
SIZES = ((48, 64), (64, 48), (37, 91), (80, 33), (50, 50), (96, 97))


def colours() -> np.ndarray:
  """A colour for each label, uint8 [151, 3]."""
  return np.random.default_rng(1).integers(0, 256, (151, 3), np.uint8)


def draw(rng: np.random.Generator, height: int, width: int):
  """An image, uint8 [H, W, 3], and its label map, uint8 [H, W]."""
  labels = np.full((height, width), rng.choice(LABELS[1:]), np.uint8)
  for _ in range(5):
    top, left = rng.integers(0, height - 4), rng.integers(0, width - 4)
    part = labels[top:top + rng.integers(4, height), left:][
        :, :rng.integers(4, width)]
    part[:] = rng.choice(LABELS)
  noise = rng.normal(0, 6, (height, width, 3))
  image = (colours()[labels] + noise).clip(0, 255).astype(np.uint8)
  return image, labels


def make(folder, n_train: int = 16, n_val: int = 5,
         seed: int = 0) -> pathlib.Path:
  """Writes the tree below a folder; returns its path."""
  root = pathlib.Path(folder) / "ADEChallengeData2016"
  rng = np.random.default_rng(seed)
  for split, name, n in (("training", "train", n_train),
                         ("validation", "val", n_val)):
    for kind in ("images", "annotations"):
      (root / kind / split).mkdir(parents=True)
    for i in range(n):
      image, labels = draw(rng, *SIZES[i % len(SIZES)])
      stem = f"ADE_{name}_{i + 1:08}"
      Image.fromarray(image).save(root / "images" / split / f"{stem}.jpg",
                                  quality=95)
      Image.fromarray(labels).save(
          root / "annotations" / split / f"{stem}.png")
  return root
