"""Runs the cases of detection in mmdetection and writes what they give.

  python tests/golden/make_detection.py --poolformer=DIR --pvt=DIR \
      --out=tests/golden/detection

DIR are clones of sail-sg/poolformer and whai362/PVT. Wants torch, torchvision,
timm 1.0 and mmdetection 2.19, which the official PoolFormer trains with:

  pip install "setuptools<66" wheel addict yapf==0.40.1 terminaltables six \
      matplotlib opencv-python-headless pycocotools
  MMCV_WITH_OPS=0 pip install --no-deps --no-build-isolation mmcv==1.7.2
  pip install --no-deps mmdet==2.19.0

The format is `parity_cases.Golden`. --save=DIR writes .pth files as mmcv does;
--count prints the parameters of the models at full size, with 80 classes.
"""

import argparse
import importlib.util
import os
import pathlib
import sys
import types
import warnings

import numpy as np
import torch
import torchvision

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import detector_cases
import make
import parity_cases


def import_mmdet():
  """mmdetection 2.19 with the mmcv that runs with current torch."""
  warnings.simplefilter("ignore")
  np.int, np.float = int, float  # Removed from NumPy.
  operations = types.ModuleType("mmcv._ext")  # Compiled ones.
  operations.__file__ = "_ext.py"
  operations.__getattr__ = lambda name: lambda *args: None
  operations.nms = lambda boxes, scores, iou_threshold, offset: (
      torchvision.ops.nms(boxes, scores, iou_threshold))
  sys.modules["mmcv._ext"] = operations
  import mmcv  # noqa: PLC0415 - after what it needs.

  mmcv.__version__ = "1.4.0"  # mmdetection refuses later ones.
  import mmdet.models  # noqa: PLC0415

  return mmdet.models


