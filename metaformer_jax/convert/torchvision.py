"""The weights of torchvision's R-CNNs, as fasterrcnn_resnet50_fpn.

They are only read, as layout "torchvision". Their functions differ a little
from ours, which are mmdetection's (docs/detection.md).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from metaformer_jax.convert import openmmlab, rules
from metaformer_jax.convert.rules import Rule

# models/detection/faster_rcnn.py and mask_rcnn.py, from version 0.13 on.
_FASTER_RCNN = (
    *(openmmlab.within(rule, "backbone.body.")
      for rule in rules.RULES["resnet"]["timm"]),
    Rule("pyramid/lateral{i}", "backbone.fpn.inner_blocks.{i0}.0", "conv"),
    Rule("pyramid/output{i}", "backbone.fpn.layer_blocks.{i0}.0", "conv"),
    Rule("rpn/conv", "rpn.head.conv.0.0", "conv"),
    Rule("rpn/class_out", "rpn.head.cls_logits", "pointwise"),
    Rule("rpn/box_out", "rpn.head.bbox_pred", "pointwise"),
    Rule("box_head/fc1", "roi_heads.box_head.fc6", "flattened"),
    Rule("box_head/fc2", "roi_heads.box_head.fc7", "dense"),
    Rule("box_head/class_out", "roi_heads.box_predictor.cls_score", "dense"),
    Rule("box_head/box_out", "roi_heads.box_predictor.bbox_pred", "dense"),
)
_MASK_RCNN = (
    *_FASTER_RCNN,
    Rule("mask_head/conv{i}", "roi_heads.mask_head.{i0}.0", "conv"),
    Rule("mask_head/deconv", "roi_heads.mask_predictor.conv5_mask", "conv"),
    Rule("mask_head/mask_out", "roi_heads.mask_predictor.mask_fcn_logits",
         "pointwise"),
)

READ_ONLY = {f"{head}/resnet": {"torchvision": of_head} for head, of_head in (
    ("faster_rcnn", _FASTER_RCNN), ("mask_rcnn", _MASK_RCNN))}

# Names before version 0.13, as in fasterrcnn_resnet50_fpn_coco-258fb6c6.pth.
_OLD = ((re.compile(r"(backbone\.fpn\.\w+_blocks\.\d+)\.(\w+)"), r"\1.0.\2"),
        (re.compile(r"(rpn\.head\.conv)\.(\w+)"), r"\1.0.0.\2"),
        (re.compile(r"(roi_heads\.mask_head)\.mask_fcn(\d+)\.(\w+)"),
         lambda found: f"{found[1]}.{int(found[2]) - 1}.0.{found[3]}"))

# Classes are numbered by COCO's ids, 1 to 90, of which these are not used; 0 is
# the background.
_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_COCO_IDS = np.setdiff1d(np.arange(1, 91), _UNUSED_IDS)


def arranged(tensors: Mapping[str, np.ndarray],
             target: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The tensors by the names of the rules, with our outputs.

  The background comes last, and has neither box nor mask. If the model has 80
  classes, those of COCO are taken from 90.

  Args:
    tensors: of a file.
    target: flat variables of the model, or their shapes.
  """
  n = target["params/box_head/class_out/bias"].shape[0] - 1
  found = {}
  for key, value in tensors.items():
    for pattern, new in _OLD:
      if pattern.fullmatch(key) and pattern.sub(new, key) not in tensors:
        key = pattern.sub(new, key)
    found[key] = value
  for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred",
                "mask_predictor.mask_fcn_logits"):
    for leaf in ("weight", "bias"):
      key = f"roi_heads.{layer}.{leaf}"
      if key in found:
        found[key] = _outputs(found[key], layer.rpartition(".")[2], n)
  return found


def _outputs(x: np.ndarray, layer: str, n: int) -> np.ndarray:
  """One leaf of a last layer, by our classes; its first axis is theirs."""
  width = 4 if layer == "bbox_pred" else 1
  if not x.shape or 0 in x.shape or len(x) % width:
    return x  # The conversion says which shape it should have.
  by_class = x.reshape(len(x) // width, width, *x.shape[1:])
  n_theirs = len(by_class) - 1
  ids = (_COCO_IDS if (n_theirs, n) == (_COCO_IDS[-1], len(_COCO_IDS))
         else np.arange(1, n_theirs + 1))
  if layer == "cls_score":
    ids = [*ids, 0]
  return by_class[ids].reshape(len(ids) * width, *x.shape[1:])
