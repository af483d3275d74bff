"""The names of mmsegmentation's weights, for a head over a family's backbone.

Such a model is a family of its own, as "semantic_fpn/poolformer", whose only
layout is "mmseg". The backbone's names are those of its official code, or of
mmsegmentation's ResNet, after "backbone.".
"""

from collections.abc import Iterator

from metaformer_jax.convert import rules
from metaformer_jax.convert.rules import Rule


def _conv_norm(path: str, key: str, number: str = "") -> Iterator[Rule]:
  """mmcv's ConvModule; "conv" and "norm" have a number of ours."""
  yield Rule(f"{path}/conv{number}", f"{key}.conv", "conv")
  yield Rule(f"{path}/norm{number}", f"{key}.bn", "norm")


def _semantic_fpn() -> Iterator[Rule]:
  # Neck: mmseg/models/necks/fpn.py; head: decode_heads/fpn_head.py.
  yield Rule("pyramid/lateral{i}", "neck.lateral_convs.{i0}.conv", "conv")
  yield Rule("pyramid/output{i}", "neck.fpn_convs.{i0}.conv", "conv")
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


def _within(rule: Rule) -> Rule:
  """A rule of a whole model, for the same model as the backbone."""
  keys = (rule.key,) if isinstance(rule.key, str) else rule.key
  negation = "not " if (rule.where or "").startswith("not ") else ""
  where = rule.where and (
      f"{negation}backbone/{rule.where.removeprefix(negation)}")
  return rule._replace(path=f"backbone/{rule.path}", where=where,
                       key=tuple(f"backbone.{key}" for key in keys))


_BACKBONES = {
    # Norms of the outputs have the indices of the stages in `network`.
    "poolformer": (
        *map(_within, rules.RULES["poolformer"]["official"]),
        *(Rule(f"norm{i}", f"backbone.norm{2 * (i - 1)}", "norm")
          for i in range(1, 5))),
    "pvt": tuple(map(_within, rules.RULES["pvt"]["official"])),
    "resnet": tuple(map(_within, rules.OPENMMLAB_RESNET)),
}

RULES = {
    f"{head}/{backbone}": {"mmseg": (*of_backbone, *of_head)}
    for head, of_head in _HEADS.items()
    for backbone, of_backbone in _BACKBONES.items()}
