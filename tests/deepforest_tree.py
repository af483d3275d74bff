"""Writes the labelled aerial photographs of a package as a COCO tree:

    pip download --no-deps deepforest
    python -m zipfile -e deepforest-*.whl deepforest
    python tests/deepforest_tree.py deepforest trees
    python -m metaformer_jax.main --config=... --config.data.source=coco \
        --config.data.path=trees

The four photographs with trees in boxes are cut into tiles, of which every
fourth is for evaluation. Nothing of the package is kept in this repository.
"""

import argparse
import json
import pathlib
from xml.etree import ElementTree

import numpy as np
from PIL import Image

# A box belongs to a tile that has at least this part of it.
_INSIDE = 0.5


def read(path: pathlib.Path):
  """A photograph, uint8 [H, W, 3], and its boxes, [n, 4], of Pascal VOC."""
  tree = ElementTree.parse(path).getroot()
  image = path.with_name(tree.findtext("filename"))
  boxes = [[float(box.findtext(key)) for key in ("xmin", "ymin", "xmax",
                                                 "ymax")]
           for box in tree.iter("bndbox")]
  return np.asarray(Image.open(image).convert("RGB")), np.array(boxes)


def tiles(image: np.ndarray, boxes: np.ndarray, side: int):
  """Yields tiles, [h, w, 3], and the boxes in them, clipped, [m, 4]."""
  height, width, _ = image.shape
  area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
  for top in range(0, height - side // 2, side):
    for left in range(0, width - side // 2, side):
      tile = image[top:top + side, left:left + side]
      limits = [tile.shape[1], tile.shape[0]] * 2
      clipped = (boxes - [left, top, left, top]).clip(0, limits)
      inside = (clipped[:, 2:] - clipped[:, :2]).prod(1)
      yield tile, clipped[(inside > 0) & (inside >= _INSIDE * area)]


def make(wheel, output, side: int = 400) -> pathlib.Path:
  """Writes the tree of an unpacked wheel; returns its path.

  Args:
    wheel: the folder with deepforest/data.
    output: a new folder.
    side: of the tiles, in pixels; those at the border can be smaller.
  """
  root = pathlib.Path(output)
  content = {split: {"images": [], "annotations": [], "categories": [
      {"id": 1, "name": "tree"}]} for split in ("train", "val")}
  for split in content:
    (root / split).mkdir(parents=True)
  (root / "annotations").mkdir()
  number, n_boxes = 0, 0
  for path in sorted((pathlib.Path(wheel) / "deepforest/data").glob("*.xml")):
    for tile, boxes in tiles(*read(path), side):
      split = "val" if number % 4 == 3 else "train"
      number += 1
      name = f"{path.stem}_{number}.png"
      Image.fromarray(tile).save(root / split / name)
      content[split]["images"].append({
          "id": number, "file_name": name, "height": tile.shape[0],
          "width": tile.shape[1]})
      for left, top, right, bottom in boxes.tolist():
        n_boxes += 1
        content[split]["annotations"].append({
            "id": n_boxes, "image_id": number, "category_id": 1, "iscrowd": 0,
            "bbox": [left, top, right - left, bottom - top],
            "area": (right - left) * (bottom - top)})
  for split, tree in content.items():
    (root / f"annotations/instances_{split}.json").write_text(json.dumps(tree))
  return root


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("wheel", help="folder of the unpacked wheel")
  parser.add_argument("output", help="a new folder")
  parser.add_argument("--side", type=int, default=400, help="of tiles, pixels")
  args = parser.parse_args()
  make(args.wheel, args.output, args.side)
