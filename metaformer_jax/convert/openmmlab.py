"""What the names of weights have in common in OpenMMLab's dense models.

The backbone's names are those of its official code, or of OpenMMLab's ResNet,
after "backbone."; the pyramid's those of its FPN (models/necks/fpn.py).
"""

from collections.abc import Mapping, Sequence

from metaformer_jax.convert import rules
from metaformer_jax.convert.rules import Rule

PYRAMID = (
    Rule("pyramid/lateral{i}", "neck.lateral_convs.{i0}.conv", "conv"),
    Rule("pyramid/output{i}", "neck.fpn_convs.{i0}.conv", "conv"),
)


def within(rule: Rule, prefix: str = "backbone.") -> Rule:
  """A rule of a whole model, for the same model as the backbone.

  Args:
    rule: of the whole model.
    prefix: of the backbone's keys.
  """
  keys = (rule.key,) if isinstance(rule.key, str) else rule.key
  negation = "not " if (rule.where or "").startswith("not ") else ""
  where = rule.where and (
      f"{negation}backbone/{rule.where.removeprefix(negation)}")
  return rule._replace(path=f"backbone/{rule.path}", where=where,
                       key=tuple(f"{prefix}{key}" for key in keys))


_BACKBONES = {
    # Norms of the outputs have the indices of the stages in `network`.
    "poolformer": (
        *map(within, rules.RULES["poolformer"]["official"]),
        *(Rule(f"norm{i}", f"backbone.norm{2 * (i - 1)}", "norm")
          for i in range(1, 5))),
    "pvt": tuple(map(within, rules.RULES["pvt"]["official"])),
    "resnet": tuple(map(within, rules.OPENMMLAB_RESNET)),
}


def families(heads: Mapping[str, Sequence[Rule]], layout: str,
             ) -> dict[str, dict[str, tuple[Rule, ...]]]:
  """As `rules.RULES`, of each head over each backbone, "head/backbone"."""
  return {f"{head}/{backbone}": {layout: (*of_backbone, *of_head)}
          for head, of_head in heads.items()
          for backbone, of_backbone in _BACKBONES.items()}
