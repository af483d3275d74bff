"""The names of mmsegmentation's weights, for a head over a family's backbone.

Such a model is a family of its own, as "semantic_fpn/poolformer", whose only
layout is "mmseg".
"""

from collections.abc import Iterator

from metaformer_jax.convert import openmmlab
from metaformer_jax.convert.rules import Rule


def _conv_norm(path: str, key: str, number: str = "") -> Iterator[Rule]:
  """mmcv's ConvModule; "conv" and "norm" have a number of ours."""
  yield Rule(f"{path}/conv{number}", f"{key}.conv", "conv")
  yield Rule(f"{path}/norm{number}", f"{key}.bn", "norm")


def _semantic_fpn() -> Iterator[Rule]:
  yield from openmmlab.PYRAMID
  # decode_heads/fpn_head.py.
  for i in range(1, 4):  # Every other module of theirs doubles the map.
    yield from _conv_norm("head/level{s}",
                          f"decode_head.scale_heads.{{s0}}.{2 * (i - 1)}", i)


def _upernet() -> Iterator[Rule]:
  # decode_heads/uper_head.py, psp_head.py.
  for path, key in (("pyramid_pooling/pool{i}", "psp_modules.{i0}.1"),
                    ("pyramid_pooling/bottleneck", "bottleneck"),
                    ("lateral{i}", "lateral_convs.{i0}"),
                    ("output{i}", "fpn_convs.{i0}"),
                    ("fusion", "fpn_bottleneck")):
    yield from _conv_norm(f"head/{path}", f"decode_head.{key}")


# Of every head; the auxiliary one is decode_heads/fcn_head.py.
_COMMON = (
    Rule("head/classifier/conv", "decode_head.conv_seg", "pointwise"),
    *_conv_norm("auxiliary/conv1", "auxiliary_head.convs.0"),
    Rule("auxiliary/classifier/conv", "auxiliary_head.conv_seg", "pointwise"),
)

_HEADS = {"semantic_fpn": (*_semantic_fpn(), *_COMMON),
          "upernet": (*_upernet(), *_COMMON)}

RULES = openmmlab.families(_HEADS, "mmseg")
