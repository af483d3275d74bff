"""Draws what a run of the quickstart of segmentation or detection predicts:

    python tests/draw_scenes.py runs/scenes docs/scenes.png
    python tests/draw_scenes.py runs/objects docs/objects.png
    python tests/draw_scenes.py runs/masks docs/masks.png

In columns, the first test scenes; in rows the image, what is on it, and the
prediction: label maps, or the boxes or masks of objects with scores of at
least a half. Each pixel is enlarged three times.
"""

import itertools
import sys

import numpy as np
from PIL import Image

import metaformer_jax
from metaformer_jax.config import tasks
from metaformer_jax.data import sources
from metaformer_jax.data.sources import outlines
from metaformer_jax.tasks import drawing

N_SCENES, ENLARGED, GAP, LEAST_SCORE = 8, 3, 12, 0.5


def enlarged(picture: np.ndarray) -> np.ndarray:
  return picture.repeat(ENLARGED, 0).repeat(ENLARGED, 1)


def label_maps(record, found) -> list[np.ndarray]:
  palette = drawing.palette()
  return [enlarged(palette[labels])
          for labels in (record["label"], found["label_map"])]


def boxes(record, found, names) -> list[np.ndarray]:
  kept = found["scores"] >= LEAST_SCORE
  true = record["boxes"], record["labels"], np.ones(len(record["labels"]))
  predicted = (found[key][kept] for key in ("boxes", "classes", "scores"))
  return [np.asarray(drawing.boxes(enlarged(record["image"]), ENLARGED * place,
                                   labels, scores, names))
          for place, labels, scores in (true, predicted)]


def masks(record, found, names) -> list[np.ndarray]:
  size = record["image"].shape[:2]
  n_kept = (found["scores"] >= LEAST_SCORE).sum()
  true = ([outlines.decode(segment, size) > 0
           for segment in record["segments"]],
          record["boxes"], record["labels"], np.ones(len(record["labels"])))
  predicted = (itertools.islice(found["masks"], n_kept),
               *(found[key][:n_kept] for key in ("boxes", "classes", "scores")))
  return [np.asarray(drawing.masks(
              enlarged(record["image"]), list(map(enlarged, shapes)),
              ENLARGED * place, labels, scores, names))
          for shapes, place, labels, scores in (true, predicted)]


def main(workdir: str, output: str) -> None:
  loaded = metaformer_jax.load(workdir)
  task = loaded.cfg.task
  source = sources.create(loaded.cfg.data, "eval", task=task)
  columns = []
  for i in range(N_SCENES):
    record = source[i]
    found, = loaded.predict(record["image"])
    if isinstance(task, tasks.Detection):
      draw = masks if "masks" in found else boxes
      drawn = draw(record, found, task.class_names)
    else:
      drawn = label_maps(record, found)
    columns.append([enlarged(record["image"]), *drawn])
  side = GAP + max(max(rows[0].shape[:2]) for rows in columns)
  sheet = np.full((3 * side, N_SCENES * side, 3), 255, np.uint8)
  for i, rows in enumerate(columns):
    for j, picture in enumerate(rows):
      height, width, _ = picture.shape
      sheet[j * side:j * side + height, i * side:i * side + width] = picture
  Image.fromarray(sheet).save(output, optimize=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
