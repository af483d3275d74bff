"""Folders of drawn pictures: shapes of any colour, size, place and angle.

    python tests/drawings.py FOLDER [PICTURES OF A SHAPE] [SEED]
"""

import math
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")


def draw(shape: str, rng: np.random.Generator,
         size: tuple[int, int] = (48, 40)) -> Image.Image:
  """A shape on a background of another brightness, with noise; RGB."""
  width, height = size
  dark, light = rng.integers(0, 100, 3), rng.integers(156, 256, 3)
  back, front = (dark, light) if rng.random() < 0.5 else (light, dark)
  picture = Image.new("RGB", (4 * width, 4 * height), tuple(map(int, back)))
  radius = 4 * min(size) * rng.uniform(0.28, 0.42)
  centre = (4 * width * rng.uniform(0.42, 0.58),
            4 * height * rng.uniform(0.42, 0.58))
  turn = rng.uniform(-0.3, 0.3)
  pen, colour = ImageDraw.Draw(picture), tuple(map(int, front))

  def polygon(radii):
    angles = turn + 2 * math.pi * np.arange(len(radii)) / len(radii)
    pen.polygon([(centre[0] + r * math.sin(a), centre[1] - r * math.cos(a))
                 for r, a in zip(radii, angles)], fill=colour)

  if shape in ("circle", "ring"):
    box = [c + s * radius for s in (-1, 1) for c in centre]
    if shape == "circle":
      pen.ellipse(box, fill=colour)
    else:
      pen.ellipse(box, outline=colour, width=int(radius / 3))
  elif shape == "cross":
    polygon([radius, radius / 4, radius / 4] * 4)
  else:
    polygon({"triangle": [radius] * 3, "square": [radius] * 4,
             "star": [radius, radius * 0.4] * 5}[shape])
  small = np.asarray(picture.resize(size, Image.Resampling.BOX), np.float32)
  noisy = small + rng.normal(0, 8, small.shape)
  return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def write(root: pathlib.Path, n: int, seed: int = 0,
          shapes: Sequence[str] = SHAPES) -> pathlib.Path:
  """Writes n pictures of each shape, JPEG and PNG, into a folder for each."""
  rng = np.random.default_rng(seed)
  for shape in shapes:
    folder = root / shape
    folder.mkdir(parents=True)
    for i in range(n):
      size = tuple(rng.integers(36, 60, 2).tolist())
      suffix = ("jpg", "png", "JPEG")[i % 3]
      draw(shape, rng, size).save(folder / f"{shape} {i}.{suffix}", quality=90)
  return root


def is_picture(path: pathlib.Path) -> bool:
  """Whether `write` wrote the file."""
  return path.suffix in (".jpg", ".png", ".JPEG") and "\n" not in path.name


if __name__ == "__main__":
  write(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
