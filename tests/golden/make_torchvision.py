"""Runs a small Mask R-CNN of torchvision and writes what it gives.

  python tests/golden/make_torchvision.py --out=tests/golden/detection

Wants torch and torchvision. The file has a `parity_cases.Golden`, with "logits"
and "features" as `rcnn_cases` describes, of a model with the 91 classes of the
published weights; of "mask_head", every ninth row and column.
"""

import argparse
import pathlib
import sys

import numpy as np
import torch
import torchvision
from torchvision.models import resnet
from torchvision.models.detection import backbone_utils, faster_rcnn, mask_rcnn

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import detector_cases
import parity_cases
import rcnn_cases

N_OUTPUTS = 91


def build():
  """One block a stage, of the published widths; a narrow pyramid and heads."""
  dim = detector_cases.FPN_DIM
  body = resnet.ResNet(resnet.Bottleneck, [1] * 4,
                       norm_layer=torchvision.ops.FrozenBatchNorm2d)
  backbone = backbone_utils.BackboneWithFPN(
      body, {f"layer{i + 1}": str(i) for i in range(4)},
      [256, 512, 1024, 2048], dim)
  model = mask_rcnn.MaskRCNN(
      backbone,
      box_head=faster_rcnn.TwoMLPHead(dim * 49, detector_cases.BOX_DIM),
      box_predictor=faster_rcnn.FastRCNNPredictor(detector_cases.BOX_DIM,
                                                  N_OUTPUTS),
      mask_head=mask_rcnn.MaskRCNNHeads(dim, (dim, dim), 1),
      mask_predictor=mask_rcnn.MaskRCNNPredictor(dim, dim, N_OUTPUTS))
  weights = detector_cases.weights(
      {k: tuple(v.shape) for k, v in model.state_dict().items()})
  model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
  return model.eval()


def golden(model):
  size = detector_cases.SIZES[0]

  def channels_first(x):
    return torch.from_numpy(x).permute(0, 3, 1, 2)

  def rows(x, n):
    return x.reshape(len(x), -1, n, *x.shape[2:]).permute(
        0, 3, 4, 1, 2).reshape(len(x), -1, n)

  with torch.no_grad():
    maps = model.backbone(channels_first(detector_cases.images(size)[:1]))
    judged = torch.cat([
        torch.cat([rows(logits, 1), rows(deltas, 4)], -1)
        for logits, deltas in zip(*model.rpn.head(list(maps.values())))], 1)
    heads = model.roi_heads
    found = heads.box_predictor(heads.box_head(
        channels_first(rcnn_cases.features(7))))
    masks = heads.mask_predictor(heads.mask_head(
        channels_first(rcnn_cases.features(14))))
  features = {"box_head": torch.cat(found, 1).numpy(),
              "mask_head": masks[..., ::9, ::9].permute(0, 2, 3, 1).numpy()}
  return parity_cases.Golden(
      meta={"torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__},
      state=[(k, tuple(v.shape), str(v.dtype).removeprefix("torch."), False)
             for k, v in model.state_dict().items()],
      logits={size: judged.numpy()}, features={size: features},
      shapes={size: {key: x.shape for key, x in features.items()}},
      gradients={})


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--out", required=True, help="the folder")
  args = parser.parse_args()
  golden(build()).save(
      pathlib.Path(args.out, "resnet50-mask_rcnn-torchvision.npz"))


if __name__ == "__main__":
  main()
