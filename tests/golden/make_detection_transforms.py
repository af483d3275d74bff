"""Writes detection_transforms.npz: mmdetection's pixels, boxes and masks.

Needs mmdetection 2.19.0, pycocotools, mmcv 1.7.2 built without its operations
(MMCV_WITH_OPS=0), and opencv-python-headless 4 or 5:

    python tests/golden/make_detection_transforms.py

The pictures and boxes are made from seeds (`detection_transform_cases`,
`coco_tree`), so that the file holds results only.
"""

import builtins
import contextlib
import pathlib
import sys
import tempfile
from unittest import mock

import mmcv
import numpy as np

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))

import coco_tree  # noqa: E402
import detection_transform_cases as cases  # noqa: E402

mmcv.__version__ = "1.4.0"  # The newest that mmdetection 2.19 accepts.
for name in ("bool", "int", "float"):  # NumPy removed these aliases.
  if name not in vars(np):
    setattr(np, name, getattr(builtins, name))
sys.modules.setdefault("mmcv._ext", mock.MagicMock())


def train(pipelines, case):
  """The image, RGB, boxes, masks, and size after the training pipeline."""
  image, boxes = cases.picture(case)
  masks = pipelines.LoadAnnotations(with_mask=True)._load_masks({
      "img_info": {"height": case.height, "width": case.width},
      "ann_info": {"masks": cases.outlines(case)}, "mask_fields": []})
  loaded = {"img": np.ascontiguousarray(image[..., ::-1]),
            "img_shape": image.shape, "img_fields": ["img"],
            "gt_bboxes": boxes, "bbox_fields": ["gt_bboxes"], **masks}
  with mock.patch.object(np.random, "choice", lambda names, p: (
      "horizontal" if case.flip else None)):
    for step in (pipelines.Resize(img_scale=cases.SCALE, keep_ratio=True),
                 pipelines.RandomFlip(flip_ratio=0.5),
                 pipelines.Pad(size_divisor=32)):
      loaded = step(loaded)
  height, width = loaded["img_shape"][:2]
  return (loaded["img"][..., ::-1], loaded["gt_bboxes"], (height, width),
          np.packbits(loaded["gt_masks"].masks[:, :height, :width]))


def records(datasets, arrays):
  """Adds what training has of each image of the tree, and which images."""
  with tempfile.TemporaryDirectory() as folder:
    root = coco_tree.make(folder)
    for split in coco_tree.SPLITS:
      data = datasets.CocoDataset(
          str(root / f"annotations/instances_{split}.json"), [],
          classes=coco_tree.CLASS_NAMES, test_mode=True)
      # In the order of the numbers, as in COCO's own file.
      data.cat2label = {i: label for label, i in
                        enumerate(coco_tree.CATEGORY_IDS)}
      names = [info["filename"] for info in data.data_infos]
      arrays[f"{split}/names"] = np.array(names)
      for empty in (True, False):
        data.filter_empty_gt = empty
        data.img_ids = data.coco.get_img_ids()
        arrays[f"{split}/images/{empty}"] = np.array(data._filter_imgs())
      data.img_ids = data.coco.get_img_ids()
      for i in range(len(names)):
        found = data.get_ann_info(i)
        arrays[f"{split}/{i}/boxes"] = found["bboxes"]
        arrays[f"{split}/{i}/labels"] = found["labels"]


def main():
  with contextlib.redirect_stdout(sys.stderr):
    from mmdet import datasets  # noqa: PLC0415
    from mmdet.datasets import pipelines  # noqa: PLC0415
  arrays = {}
  for name, case in cases.CASES.items():
    for key, value in zip(("image", "boxes", "size", "masks"),
                          train(pipelines, case)):
      arrays[f"{name}/{key}"] = value
  records(datasets, arrays)
  np.savez_compressed(GOLDEN / "detection_transforms.npz", **arrays)


if __name__ == "__main__":
  main()
