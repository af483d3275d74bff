"""Writes roi_align.npz: RoIAlign, mask targets and pasting of mmdetection 2.19.

Needs what make_detection.py needs, which says how to install it:

    python tests/golden/make_roi_align.py

mmcv's RoIAlign is torchvision's, with aligned=True. The cases are made from
seeds (`roi_cases`), so that the file holds results only.
"""

import pathlib
import sys

import numpy as np
import torch
import torchvision

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))
import make_detection  # noqa: E402
import roi_cases as cases  # noqa: E402


def import_mmdet():
  make_detection.import_mmdet()
  from mmdet import core  # noqa: PLC0415 - after what it needs.
  from mmdet.models.roi_heads import mask_heads, roi_extractors  # noqa: PLC0415

  def roi_align_forward(x, rois, output, *argmax, aligned_height,
                        aligned_width, spatial_scale, sampling_ratio, pool_mode,
                        aligned):
    assert pool_mode == 1
    output.copy_(torchvision.ops.roi_align(
        x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio,
        aligned))

  sys.modules["mmcv._ext"].roi_align_forward = roi_align_forward
  return core, mask_heads, roi_extractors


def numbered(boxes):
  boxes = torch.tensor(boxes)
  return torch.cat([torch.zeros(len(boxes), 1), boxes], 1)


def features(roi_extractors, boxes, out):
  extractor = roi_extractors.SingleRoIExtractor(
      {"type": "RoIAlign", "output_size": out, "sampling_ratio": 0}, 1,
      cases.STRIDES)
  maps = [torch.tensor(x).permute(2, 0, 1)[None] for x in cases.maps()]
  rois = numbered(boxes)
  return (extractor(maps, rois)[:, 0].numpy(),
          extractor.map_roi_levels(rois, len(maps)).numpy().astype(np.int8))


def targets(core, soft):
  case = cases.masks()
  config = type("Config", (dict,), {"mask_size": cases.N_CELLS})
  return core.mask_target(
      [torch.tensor(case.boxes)], [torch.tensor(case.index)],
      [core.BitmapMasks(case.bitmaps, *cases.MASKED_SIZE)],
      config(soft_mask_target=soft)).numpy()


def pasted(mask_heads, threshold):
  case = cases.pasted()
  n = len(case.boxes)
  config = type("Config", (), {"mask_thr_binary": threshold})
  found = mask_heads.FCNMaskHead(num_classes=1).get_seg_masks(
      case.probabilities[:, None], torch.tensor(case.boxes),
      torch.zeros(n, dtype=int), config, cases.PASTED_SIZE, np.ones(4), True)
  return np.packbits(np.stack(found[0]))


def main():
  core, mask_heads, roi_extractors = import_mmdet()
  small, levels = features(roi_extractors, cases.boxes(), 7)
  arrays = {
      "7": small, "levels": levels,
      "14": features(roi_extractors, cases.boxes()[::5], 14)[0],
      "coverage": targets(core, True),
      "targets": np.packbits(targets(core, False).astype(bool))}
  for threshold in cases.THRESHOLDS:
    arrays[f"pasted/{threshold}"] = pasted(mask_heads, threshold)
  np.savez_compressed(GOLDEN / "roi_align.npz", **arrays)


if __name__ == "__main__":
  main()
