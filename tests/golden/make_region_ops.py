"""Writes region_ops.npz: operations of mmdetection 2.19's R-CNN.

Needs what make_detection_ops.py does:

    python tests/golden/make_region_ops.py

All anchors and proposals are sampled, so that nothing depends on chance.
"""

import pathlib
import sys

import numpy as np
import torch

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))

import detection_cases  # noqa: E402
import make_detection_ops  # noqa: E402
import mmcv  # noqa: E402
import region_cases as cases  # noqa: E402
from mmdet import core  # noqa: E402
from mmdet.models import builder  # noqa: E402

NAMES = {"positive": "pos_iou_thr", "negative": "neg_iou_thr",
         "min_positive": "min_pos_iou", "low_quality": "match_low_quality"}


def assigner(name):
  return {"type": "MaxIoUAssigner", "ignore_iof_thr": -1,
          **{NAMES[k]: v for k, v in cases.MATCHING[name].items()}}


def assigned(name, case):
  """As make_detection_ops.assigned."""
  found = np.full(detection_cases.N_ANCHORS, -2, np.int8)
  if case.is_anchor.any():
    result = core.build_assigner(assigner(name)).assign(
        torch.tensor(case.anchors[case.is_anchor]),
        torch.tensor(case.boxes[case.is_box]))
    which = np.array([-1, *np.flatnonzero(case.is_box), -2])
    found[case.is_anchor] = which[result.gt_inds.numpy()]
  return found


def rpn():
  return builder.build_head(mmcv.ConfigDict({
      "type": "RPNHead", "in_channels": 8,
      "anchor_generator": {
          "type": "AnchorGenerator", "scales": [8], "ratios": [0.5, 1.0, 2.0],
          "strides": list(cases.STRIDES)},
      "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
      "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
      "loss_bbox": {"type": "L1Loss"},
      "train_cfg": {
          "assigner": assigner("proposals"),
          "sampler": {"type": "RandomSampler", "num": 10**4,
                      "pos_fraction": 0.5, "add_gt_as_proposals": False},
          "allowed_border": -1, "pos_weight": -1, "debug": False},
      "test_cfg": {
          "nms_pre": cases.CANDIDATES, "max_per_img": cases.N_PROPOSALS,
          "nms": {"type": "nms", "iou_threshold": cases.PROPOSAL_IOU},
          "min_bbox_size": 0}}))


def as_maps(levels, n):
  """[2, h w A, n] -> [2, A n, h, w], with gradients."""
  return [torch.tensor(x).reshape(2, *shape, 3 * n).permute(0, 3, 1, 2)
          .contiguous().requires_grad_()
          for x, shape in zip(levels, cases.SHAPES)]


def proposals(batch):
  """Losses of the first stage, gradients, proposals of the first image."""
  logits, deltas = as_maps(batch.logits, 1), as_maps(batch.deltas, 4)
  head = rpn()
  metas = [{"img_shape": (*map(int, size), 3), "scale_factor": np.ones(4),
            "pad_shape": (*detection_cases.padded(size), 3)}
           for size in batch.sizes]
  losses = head.loss(logits, deltas, [
      torch.tensor(b[x >= 0]) for b, x in zip(batch.boxes, batch.labels)],
                     metas)
  losses = [sum(losses[key]) for key in ("loss_rpn_cls", "loss_rpn_bbox")]
  sum(losses).backward()
  yield "losses", np.array([x.item() for x in losses], np.float32)
  yield "logits", make_detection_ops.as_levels(
      [x.grad for x in logits], 1)[..., 0]
  yield "deltas", make_detection_ops.as_levels([x.grad for x in deltas], 4)
  with torch.no_grad():
    yield "proposals", head.get_bboxes(
        [x[:1] for x in logits], [x[:1] for x in deltas],
        img_metas=metas[:1])[0].numpy()


