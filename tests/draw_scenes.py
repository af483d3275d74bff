"""Draws what a run of the segmentation quickstart predicts:

    python tests/draw_scenes.py runs/scenes docs/scenes.png

In columns, the first test scenes; in rows the image, its label map, and the
prediction. Each pixel is enlarged three times.
"""

import sys

import numpy as np
from PIL import Image

import metaformer_jax
from metaformer_jax.data.sources import scenes
from metaformer_jax.tasks import drawing

N_SCENES, SIDE, ENLARGED = 10, 68, 3


def main(workdir: str, output: str) -> None:
  loaded = metaformer_jax.load(workdir)
  source = scenes.Scenes("test", N_SCENES)
  sheet = np.full((3 * SIDE, N_SCENES * SIDE, 3), 255, np.uint8)
  for i in range(N_SCENES):
    record = source[i]
    found = loaded.predict(record["image"])[0]["label_map"]
    rows = (record["image"], drawing.palette()[record["label"]],
            drawing.palette()[found])
    for j, picture in enumerate(rows):
      height, width, _ = picture.shape
      top, left = j * SIDE, i * SIDE
      sheet[top:top + height, left:left + width] = picture
  Image.fromarray(sheet).resize(
      (ENLARGED * sheet.shape[1], ENLARGED * sheet.shape[0]),
      Image.Resampling.NEAREST).save(output, optimize=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
