"""The names of mmdetection's weights, for a head over a family's backbone.

Such a model is a family of its own, as "retinanet/poolformer", whose only
layout is "mmdet".
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

RULES = openmmlab.families({"retinanet": _RETINANET}, "mmdet")