def box_head():
  return builder.build_head(mmcv.ConfigDict({
      "type": "Shared2FCBBoxHead", "in_channels": 2, "fc_out_channels": 2,
      "roi_feat_size": 1, "num_classes": cases.N_CLASSES,
      "bbox_coder": {"type": "DeltaXYWHBBoxCoder",
                     "target_stds": [0.1, 0.1, 0.2, 0.2]},
      "loss_cls": {"type": "CrossEntropyLoss"},
      "loss_bbox": {"type": "L1Loss"}}))


def second_stage(regions, name):
  """Losses, their gradients, and the detections of the first image."""
  head, sampled = box_head(), []
  boxes, labels = ([torch.tensor(a[b >= 0]) for a, b in zip(x, regions.labels)]
                   for x in (regions.boxes, regions.labels))
  for rois, box, label in zip(map(torch.tensor, regions.proposals), boxes,
                              labels):
    sampler = core.build_sampler({
        "type": "RandomSampler", "num": cases.N_DRAWN, "pos_fraction": 0.25})
    sampled.append(sampler.sample(core.build_assigner(assigner(name)).assign(
        rois, box, None, label.long()), rois, box, label.long()))
  rois = core.bbox2roi([x.bboxes for x in sampled])
  logits, deltas = (torch.tensor(x).requires_grad_()
                    for x in cases.predictions(rois[:, 1:].numpy()))
  losses = head.loss(logits, deltas.flatten(1), rois, *head.get_targets(
      sampled, boxes, labels, mmcv.ConfigDict(pos_weight=-1)))
  losses = [losses[key] for key in ("loss_cls", "loss_bbox")]
  sum(losses).backward()
  yield "losses", np.array([x.item() for x in losses], np.float32)
  yield "rois", rois.numpy()
  yield "logits", logits.grad.numpy()
  if deltas.grad is None:
    deltas.grad = torch.zeros_like(deltas)
  yield "deltas", deltas.grad.numpy()
  for i, x in enumerate(sampled):
    yield f"n_positive/{i}", np.array(len(x.pos_inds))
  with torch.no_grad():
    rois = torch.tensor(regions.proposals[0])
    logits, deltas = map(torch.tensor, cases.predictions(regions.proposals[0]))
    found, labels = head.get_bboxes(
        core.bbox2roi([rois]), logits, deltas.flatten(1), regions.size, None,
        cfg=mmcv.ConfigDict({
            "score_thr": cases.SCORE_THRESHOLD,
            "nms": {"type": "nms", "iou_threshold": cases.NMS_IOU},
            "max_per_img": cases.MAX_DETECTIONS}))
  yield "detections", found.numpy()
  yield "labels", labels.numpy().astype(np.int8)


def masks():
  """Loss of masks, and its gradient of the positive regions."""
  logits, targets, labels, positive = map(torch.tensor, cases.masks())
  logits = logits[positive].permute(0, 3, 1, 2).requires_grad_()
  logits.retain_grad()
  head = builder.build_head(mmcv.ConfigDict({
      "type": "FCNMaskHead", "num_convs": 0, "in_channels": 2,
      "num_classes": cases.N_CLASSES,
      "loss_mask": {"type": "CrossEntropyLoss", "use_mask": True}}))
  loss = head.loss(logits, targets[positive],
                   labels[positive].long())["loss_mask"]
  loss.sum().backward()
  yield "loss", loss.detach().numpy()
  yield "logits", logits.grad.permute(0, 2, 3, 1).numpy()


def main():
  arrays = {}
  matching = make_detection_ops.rows(detection_cases.assignment())
  for name in cases.MATCHING:
    arrays[f"matching/{name}"] = np.stack(
        [assigned(name, case) for case in matching[:cases.N_MATCHING]])
  parts = {f"proposals/{name}": proposals(batch)
           for name, batch in cases.batches().items()}
  for name, regions in cases.regions().items():
    for kind in ("mask_rcnn", "faster_rcnn"):
      parts[f"regions/{kind}/{name}"] = second_stage(regions, kind)
  parts["masks"] = masks()
  for name, part in parts.items():
    arrays |= {f"{name}/{key}": value for key, value in part}
  np.savez_compressed(GOLDEN / "region_ops.npz", **arrays)


if __name__ == "__main__":
  main()
