"""The name of each weight in PyTorch, for every family and layout, as data.

A rule is (our path, their key, kind). Paths are like "stage{s}/block{b}/norm1",
with numbers in braces; keys may use the numbers that `layouts` derives from
them. A kind is that of a module, which has named leaves (`KINDS`), or that of a
single leaf, which says how its axes differ (`layouts.LAYINGS`).
"""

import re
from typing import NamedTuple


class Rule(NamedTuple):
  """One module or leaf.

  Attributes:
    path: our path, without the collection.
    key: the name in PyTorch. Several names are the equal parts of one of our
      leaves, along its last axis; none, if the layout does not have it.
    kind: a name in `KINDS` or in `layouts.LAYINGS`.
    where: a path that the model must have for the rule to apply or, after
      "not ", must not have; None for all models.
  """

  path: str
  key: str | tuple[str, ...]
  kind: str
  where: str | None = None


# Our leaf, their leaf, and how its axes differ in PyTorch.
KINDS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "conv": (("kernel", "weight", "oihw"), ("bias", "bias", "same")),
    "dense": (("kernel", "weight", "oi"), ("bias", "bias", "same")),
    # A Dense here, a 1 x 1 convolution in PyTorch.
    "pointwise": (("kernel", "weight", "oi11"), ("bias", "bias", "same")),
    # A Dense of flattened maps of 7 x 7.
    "flattened": (("kernel", "weight", "oc77"), ("bias", "bias", "same")),
    "norm": (("scale", "weight", "same"), ("bias", "bias", "same"),
             ("mean", "running_mean", "same"), ("var", "running_var", "same"),
             ("n_batches", "num_batches_tracked", "count")),
    "affine": (("alpha", "alpha", "same"), ("beta", "beta", "same")),
    "affine_1nc": (("alpha", "alpha", "11c"), ("beta", "beta", "11c")),
    "scale": (("scale", "scale", "same"),),
    "star_relu": (("scale", "scale", "same"), ("bias", "bias", "same")),
}

_BLOCK = "stage{s}/block{b}"
_ATTENTION = "stage{s}/block1/token_mixer/qkv"

# sail-sg/poolformer: models/poolformer.py and models/metaformer.py.
_POOLFORMER = (
    Rule("stage1/downsample/conv", "patch_embed.proj", "conv"),
    Rule("stage{s}/downsample/conv", "network.{down}.proj", "conv"),
    Rule("stage{s}/pos_embed/embedding", "network.{embed}.pos_embed", "1chw"),
    Rule(f"{_BLOCK}/norm{{i}}", "network.{blocks}.{b0}.norm{i}", "norm"),
    Rule(f"{_BLOCK}/token_mixer/qkv",
         "network.{blocks}.{b0}.token_mixer.qkv", "dense"),
    Rule(f"{_BLOCK}/token_mixer/proj",
         "network.{blocks}.{b0}.token_mixer.proj", "dense"),
    Rule(f"{_BLOCK}/token_mixer",  # The one matrix of SpatialFc.
         "network.{blocks}.{b0}.token_mixer.fc", "dense"),
    Rule(f"{_BLOCK}/layer_scale{{i}}/scale",
         "network.{blocks}.{b0}.layer_scale_{i}", "same"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}",
         "network.{blocks}.{b0}.mlp.fc{i}", "pointwise"),
    Rule("norm", "norm", "norm"),
    Rule("head", "head", "dense"),
)

_POOLFORMER_LAYER = "poolformer.encoder.block.{s0}.{b0}"

# Hugging Face transformers: PoolFormerForImageClassification.
_POOLFORMER_HUGGINGFACE = (
    Rule("stage{s}/downsample/conv",
         "poolformer.encoder.patch_embeddings.{s0}.projection", "conv"),
    Rule(f"{_BLOCK}/norm1", f"{_POOLFORMER_LAYER}.before_norm", "norm"),
    Rule(f"{_BLOCK}/norm2", f"{_POOLFORMER_LAYER}.after_norm", "norm"),
    Rule(f"{_BLOCK}/layer_scale{{i}}/scale",
         f"{_POOLFORMER_LAYER}.layer_scale_{{i}}", "same"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", f"{_POOLFORMER_LAYER}.output.conv{{i}}",
         "pointwise"),
    Rule("norm", "norm", "norm"),
    Rule("head", "classifier", "dense"),
)

