"""The names of mmdetection's weights, for a head over a family's backbone.

Such a model is a family of its own, as "retinanet/poolformer", with the layout
"mmdet"; `torchvision` has another one to read.
"""

from metaformer_jax.convert import openmmlab
from metaformer_jax.convert.rules import Rule

_RETINANET = (
    *openmmlab.PYRAMID,
    # Extra levels continue the outputs, those of strides 8, 16 and 32.
    *(Rule(f"pyramid/extra{i}", f"neck.fpn_convs.{i + 2}.conv", "conv")
      for i in (1, 2)),
    # dense_heads/retina_head.py.
    Rule("head/class_conv{i}", "bbox_head.cls_convs.{i0}.conv", "conv"),
    Rule("head/box_conv{i}", "bbox_head.reg_convs.{i0}.conv", "conv"),
    Rule("head/class_out", "bbox_head.retina_cls", "conv"),
    Rule("head/box_out", "bbox_head.retina_reg", "conv"),
)

_FASTER_RCNN = (
    *openmmlab.PYRAMID,
    # dense_heads/rpn_head.py.
    Rule("rpn/conv", "rpn_head.rpn_conv", "conv"),
    Rule("rpn/class_out", "rpn_head.rpn_cls", "pointwise"),
    Rule("rpn/box_out", "rpn_head.rpn_reg", "pointwise"),
    # roi_heads/bbox_heads/convfc_bbox_head.py.
    Rule("box_head/fc1", "roi_head.bbox_head.shared_fcs.0", "flattened"),
    Rule("box_head/fc2", "roi_head.bbox_head.shared_fcs.1", "dense"),
    Rule("box_head/class_out", "roi_head.bbox_head.fc_cls", "dense"),
    Rule("box_head/box_out", "roi_head.bbox_head.fc_reg", "dense"),
)

_MASK_RCNN = (
    *_FASTER_RCNN,
    # roi_heads/mask_heads/fcn_mask_head.py.
    Rule("mask_head/conv{i}", "roi_head.mask_head.convs.{i0}.conv", "conv"),
    Rule("mask_head/deconv", "roi_head.mask_head.upsample", "conv"),
    Rule("mask_head/mask_out", "roi_head.mask_head.conv_logits",
         "pointwise"),
)

RULES = openmmlab.families(
    {"retinanet": _RETINANET, "faster_rcnn": _FASTER_RCNN,
     "mask_rcnn": _MASK_RCNN}, "mmdet")