def register(models, poolformer, pvt, *, first_norm=False):
  """Adds the official backbones to mmdetection's, in place of its PVT."""
  if not first_norm:
    os.environ["FORK_LAST3"] = "1"  # No norm of the first output.
  make.alias_old_timm()
  path = pathlib.Path(pvt, "detection/pvt.py")
  spec = importlib.util.spec_from_file_location("official_pvt", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for backbone in (make.load_source("poolformer", poolformer).PoolFormer,
                   module.PyramidVisionTransformer):
    models.BACKBONES.register_module(module=backbone, force=True)


def config(backbone, dims, *, num_classes=80, fpn_dim=256, head_dim=256,
           head_depth=4, candidates=1000, max_detections=100):
  """As configs/_base_/models/retinanet_r50_fpn.py."""
  import mmcv  # noqa: PLC0415 - after `import_mmdet`.

  return mmcv.ConfigDict({
      "type": "RetinaNet", "backbone": dict(backbone),
      "neck": {"type": "FPN", "in_channels": list(dims),
               "out_channels": fpn_dim, "start_level": 1,
               "add_extra_convs": "on_input", "num_outs": 5},
      "bbox_head": {
          "type": "RetinaHead", "num_classes": num_classes,
          "in_channels": fpn_dim, "stacked_convs": head_depth,
          "feat_channels": head_dim,
          "anchor_generator": {
              "type": "AnchorGenerator", "octave_base_scale": 4,
              "scales_per_octave": 3, "ratios": [0.5, 1.0, 2.0],
              "strides": [8, 16, 32, 64, 128]},
          "bbox_coder": {"type": "DeltaXYWHBBoxCoder"},
          "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0,
                       "alpha": 0.25, "loss_weight": 1.0},
          "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0}},
      "train_cfg": {
          "assigner": {"type": "MaxIoUAssigner", "pos_iou_thr": 0.5,
                       "neg_iou_thr": 0.4, "min_pos_iou": 0,
                       "ignore_iof_thr": -1},
          "allowed_border": -1, "pos_weight": -1, "debug": False},
      "test_cfg": {
          "nms_pre": candidates, "min_bbox_size": 0, "score_thr": 0.05,
          "nms": {"type": "nms", "iou_threshold": 0.5},
          "max_per_img": max_detections}})


def settings(case):
  """The arguments of `config`."""
  cases = detector_cases
  return {"backbone": case.theirs, "dims": case.dims,
          "num_classes": cases.NUM_CLASSES, "fpn_dim": cases.FPN_DIM,
          "head_dim": cases.HEAD_DIM, "head_depth": cases.HEAD_DEPTH,
          "candidates": cases.CANDIDATES,
          "max_detections": cases.MAX_DETECTIONS}


def build(case, model_config, models):
  model = models.build_detector(model_config)
  if case.n_blocks:
    for parent, name in make.stacks(model.backbone):
      setattr(parent, name, torch.nn.Sequential(
          *list(getattr(parent, name))[:case.n_blocks]))
  drawn = detector_cases.weights(
      {k: tuple(v.shape) for k, v in model.state_dict().items()})
  model.load_state_dict({k: torch.from_numpy(v) for k, v in drawn.items()})
  return model


def channels_first(size):
  return torch.from_numpy(detector_cases.images(size)).permute(0, 3, 1, 2)


def outputs(model, size):
  """[B, n, num_classes + 4] of all levels, in the order of the anchors."""
  with torch.no_grad():
    levels = zip(*model.forward_dummy(channels_first(size)))
  found = []
  for level in levels:
    scores, deltas = (
        x.permute(0, 2, 3, 1).reshape(len(x), -1, n)
        for x, n in zip(level, (detector_cases.NUM_CLASSES, 4)))
    found.append(torch.cat([scores, deltas], -1))
  return torch.cat(found, 1).numpy()


def meta(padded, size=None):
  return {"img_shape": (*(size or padded), 3), "pad_shape": (*padded, 3),
          "scale_factor": np.ones(4, np.float32), "flip": False}


def detections(model, size):
  """[n, 6] of the first image: x1, y1, x2, y2, score, label."""
  with torch.no_grad():
    outs = model.bbox_head(model.extract_feat(channels_first(size)[:1]))
    (boxes, labels), = model.bbox_head.get_bboxes(
        *outs, img_metas=[meta(size, detector_cases.IMAGE_SIZE)])
  return np.concatenate([boxes.numpy(), labels.numpy()[:, None]], 1)


def state(model):
  """As `parity_cases.Golden.state`."""
  trained = {k for k, p in model.named_parameters() if p.requires_grad}
  return [(k, tuple(v.shape), str(v.dtype).removeprefix("torch."), k in trained)
          for k, v in model.state_dict().items()]


def golden(model):
  cases = detector_cases
  model.eval()
  logits = {size: outputs(model, size) for size in cases.SIZES}
  found = {size: {} for size in logits}
  found[cases.SIZES[-1]]["detections"] = detections(model, cases.SIZES[-1])
  model.train()
  size = cases.SIZES[0]
  losses = model.forward_train(
      channels_first(size), [meta(size)] * cases.BATCH,
      [torch.from_numpy(boxes) for boxes in cases.BOXES],
      [torch.from_numpy(labels) for labels in cases.LABELS])
  losses = {k: sum(v) for k, v in losses.items()}
  sum(losses.values()).backward()
  return parity_cases.Golden(
      meta={"torch": torch.__version__, "numpy": np.__version__,
            "n_params": sum(p.numel() for p in model.parameters()),
            "losses": {k: v.item() for k, v in losses.items()}},
      state=state(model), logits=logits, features=found,
      shapes={size: {k: v.shape for k, v in of_size.items()}
              for size, of_size in found.items()},
      # Of the position of PVT's class token, which is unused, there is none.
      gradients={k: parity_cases.sketch(k, p.grad.numpy()) if p.grad is not None
                 else np.zeros(3) for k, p in model.named_parameters()
                 if p.requires_grad})


def save(model, path):
  """As `mmcv.runner.save_checkpoint`, with what mmdetection adds."""
  from mmcv import runner  # noqa: PLC0415 - after `import_mmdet`.

  runner.save_checkpoint(model, str(path), meta={
      "epoch": 12, "iter": 36, "CLASSES": ("person", "bicycle"), "seed": 0,
      "config": "model = 1", "mmdet_version": "2.19.0", "env_info": "a\nb",
      "hook_msgs": {}})


def count(make):
  """Prints the parameters of the published models, which `make` makes."""
  dims = (64, 128, 320, 512)
  rows = {}
  for name, layers in (("s12", [2, 2, 6, 2]), ("s24", [4, 4, 12, 4]),
                       ("s36", [6, 6, 18, 6])):
    rows[f"poolformer_{name}"] = dims, {
        "type": "PoolFormer", "layers": layers, "embed_dims": list(dims),
        "mlp_ratios": [4] * 4, "downsamples": [True] * 4, "fork_feat": True}
  for depth, widening in ((18, 1), (50, 4), (101, 4)):
    rows[f"resnet{depth}"] = [64 * widening * 2**i for i in range(4)], {
        "type": "ResNet", "depth": depth, "frozen_stages": 1}
  for name, depths in (("tiny", [2, 2, 2, 2]), ("small", [3, 4, 6, 3]),
                       ("medium", [3, 4, 18, 3]), ("large", [3, 8, 27, 3])):
    rows[f"pvt_{name}"] = dims, {
        "type": "PyramidVisionTransformer", "patch_size": 4,
        "embed_dims": list(dims), "num_heads": [1, 2, 5, 8],
        "mlp_ratios": [8, 8, 4, 4], "qkv_bias": True, "depths": depths}
  for name, (dims, backbone) in rows.items():
    model = make(backbone, dims)
    everything, trained = (
        sum(p.numel() for p in model.parameters() if p.requires_grad or frozen)
        for frozen in (True, False))
    print(name, everything, trained, flush=True)


def parse(doc):
  parser = argparse.ArgumentParser(
      description=doc, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--poolformer", required=True, help="the clone")
  parser.add_argument("--pvt", required=True, help="the clone")
  parser.add_argument("--out", help="write golden files to this folder")
  parser.add_argument("--save", help="write weights to this folder")
  parser.add_argument("--count", action="store_true")
  return parser.parse_args()


def write(args, cases, make_model, make_golden):
  """Writes what the arguments ask for of each case."""
  torch.set_num_threads(1)
  for folder in filter(None, (args.out, args.save)):
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
  for case in cases:
    model = make_model(case)
    if args.out:
      result = make_golden(model)
      result.save(pathlib.Path(args.out, f"{case.name}.npz"))
      print(case.name, result.meta, flush=True)
    if args.save:
      save(model, pathlib.Path(args.save, f"{case.name}.pth"))


def main():
  args = parse(__doc__)
  models = import_mmdet()
  register(models, args.poolformer, args.pvt)
  write(args, detector_cases.CASES.values(),
        lambda case: build(case, config(**settings(case)), models), golden)
  if args.count:
    count(lambda *row: models.build_detector(config(*row)))


if __name__ == "__main__":
  main()
