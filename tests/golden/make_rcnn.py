"""Runs Mask R-CNN in mmdetection and writes what it gives.

  python tests/golden/make_rcnn.py --poolformer=DIR --pvt=DIR \
      --out=tests/golden/detection

Arguments, and what to install, are those of make_detection.py; --count counts
Faster R-CNN as well. `rcnn_cases` describes the files.
"""

import pathlib
import sys

import numpy as np
import torch
import torchvision

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import detector_cases
import make_detection
import parity_cases
import rcnn_cases

SIZE, LAST_SIZE = detector_cases.SIZES[0], detector_cases.SIZES[-1]


def config(backbone, dims, *, masks=True, num_classes=80, dim=256, head_dim=256,
           head_depth=4, box_dim=1024, candidates=(2000, 1000), proposals=1000,
           max_detections=100, samples=(256, 512)):
  """As configs/_base_/models/mask_rcnn_r50_fpn.py, or faster_rcnn_r50_fpn.py.

  `candidates` are those of training and of testing, `samples` those of anchors
  and of proposals.
  """
  import mmcv  # noqa: PLC0415 - after `import_mmdet`.

  roi_layer = {"type": "RoIAlign", "sampling_ratio": 0, "use_torchvision": True}

  def extractor(side):
    return {"type": "SingleRoIExtractor", "out_channels": dim,
            "roi_layer": {**roi_layer, "output_size": side},
            "featmap_strides": [4, 8, 16, 32]}

  def sampler(n, fraction, add):
    return {"type": "RandomSampler", "num": n, "pos_fraction": fraction,
            "neg_pos_ub": -1, "add_gt_as_proposals": add}

  def assigner(positive, negative, minimum, low_quality):
    return {"type": "MaxIoUAssigner", "pos_iou_thr": positive,
            "neg_iou_thr": negative, "min_pos_iou": minimum,
            "match_low_quality": low_quality, "ignore_iof_thr": -1}

  def suppression(n):
    return {"nms_pre": n, "max_per_img": proposals, "min_bbox_size": 0,
            "nms": {"type": "nms", "iou_threshold": 0.7}}

  cross_entropy = {"type": "CrossEntropyLoss", "loss_weight": 1.0}
  l1 = {"type": "L1Loss", "loss_weight": 1.0}
  coder = {"type": "DeltaXYWHBBoxCoder", "target_means": [0.0] * 4}
  roi_head = {
      "type": "StandardRoIHead", "bbox_roi_extractor": extractor(7),
      "bbox_head": {
          "type": "Shared2FCBBoxHead", "in_channels": dim,
          "fc_out_channels": box_dim, "roi_feat_size": 7,
          "num_classes": num_classes, "reg_class_agnostic": False,
          "bbox_coder": {**coder, "target_stds": [0.1, 0.1, 0.2, 0.2]},
          "loss_cls": {**cross_entropy, "use_sigmoid": False},
          "loss_bbox": l1}}
  if masks:
    roi_head |= {
        "mask_roi_extractor": extractor(14),
        "mask_head": {
            "type": "FCNMaskHead", "num_convs": head_depth, "in_channels": dim,
            "conv_out_channels": head_dim, "num_classes": num_classes,
            "loss_mask": {**cross_entropy, "use_mask": True}}}
  return mmcv.ConfigDict({
      "type": "MaskRCNN" if masks else "FasterRCNN", "backbone": dict(backbone),
      "neck": {"type": "FPN", "in_channels": list(dims), "out_channels": dim,
               "num_outs": 5},
      "rpn_head": {
          "type": "RPNHead", "in_channels": dim, "feat_channels": head_dim,
          "anchor_generator": {
              "type": "AnchorGenerator", "scales": [8],
              "ratios": [0.5, 1.0, 2.0], "strides": [4, 8, 16, 32, 64]},
          "bbox_coder": {**coder, "target_stds": [1.0] * 4},
          "loss_cls": {**cross_entropy, "use_sigmoid": True},
          "loss_bbox": l1},
      "roi_head": roi_head,
      "train_cfg": {
          "rpn": {"assigner": assigner(0.7, 0.3, 0.3, True),
                  "sampler": sampler(samples[0], 0.5, False),
                  "allowed_border": -1, "pos_weight": -1, "debug": False},
          "rpn_proposal": suppression(candidates[0]),
          "rcnn": {"assigner": assigner(0.5, 0.5, 0.5, masks),
                   "sampler": sampler(samples[1], 0.25, True),
                   "mask_size": 28, "pos_weight": -1, "debug": False}},
      "test_cfg": {
          "rpn": suppression(candidates[1]),
          "rcnn": {"score_thr": 0.05, "max_per_img": max_detections,
                   "nms": {"type": "nms", "iou_threshold": 0.5},
                   "mask_thr_binary": 0.5}}})


def settings(case):
  """The arguments of `config`."""
  cases = detector_cases
  return {
      "backbone": case.theirs, "dims": case.dims,
      "num_classes": cases.NUM_CLASSES,
      "dim": cases.FPN_DIM, "head_dim": cases.HEAD_DIM,
      "head_depth": cases.HEAD_DEPTH, "box_dim": cases.BOX_DIM,
      "candidates": (rcnn_cases.CANDIDATES,) * 2,
      "proposals": rcnn_cases.PROPOSALS,
      "max_detections": rcnn_cases.MAX_DETECTIONS,
      "samples": (rcnn_cases.ANCHOR_SAMPLES, rcnn_cases.ROI_SAMPLES)}


def align_masks(x, rois, out, *_, aligned_height, aligned_width, spatial_scale,
                sampling_ratio, aligned, **__):
  """mmcv's compiled RoIAlign, which targets of masks are made with."""
  out.copy_(torchvision.ops.roi_align(
      x, rois, (aligned_height, aligned_width), spatial_scale, sampling_ratio,
      aligned))