# sail-sg/metaformer: metaformer_baselines.py.
_BASELINES = (
    Rule("stage{s}/downsample/conv", "downsample_layers.{s0}.conv", "conv"),
    Rule("stage1/downsample/norm", "downsample_layers.0.post_norm", "norm"),
    Rule("stage{s}/downsample/norm", "downsample_layers.{s0}.pre_norm", "norm"),
    Rule(f"{_BLOCK}/norm{{i}}", "stages.{s0}.{b0}.norm{i}", "norm"),
    Rule(f"{_BLOCK}/token_mixer/random_matrix",
         "stages.{s0}.{b0}.token_mixer.random_matrix", "same"),
    Rule(f"{_BLOCK}/token_mixer/pwconv{{i}}",
         "stages.{s0}.{b0}.token_mixer.pwconv{i}", "dense"),
    Rule(f"{_BLOCK}/token_mixer/act1",
         "stages.{s0}.{b0}.token_mixer.act1", "star_relu"),
    Rule(f"{_BLOCK}/token_mixer/dwconv",
         "stages.{s0}.{b0}.token_mixer.dwconv", "conv"),
    Rule(f"{_BLOCK}/token_mixer/qkv",
         "stages.{s0}.{b0}.token_mixer.qkv", "dense"),
    Rule(f"{_BLOCK}/token_mixer/proj",
         "stages.{s0}.{b0}.token_mixer.proj", "dense"),
    Rule(f"{_BLOCK}/layer_scale{{i}}",
         "stages.{s0}.{b0}.layer_scale{i}", "scale"),
    Rule(f"{_BLOCK}/res_scale{{i}}", "stages.{s0}.{b0}.res_scale{i}", "scale"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", "stages.{s0}.{b0}.mlp.fc{i}", "dense"),
    Rule(f"{_BLOCK}/mlp/act", "stages.{s0}.{b0}.mlp.act", "star_relu"),
    Rule("norm", "norm", "norm"),
    Rule("head", "head", "dense"),
    Rule("head/fc{i}", "head.fc{i}", "dense"),
    Rule("head/norm", "head.norm", "norm"),
)

_TIMM = "stages.{s0}.blocks.{b0}"

# timm: models/metaformer.py, for both papers. Dense layers are 1 x 1
# convolutions, except in stages with attention.
_METAFORMER_TIMM = (
    Rule("stage1/downsample/conv", "stem.conv", "conv"),
    Rule("stage1/downsample/norm", "stem.norm", "norm"),
    Rule("stage{s}/downsample/conv", "stages.{s0}.downsample.conv", "conv"),
    Rule("stage{s}/downsample/norm", "stages.{s0}.downsample.norm", "norm"),
    Rule(f"{_BLOCK}/norm{{i}}", f"{_TIMM}.norm{{i}}", "norm"),
    Rule(f"{_BLOCK}/token_mixer/pwconv{{i}}",
         f"{_TIMM}.token_mixer.pwconv{{i}}", "pointwise"),
    Rule(f"{_BLOCK}/token_mixer/act1", f"{_TIMM}.token_mixer.act1",
         "star_relu"),
    Rule(f"{_BLOCK}/token_mixer/dwconv", f"{_TIMM}.token_mixer.dwconv", "conv"),
    Rule(f"{_BLOCK}/token_mixer/qkv", f"{_TIMM}.token_mixer.qkv", "dense"),
    Rule(f"{_BLOCK}/token_mixer/proj", f"{_TIMM}.token_mixer.proj", "dense"),
    Rule(f"{_BLOCK}/layer_scale{{i}}", f"{_TIMM}.layer_scale{{i}}", "scale"),
    Rule(f"{_BLOCK}/res_scale{{i}}", f"{_TIMM}.res_scale{{i}}", "scale"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", f"{_TIMM}.mlp.fc{{i}}", "dense", _ATTENTION),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", f"{_TIMM}.mlp.fc{{i}}", "pointwise",
         f"not {_ATTENTION}"),
    Rule(f"{_BLOCK}/mlp/act", f"{_TIMM}.mlp.act", "star_relu"),
    Rule("norm", "head.norm", "norm"),
    Rule("head", "head.fc", "dense"),
    Rule("head/fc{i}", "head.fc.fc{i}", "dense"),
    Rule("head/norm", "head.fc.norm", "norm"),
)

# timm: models/vision_transformer.py and models/deit.py; the official DeiT
# (facebookresearch/deit, models.py) has the same keys.
_VIT = (
    Rule("patch_embed", "patch_embed.proj", "conv"),
    Rule("cls_token", "cls_token", "same"),
    Rule("dist_token", "dist_token", "same"),
    Rule("pos_embed", "pos_embed", "same"),
    Rule("block{b}/norm{i}", "blocks.{b0}.norm{i}", "norm"),
    Rule("block{b}/attn/qkv", "blocks.{b0}.attn.qkv", "dense"),
    Rule("block{b}/attn/proj", "blocks.{b0}.attn.proj", "dense"),
    Rule("block{b}/mlp/fc{i}", "blocks.{b0}.mlp.fc{i}", "dense"),
    Rule("norm", "norm", "norm"),
    Rule("head", "head", "dense"),
    Rule("head_dist", "head_dist", "dense"),
)


def _vit_huggingface(base: str, where: str) -> tuple[Rule, ...]:
  """Of a model without its heads, which is called `base`."""
  layer = f"{base}.encoder.layer.{{b0}}"
  attention = f"{layer}.attention.attention"
  return tuple(Rule(*rule, where) for rule in (
      ("patch_embed", f"{base}.embeddings.patch_embeddings.projection", "conv"),
      ("cls_token", f"{base}.embeddings.cls_token", "same"),
      ("pos_embed", f"{base}.embeddings.position_embeddings", "same"),
      ("block{b}/norm1", f"{layer}.layernorm_before", "norm"),
      ("block{b}/norm2", f"{layer}.layernorm_after", "norm"),
      ("block{b}/attn/qkv", (f"{attention}.query", f"{attention}.key",
                             f"{attention}.value"), "dense"),
      ("block{b}/attn/proj", f"{layer}.attention.output.dense", "dense"),
      ("block{b}/mlp/fc1", f"{layer}.intermediate.dense", "dense"),
      ("block{b}/mlp/fc2", f"{layer}.output.dense", "dense"),
      ("norm", f"{base}.layernorm", "norm")))


# Hugging Face transformers, as files have it: ViTForImageClassification,
# DeiTForImageClassification, DeiTForImageClassificationWithTeacher.
_VIT_HUGGINGFACE = (
    *_vit_huggingface("vit", "not dist_token"),
    *_vit_huggingface("deit", "dist_token"),
    Rule("dist_token", "deit.embeddings.distillation_token", "same"),
    Rule("head", "classifier", "dense", "not head_dist"),
    Rule("head", "cls_classifier", "dense", "head_dist"),
    Rule("head_dist", "distillation_classifier", "dense"),
)

# timm: models/mlp_mixer.py.
_MLP_MIXER = (
    Rule("patch_embed", "stem.proj", "conv"),
    Rule("block{b}/norm{i}", "blocks.{b0}.norm{i}", "norm"),
    Rule("block{b}/mlp_tokens/fc{i}", "blocks.{b0}.mlp_tokens.fc{i}", "dense"),
    Rule("block{b}/mlp_channels/fc{i}", "blocks.{b0}.mlp_channels.fc{i}",
         "dense"),
    Rule("norm", "norm", "norm"),
    Rule("head", "head", "dense"),
)

# timm: models/mlp_mixer.py.
_RESMLP_TIMM = (
    Rule("patch_embed", "stem.proj", "conv"),
    Rule("block{b}/norm{i}", "blocks.{b0}.norm{i}", "affine_1nc"),
    Rule("block{b}/linear_tokens", "blocks.{b0}.linear_tokens", "dense"),
    Rule("block{b}/mlp_channels/fc{i}", "blocks.{b0}.mlp_channels.fc{i}",
         "dense"),
    Rule("block{b}/ls{i}/scale", "blocks.{b0}.ls{i}", "same"),
    Rule("norm", "norm", "affine_1nc"),
    Rule("head", "head", "dense"),
)

# facebookresearch/deit: resmlp_models.py.
_RESMLP = (
    Rule("patch_embed", "patch_embed.proj", "conv"),
    Rule("block{b}/norm{i}", "blocks.{b0}.norm{i}", "affine"),
    Rule("block{b}/linear_tokens", "blocks.{b0}.attn", "dense"),
    Rule("block{b}/mlp_channels/fc{i}", "blocks.{b0}.mlp.fc{i}", "dense"),
    Rule("block{b}/ls{i}/scale", "blocks.{b0}.gamma_{i}", "same"),
    Rule("norm", "norm", "affine"),
    Rule("head", "head", "dense"),
)

# timm: models/resnet.py; torchvision's ResNet has the same keys.
_RESNET_STAGES = (
    Rule(f"{_BLOCK}/conv{{i}}", "layer{s}.{b0}.conv{i}", "conv"),
    Rule(f"{_BLOCK}/norm{{i}}", "layer{s}.{b0}.bn{i}", "norm"),
    Rule(f"{_BLOCK}/downsample/conv", "layer{s}.{b0}.downsample.0", "conv"),
    Rule(f"{_BLOCK}/downsample/norm", "layer{s}.{b0}.downsample.1", "norm"),
    Rule("head", "fc", "dense"),
)
_RESNET = (
    Rule("stem/conv", "conv1", "conv"),
    Rule("stem/norm", "bn1", "norm"),
    # The stem of three convolutions, as in timm's resnet50c.
    Rule("stem/conv1", "conv1.0", "conv"),
    Rule("stem/norm1", "conv1.1", "norm"),
    Rule("stem/conv2", "conv1.3", "conv"),
    Rule("stem/norm2", "conv1.4", "norm"),
    Rule("stem/conv3", "conv1.6", "conv"),
    Rule("stem/norm3", "bn1", "norm"),
    *_RESNET_STAGES,
)
# OpenMMLab's ResNet, and ResNetV1c with the stem of three convolutions:
# mmseg/models/backbones/resnet.py.
OPENMMLAB_RESNET = (
    *(Rule(f"stem/{name}{i}", f"stem.{3 * (i - 1) + at}", kind)
      for i in range(1, 4)
      for at, (name, kind) in enumerate((("conv", "conv"), ("norm", "norm")))),
    *_RESNET,
)

_RESNET_LAYER = "resnet.encoder.stages.{s0}.layers.{b0}"

# Hugging Face transformers: ResNetForImageClassification.
_RESNET_HUGGINGFACE = (
    Rule("stem/conv", "resnet.embedder.embedder.convolution", "conv"),
    Rule("stem/norm", "resnet.embedder.embedder.normalization", "norm"),
    Rule(f"{_BLOCK}/conv{{i}}", f"{_RESNET_LAYER}.layer.{{i0}}.convolution",
         "conv"),
    Rule(f"{_BLOCK}/norm{{i}}", f"{_RESNET_LAYER}.layer.{{i0}}.normalization",
         "norm"),
    Rule(f"{_BLOCK}/downsample/conv", f"{_RESNET_LAYER}.shortcut.convolution",
         "conv"),
    Rule(f"{_BLOCK}/downsample/norm", f"{_RESNET_LAYER}.shortcut.normalization",
         "norm"),
    Rule("head", "classifier.1", "dense"),
)

# whai362/PVT: classification/pvt.py.
_PVT = (
    Rule("stage{s}/patch_embed/conv", "patch_embed{s}.proj", "conv"),
    Rule("stage{s}/patch_embed/norm", "patch_embed{s}.norm", "norm"),
    Rule("stage{s}/pos_embed", "pos_embed{s}", "same"),
    Rule("stage4/cls_token", "cls_token", "same"),
    Rule(f"{_BLOCK}/norm{{i}}", "block{s}.{b0}.norm{i}", "norm"),
    Rule(f"{_BLOCK}/attn/q", "block{s}.{b0}.attn.q", "dense"),
    Rule(f"{_BLOCK}/attn/kv", "block{s}.{b0}.attn.kv", "dense"),
    Rule(f"{_BLOCK}/attn/proj", "block{s}.{b0}.attn.proj", "dense"),
    Rule(f"{_BLOCK}/attn/sr", "block{s}.{b0}.attn.sr", "conv"),
    Rule(f"{_BLOCK}/attn/norm", "block{s}.{b0}.attn.norm", "norm"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", "block{s}.{b0}.mlp.fc{i}", "dense"),
    Rule("norm", "norm", "norm"),
    Rule("head", "head", "dense"),
)

_PVT_LAYER = "pvt.encoder.block.{s0}.{b0}"
_PVT_EMBED = "pvt.encoder.patch_embeddings.{s0}"

# Hugging Face transformers: PvtForImageClassification.
_PVT_HUGGINGFACE = (
    Rule("stage{s}/patch_embed/conv", f"{_PVT_EMBED}.projection",
         "conv"),
    Rule("stage{s}/patch_embed/norm", f"{_PVT_EMBED}.layer_norm",
         "norm"),
    Rule("stage{s}/pos_embed", f"{_PVT_EMBED}.position_embeddings",
         "same"),
    Rule("stage{s}/cls_token", f"{_PVT_EMBED}.cls_token", "same"),
    Rule(f"{_BLOCK}/norm{{i}}", f"{_PVT_LAYER}.layer_norm_{{i}}", "norm"),
    Rule(f"{_BLOCK}/attn/q", f"{_PVT_LAYER}.attention.self.query", "dense"),
    Rule(f"{_BLOCK}/attn/kv", (f"{_PVT_LAYER}.attention.self.key",
                               f"{_PVT_LAYER}.attention.self.value"),
         "dense"),
    Rule(f"{_BLOCK}/attn/proj", f"{_PVT_LAYER}.attention.output.dense",
         "dense"),
    Rule(f"{_BLOCK}/attn/sr",
         f"{_PVT_LAYER}.attention.self.sequence_reduction", "conv"),
    Rule(f"{_BLOCK}/attn/norm", f"{_PVT_LAYER}.attention.self.layer_norm",
         "norm"),
    Rule(f"{_BLOCK}/mlp/fc{{i}}", f"{_PVT_LAYER}.mlp.dense{{i}}", "dense"),
    Rule("norm", "pvt.encoder.layer_norm", "norm"),
    Rule("head", "classifier", "dense"),
)


# ModelSpec.family -> layout -> rules.
RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "poolformer": {"official": _POOLFORMER, "timm": _METAFORMER_TIMM,
                   "huggingface": _POOLFORMER_HUGGINGFACE},
    "metaformer_baselines": {"official": _BASELINES, "timm": _METAFORMER_TIMM},
    "vit": {"timm": _VIT, "huggingface": _VIT_HUGGINGFACE},
    "mlp_mixer": {"timm": _MLP_MIXER},
    "resmlp": {"timm": _RESMLP_TIMM, "official": _RESMLP},
    "resnet": {"timm": _RESNET, "huggingface": _RESNET_HUGGINGFACE},
    "pvt": {"official": _PVT, "huggingface": _PVT_HUGGINGFACE},
}

_BASE = re.compile(r"(poolformer|vit|deit|resnet|pvt)\.")


def _base(rule: Rule) -> Rule:
  """The rule of a model without its head, as PoolFormerModel.

  Its names are those that begin with "poolformer." in the whole model.
  """
  keys = (rule.key,) if isinstance(rule.key, str) else rule.key
  return rule._replace(key=tuple(
      _BASE.sub("", key, count=1) for key in keys if _BASE.match(key)))


# The same for layouts that are only read.
READ_ONLY = {
    family: {"huggingface_base": tuple(map(_base, known["huggingface"]))}
    for family, known in RULES.items() if "huggingface" in known}
READ_ONLY["resnet"]["openmmlab"] = OPENMMLAB_RESNET

# Tensors that no classifier uses: of the pooler of ViTModel and DeiTModel, and
# of pretraining on masked images.
UNUSED = re.compile(r"((vit|deit)\.)?(pooler\.dense\.(weight|bias)"
                    r"|embeddings\.mask_token)")
