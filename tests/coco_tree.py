"""A small tree in the form of COCO, for tests.

    path = coco_tree.make(folder, n_train=12, n_val=7, seed=0)

gives folder/coco with annotations/instances_train2017.json, train2017/ and the
same for val2017. Pictures are noise with shapes of one colour per class, so
that something can be learned from them. Of each split, image

    1 has no annotations,                      4 has a crowd besides objects,
    2 has MANY objects,                        5 has a crowd only,
    3 has objects that training leaves out,    6 is narrower than 32 pixels.
"""

import json
import pathlib

import numpy as np
from PIL import Image, ImageDraw

# (number in the file, name), neither contiguous nor in the order of the names
# or the numbers. Classes are numbered by their numbers in the file.
CATEGORIES = ((17, "disc"), (90, "box"), (1, "wedge"))
CLASS_NAMES = ("wedge", "disc", "box")
CATEGORY_IDS = (1, 17, 90)

COLOURS = ((230, 60, 60), (60, 220, 80), (70, 90, 240))

# (height, width), of both orientations, odd and even; the seventh is small.
SIZES = ((96, 128), (128, 96), (97, 131), (120, 77), (100, 100), (90, 140),
         (24, 40))
MANY = 12

SPLITS = ("train2017", "val2017")


def outline(label: int, box) -> list[float]:
  """The polygon of a class's shape in a box (left, top, right, bottom)."""
  left, top, right, bottom = box
  if CLASS_NAMES[label] == "wedge":
    points = [(left, bottom), ((left + right) / 2, top), (right, bottom)]
  elif CLASS_NAMES[label] == "box":
    points = [(left, top), (right, top), (right, bottom), (left, bottom)]
  else:
    turns = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    points = list(zip((left + right + (right - left) * np.cos(turns)) / 2,
                      (top + bottom + (bottom - top) * np.sin(turns)) / 2))
  return [round(float(value), 2) for point in points for value in point]


def area(polygon) -> float:
  x, y = np.array(polygon).reshape(-1, 2).T
  return round(abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2, 4)


def draw(rng: np.random.Generator, height: int, width: int, n: int,
         largest: int):
  """A picture and its objects: uint8 [H, W, 3], [(label, polygon), ...].

  Objects do not cover each other; one without a place is left out.
  """
  picture = Image.fromarray(rng.integers(0, 70, (height, width, 3), np.uint8))
  pen, taken, found = ImageDraw.Draw(picture), np.zeros((height, width)), []
  for _ in range(n):
    for _ in range(50):
      w, h = (int(side) for side in rng.integers(largest // 2, largest + 1, 2))
      x, y = (int(rng.integers(0, side - own)) for side, own in
              ((width, w), (height, h)))
      if not taken[y:y + h + 1, x:x + w + 1].any():
        break
    else:
      continue
    taken[y:y + h + 1, x:x + w + 1] = 1
    label = int(rng.integers(len(CLASS_NAMES)))
    polygon = outline(label, (x, y, x + w, y + h))
    pen.polygon(polygon, fill=COLOURS[label])
    found.append((label, polygon))
  return np.asarray(picture), found


def annotation(label: int, box, **more) -> dict:
  """One of a box [left, top, width, height], as a rectangle."""
  left, top, width, height = box
  polygon = [left, top, left + width, top, left + width, top + height, left,
             top + height]
  return {"category_id": CATEGORY_IDS[label], "bbox": list(box), "iscrowd": 0,
          "area": width * height, "segmentation": [polygon], **more}


def crowd(label: int, box, size) -> dict:
  """A crowd in a box of whole pixels: an RLE, column by column, from 0 on."""
  left, top, width, height = box
  mask = np.zeros(size, np.uint8)
  mask[top:top + height, left:left + width] = 1
  values = mask.ravel("F")
  edges = np.flatnonzero(np.diff(values)) + 1
  counts = np.diff([0, *edges, values.size]).tolist()
  if values[0]:
    counts = [0, *counts]
  return annotation(label, box, iscrowd=1, segmentation={
      "size": list(size), "counts": counts})


def _objects(rng: np.random.Generator, i: int, size):
  """A picture and its annotations, without their numbers."""
  height, width = size
  kind = i % len(SIZES)
  n, largest = {1: (0, 40), 2: (MANY, 20), 5: (0, 40), 6: (1, 16)}.get(
      kind, (int(rng.integers(1, 4)), 40))
  picture, found = draw(rng, height, width, n, largest)
  annotations = []
  for label, polygon in found:
    x, y = polygon[::2], polygon[1::2]
    annotations.append({
        "category_id": CATEGORY_IDS[label], "iscrowd": 0,
        "segmentation": [polygon], "area": area(polygon),
        "bbox": [min(x), min(y), round(max(x) - min(x), 2),
                 round(max(y) - min(y), 2)]})
  if kind == 3:
    annotations[:0] = [
        annotation(0, [width + 2, 5, 10, 10]), annotation(1, [3, 4, 0.6, 9]),
        annotation(2, [8, 9, 5, 5], area=0), annotation(0, [8, 9, 20, 20],
                                                        ignore=1)]
    annotations += [annotation(1, [5, 6, 1, 1]),
                    annotation(2, [width - 12.5, -3, 20, 15.5])]
  if kind in (4, 5):
    annotations.insert(0, crowd(i % 3, (10, 20, 60, 30), size))
  return picture, annotations


def make(folder, n_train: int = 12, n_val: int = 7,
         seed: int = 0) -> pathlib.Path:
  """Writes the tree below a folder; returns its path."""
  root = pathlib.Path(folder) / "coco"
  (root / "annotations").mkdir(parents=True)
  rng = np.random.default_rng(seed)
  for split, n in zip(SPLITS, (n_train, n_val)):
    (root / split).mkdir()
    images, annotations = [], []
    for i in range(n):
      size = SIZES[i % len(SIZES)]
      picture, found = _objects(rng, i, size)
      # Not in the order of the images.
      number = 1000 * (split == "val2017") + 7 * (n - i)
      name = f"{number:012}.jpg"
      Image.fromarray(picture).save(root / split / name, quality=95)
      images.append({"id": number, "file_name": name, "height": size[0],
                     "width": size[1], "license": 3})
      annotations += [{**a, "image_id": number} for a in found]
    # Those of an image are not together.
    annotations = annotations[::2] + annotations[1::2]
    tree = {
        "info": {"description": "shapes"}, "licenses": [],
        "categories": [{"id": i, "name": name, "supercategory": "shape"}
                       for i, name in CATEGORIES],
        "images": images,
        "annotations": [{**a, "id": 100 + 3 * i}
                        for i, a in enumerate(annotations)]}
    (root / "annotations" / f"instances_{split}.json").write_text(
        json.dumps(tree))
  return root