def rpn_outputs(model, images):
  """[B, n, 1 + 4] of all levels, in the order of the anchors."""
  found = []
  for level in zip(*model.rpn_head(model.extract_feat(images))):
    logits, deltas = (
        x.permute(0, 2, 3, 1).reshape(len(x), -1, n)
        for x, n in zip(level, (1, 4)))
    found.append(torch.cat([logits, deltas], -1))
  return torch.cat(found, 1)


def head_outputs(model):
  """Of the given features; and the losses, which need no sampling."""
  def features(side):
    return torch.from_numpy(rcnn_cases.features(side)).permute(0, 3, 1, 2)

  heads, cases = model.roi_head, rcnn_cases
  labels = torch.from_numpy(cases.LABELS)
  is_object = labels < detector_cases.NUM_CLASSES
  scores, deltas = heads.bbox_head(features(7))
  losses = heads.bbox_head.loss(
      scores, deltas, torch.zeros(cases.N_BOXES, 5), labels,
      torch.ones(cases.N_BOXES), torch.from_numpy(cases.TARGETS),
      is_object[:, None].float().expand(-1, 4))
  losses.pop("acc")
  masks = heads.mask_head(features(14))
  losses |= heads.mask_head.loss(
      masks[is_object], torch.from_numpy(cases.mask_targets()),
      labels[is_object])
  return {"box_head": torch.cat([scores, deltas], 1),
          "mask_head": masks.permute(0, 2, 3, 1)}, losses


def detections(model):
  """Proposals, detections and masks of the first image of the last size."""
  height, width = detector_cases.IMAGE_SIZE
  original = rcnn_cases.ORIGINAL_SIZE
  factors = [width / original[1], height / original[0]]
  metas = [{**make_detection.meta(LAST_SIZE, detector_cases.IMAGE_SIZE),
            "ori_shape": (*original, 3),
            "scale_factor": np.array(factors * 2, np.float32)}]
  maps = model.extract_feat(make_detection.channels_first(LAST_SIZE)[:1])
  proposals = model.rpn_head.simple_test_rpn(maps, metas)
  (boxes,), (labels,) = model.roi_head.simple_test_bboxes(
      maps, metas, proposals, model.test_cfg.rcnn, rescale=True)
  by_class = list(map(iter, model.roi_head.simple_test_mask(
      maps, metas, [boxes], [labels], rescale=True)[0]))
  return {"proposals": proposals[0],
          "detections": torch.cat([boxes, labels[:, None].float()], 1),
          "masks": torch.from_numpy(np.stack(
              [next(by_class[label]) for label in labels]))}


def gradients(model, losses):
  """The sketch of each trained tensor's gradient, for the sum."""
  model.zero_grad()
  sum(losses.values()).backward()
  return {key: parity_cases.sketch(key, p.grad.numpy()) if p.grad is not None
          else np.zeros(3) for key, p in model.named_parameters()
          if p.requires_grad}


def train_losses(model):
  from mmdet.core import BitmapMasks  # noqa: PLC0415 - after `import_mmdet`.

  losses = model.forward_train(
      make_detection.channels_first(SIZE),
      [make_detection.meta(SIZE)] * detector_cases.BATCH,
      [torch.from_numpy(boxes) for boxes in detector_cases.BOXES],
      [torch.from_numpy(labels) for labels in detector_cases.LABELS],
      gt_masks=[BitmapMasks(rcnn_cases.masks(i), *SIZE)
                for i in range(detector_cases.BATCH)])
  return {key: sum(value) if isinstance(value, list) else value
          for key, value in losses.items() if key != "acc"}


def golden(model):
  model.eval()
  images = {size: make_detection.channels_first(size)
            for size in detector_cases.SIZES}
  with torch.no_grad():
    logits = {size: rpn_outputs(model, x)[i:i + 1].numpy()
              for i, (size, x) in enumerate(images.items())}
    found = detections(model)
  state = make_detection.state(model)
  outputs, head_losses = head_outputs(model)
  judged = rpn_outputs(model, images[SIZE])
  head_losses |= {"logits": judged[..., 0].square().mean(),
                  "deltas": judged[..., 1:].square().mean()}
  outputs["head_gradients"] = torch.from_numpy(np.stack(list(
      gradients(model, head_losses).values())))
  model.train()
  losses = train_losses(model)
  features = {SIZE: outputs, LAST_SIZE: found}
  features = {size: {key: x.detach().numpy() for key, x in arrays.items()}
              for size, arrays in features.items()}
  return parity_cases.Golden(
      meta={"torch": torch.__version__, "numpy": np.__version__,
            "n_params": sum(p.numel() for p in model.parameters()),
            **{name: {key: value.item() for key, value in values.items()}
               for name, values in (("losses", losses),
                                    ("head_losses", head_losses))}},
      state=state, logits=logits, features=features,
      shapes={size: {key: x.shape for key, x in arrays.items()}
              for size, arrays in features.items()},
      gradients=gradients(model, losses))


def main():
  args = make_detection.parse(__doc__)
  models = make_detection.import_mmdet()
  sys.modules["mmcv._ext"].roi_align_forward = align_masks
  make_detection.register(models, args.poolformer, args.pvt, first_norm=True)
  make_detection.write(
      args, rcnn_cases.CASES.values(),
      lambda case: make_detection.build(case, config(**settings(case)), models),
      golden)
  if args.count:
    for masks in (False, True):
      print("Mask R-CNN" if masks else "Faster R-CNN")
      make_detection.count(lambda *row, masks=masks: models.build_detector(
          config(*row, masks=masks)))


if __name__ == "__main__":
  main()
