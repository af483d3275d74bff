"""Writes detection_ops.npz: operations of mmdetection 2.19 and torchvision.

Needs torch, torchvision, mmdetection 2.19.0, mmcv 1.7.2 built without its
operations (MMCV_WITH_OPS=0), and what these import:

    python tests/golden/make_detection_ops.py

The cases are made from seeds (`detection_cases`), so that the file holds
results only.
"""

import functools
import pathlib
import sys
import types

import mmcv
import numpy as np
import torch
import torchvision

GOLDEN = pathlib.Path(__file__).parent
sys.path.insert(0, str(GOLDEN.parent))

import detection_cases as cases  # noqa: E402

mmcv.__version__ = "1.4.0"  # The newest that mmdetection 2.19 accepts.


class Operations(types.ModuleType):
  """Stands for mmcv's compiled operations; none but `nms` is called."""

  @staticmethod
  def nms(boxes, scores, iou_threshold, offset):
    assert offset == 0
    return torchvision.ops.nms(boxes, scores, iou_threshold)

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    return None


sys.modules["mmcv._ext"] = Operations("mmcv._ext")

# PyTorch leaves the order of equal values open unless it is asked for.
torch.Tensor.sort = functools.partialmethod(torch.Tensor.sort, stable=True)

from mmdet import core  # noqa: E402
from mmdet.models import builder  # noqa: E402


def kept(case):
  """Indices by descending score after torchvision's nms of each class."""
  where = np.flatnonzero(case.is_valid)
  boxes, scores = (torch.tensor(x[where]) for x in (case.boxes, case.scores))
  found = []
  for label in np.unique(case.labels[where]):
    own = torch.tensor(np.flatnonzero(case.labels[where] == label))
    found.append(own[torchvision.ops.nms(
        boxes[own], scores[own], cases.NMS_IOUS[case.iou])])
  found = torch.cat(found).sort()[0] if found else torch.zeros(0, dtype=int)
  order = scores[found].sort(descending=True)[1]
  row = np.full(cases.N_BOXES, 255, np.uint8)
  row[:len(found)] = where[found[order].numpy()]
  return row


def assigned(case):
  """mmdetection's assignment of the valid anchors; -2 for the others."""
  positive, negative = cases.POSITIVE_NEGATIVE[case.thresholds]
  found = np.full(cases.N_ANCHORS, -2, np.int8)
  if case.is_anchor.any():  # Otherwise mmdetection does not come so far.
    result = core.MaxIoUAssigner(positive, negative, min_pos_iou=0).assign(
        torch.tensor(case.anchors[case.is_anchor]),
        torch.tensor(case.boxes[case.is_box]))
    # Numbers of the objects, from 1; 0 is negative, and -1 ignored.
    which = np.array([-1, *np.flatnonzero(case.is_box), -2])
    found[case.is_anchor] = which[result.gt_inds.numpy()]
  return found


def rows(cases):
  return [type(cases)(*row) for row in zip(*cases)]


def focal():
  """torchvision's focal loss and its gradient in float64."""
  logits = np.linspace(-30, 30, 121)
  arrays = {}
  for gamma in (1.0, 1.5, 2.0):
    for target in (0, 1):
      x = torch.tensor(logits, requires_grad=True)
      loss = torchvision.ops.sigmoid_focal_loss(
          x, torch.full_like(x, target), alpha=0.25, gamma=gamma)
      loss.sum().backward()
      arrays[f"focal/{gamma}/{target}"] = np.stack(
          [loss.detach().numpy(), x.grad.numpy()])
  return arrays


HEAD = mmcv.Config.fromstring(f"""
head = dict(
    type="RetinaHead",
    num_classes={cases.N_CLASSES},
    in_channels=8,
    anchor_generator=dict(
        type="AnchorGenerator", octave_base_scale=4, scales_per_octave=3,
        ratios=[0.5, 1.0, 2.0], strides={list(cases.STRIDES)}),
    bbox_coder=dict(type="DeltaXYWHBBoxCoder"),
    loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25),
    loss_bbox=dict(type="L1Loss"),
    train_cfg=dict(
        assigner=dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4,
                      min_pos_iou=0, ignore_iof_thr=-1),
        allowed_border=-1, pos_weight=-1, debug=False),
    test_cfg=dict(
        nms_pre={cases.CANDIDATES}, min_bbox_size=0,
        score_thr={cases.SCORE_THRESHOLD}, max_per_img={cases.MAX_DETECTIONS},
        nms=dict(type="nms", iou_threshold={cases.NMS_IOU})))
""", ".py").head


def as_maps(levels):
  """[2, h * w * 9, C] -> [2, 9 * C, h, w], with gradients."""
  return [torch.tensor(x).reshape(2, *shape, -1).permute(0, 3, 1, 2)
          .contiguous().requires_grad_()
          for x, shape in zip(levels, cases.SHAPES)]


def as_levels(maps, n):
  return np.concatenate([x.permute(0, 2, 3, 1).reshape(2, -1, n).numpy()
                         for x in maps], 1)


def retinanet(batch):
  """Losses, their gradient, and the detections of the first image."""
  logits, deltas = as_maps(batch.logits), as_maps(batch.deltas)
  head = builder.build_head(HEAD)
  metas = [{"img_shape": (*map(int, size), 3), "scale_factor": np.ones(4),
            "pad_shape": (*cases.padded(size), 3)} for size in batch.sizes]
  exists = [labels >= 0 for labels in batch.labels]
  losses = head.loss(
      logits, deltas,
      [torch.tensor(b[e]) for b, e in zip(batch.boxes, exists)],
      [torch.tensor(x[e]).long() for x, e in zip(batch.labels, exists)], metas)
  losses = [sum(losses[key]) for key in ("loss_cls", "loss_bbox")]
  sum(losses).backward()
  yield "losses", np.array([x.item() for x in losses], np.float32)
  yield "logits", as_levels([x.grad for x in logits], cases.N_CLASSES)
  yield "deltas", as_levels([x.grad for x in deltas], 4)
  with torch.no_grad():
    found, labels = head.get_bboxes(
        [x[:1] for x in logits], [x[:1] for x in deltas],
        img_metas=metas[:1])[0]
  yield "detections", found.numpy()
  yield "labels", labels.numpy().astype(np.int8)


def main():
  arrays = {"nms": np.stack([kept(case) for case in rows(cases.nms())]),
            "assignment": np.stack(
                [assigned(case) for case in rows(cases.assignment())]),
            **focal()}
  for i, base in enumerate(
      builder.build_head(HEAD).prior_generator.base_anchors):
    arrays[f"anchors/{cases.STRIDES[i]}"] = base.numpy()
  for name, batch in cases.batches().items():
    for key, value in retinanet(batch):
      arrays[f"retinanet/{name}/{key}"] = value
  np.savez_compressed(GOLDEN / "detection_ops.npz", **arrays)


if __name__ == "__main__":
  main()
