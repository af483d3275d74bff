"""The model types of Hugging Face transformers: keys, and our settings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from metaformer_jax.config import conversion
from metaformer_jax.models import registry, settings, spec

# The content of a config.json.
Config = Mapping[str, Any]

# Our activations by their names there.
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "relu2": "squared_relu",
                "silu": "silu", "swish": "silu"}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()
                     if theirs != "swish"}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A model type of transformers.

  Attributes:
    row: of our table; what transformers cannot vary is as in it.
    classes: a folder's "architectures" -> hyper-parameters that they fix; None
      for a model without a head.
    defaults: the keys that say what the model computes, with transformers'
      values for a file that omits them.
    same: our hyper-parameters with the same meaning, by their keys.
    to_ours, to_theirs: the other ones; from all keys, from all settings.
    n_labels: classes if a file does not say how many.
    is_sized: whether it only takes images of the key image_size.
  """

  row: str
  classes: Mapping[str, Mapping[str, Any] | None]
  defaults: Config
  same: Mapping[str, str]
  to_ours: Callable[[Config], dict[str, Any]]
  to_theirs: Callable[[Any], dict[str, Any]]
  n_labels: int = 2
  is_sized: bool = True

  @property
  def spec(self) -> spec.ModelSpec:
    return registry.get_spec(self.row)

  def ours(self, config: Config) -> settings.Family:
    """The settings of a config with all keys."""
    same = {ours: config[theirs] for theirs, ours in self.same.items()}
    return self.spec.override(**same, **self.to_ours(config))

  def theirs(self, ours: settings.Family) -> dict[str, Any]:
    """Inverse of `ours`."""
    return {"num_channels": 3, **self.to_theirs(ours),
            **{key: getattr(ours, name) for key, name in self.same.items()}}


def ratio(part: int, whole: int) -> float:
  """A number of which int(whole * number) is the part."""
  whole = max(whole, 1)
  found = part / whole
  return found if int(whole * found) == part else (part + 0.5) / whole


def _poolformer_to_ours(config: Config) -> dict[str, Any]:
  if not config["mlp_ratio"]:  # Ours has no MLPs then, and half of the norms.
    raise ValueError("mlp_ratio: 0 is not above 0")
  # Without LayerScale its initial value means nothing; ours of 0 is none.
  initial = config["layer_scale_init_value"] or 1e-5
  return {"in_patch_size": config["patch_sizes"][0],
          "in_stride": config["strides"][0], "in_pad": config["padding"][0],
          "token_mixers": ("pooling",) * len(config["depths"]),
          "activation": _ACTIVATIONS.get(config["hidden_act"], "gelu"),
          "layer_scale_init": initial if config["use_layer_scale"] else 0.0}


def _poolformer_to_theirs(ours: settings.MetaFormer) -> dict[str, Any]:
  n = len(ours.depths)
  return {"num_encoder_blocks": n,
          "patch_sizes": (ours.in_patch_size, *(3,) * (n - 1)),
          "strides": (ours.in_stride, *(2,) * (n - 1)),
          "padding": (ours.in_pad, *(1,) * (n - 1)),
          "hidden_act": _ACTIVATION_NAMES.get(ours.activation),
          "use_layer_scale": bool(ours.layer_scale_init),
          "layer_scale_init_value": ours.layer_scale_init or 1e-5}


_POOLFORMER = Kind(
    row="poolformer_s12",
    classes={"PoolFormerForImageClassification": {}, "PoolFormerModel": None},
    defaults={
        "num_channels": 3, "pool_size": 3, "mlp_ratio": 4.0,
        "depths": (2, 2, 6, 2), "hidden_sizes": (64, 128, 320, 512),
        "num_encoder_blocks": 4, "patch_sizes": (7, 3, 3, 3),
        "strides": (4, 2, 2, 2), "padding": (2, 1, 1, 1), "hidden_act": "gelu",
        "use_layer_scale": True, "layer_scale_init_value": 1e-5},
    same={"pool_size": "pool_size", "mlp_ratio": "mlp_ratio",
          "depths": "depths", "hidden_sizes": "dims"},
    to_ours=_poolformer_to_ours, to_theirs=_poolformer_to_theirs,
    is_sized=False)


def _vit(row: str, classes: Mapping[str, Mapping[str, Any] | None]) -> Kind:
  return Kind(
      row=row, classes=classes,
      defaults={
          "num_channels": 3, "hidden_size": 768, "num_hidden_layers": 12,
          "num_attention_heads": 12, "intermediate_size": 3072,
          "hidden_act": "gelu", "layer_norm_eps": 1e-12, "patch_size": 16,
          "qkv_bias": True},
      same={"hidden_size": "dim", "num_hidden_layers": "depth",
            "num_attention_heads": "n_heads", "layer_norm_eps": "norm_eps",
            "patch_size": "patch_size"},
      to_ours=lambda config: {"mlp_ratio": ratio(
          config["intermediate_size"], config["hidden_size"])},
      to_theirs=lambda ours: {
          "intermediate_size": int(ours.dim * ours.mlp_ratio),
          "hidden_act": "gelu", "qkv_bias": True})


def _resnet_to_ours(config: Config) -> dict[str, Any]:
  kind = config["layer_type"]
  if kind not in settings.RESNET_BLOCKS:
    raise ValueError(f"layer_type: {conversion.shown(kind)} is not one of "
                     f"{', '.join(settings.RESNET_BLOCKS)}")
  _, (*_, expansion), _ = settings.RESNET_BLOCKS[kind]
  return {"widths": tuple(n // expansion for n in config["hidden_sizes"])}


def _resnet_to_theirs(ours: settings.ResNet) -> dict[str, Any]:
  return {"hidden_sizes": tuple(n for _, n in ours.feature_info().values()),
          "embedding_size": ours.widths[0], "hidden_act": "relu",
          "downsample_in_first_stage": False, "downsample_in_bottleneck": False}


_RESNET = Kind(
    row="resnet50",
    classes={"ResNetForImageClassification": {}, "ResNetModel": None},
    defaults={
        "num_channels": 3, "embedding_size": 64,
        "hidden_sizes": (256, 512, 1024, 2048), "depths": (3, 4, 6, 3),
        "layer_type": "bottleneck", "hidden_act": "relu",
        "downsample_in_first_stage": False, "downsample_in_bottleneck": False},
    same={"depths": "depths", "layer_type": "block"},
    to_ours=_resnet_to_ours, to_theirs=_resnet_to_theirs, is_sized=False)


def _pvt_to_theirs(ours: settings.PyramidVisionTransformer) -> dict[str, Any]:
  sides = (ours.patch_size, *(2,) * (len(ours.depths) - 1))
  # Newer versions take whole ratios only.
  ratios = tuple(int(r) if r == int(r) else r for r in ours.mlp_ratios)
  return {"num_encoder_blocks": len(ours.depths), "mlp_ratios": ratios,
          "patch_sizes": sides, "strides": sides, "hidden_act": "gelu"}


_PVT = Kind(
    row="pvt_tiny",
    classes={"PvtForImageClassification": {}, "PvtModel": None},
    defaults={
        "num_channels": 3, "num_encoder_blocks": 4, "depths": (2, 2, 2, 2),
        "sequence_reduction_ratios": (8, 4, 2, 1),
        "hidden_sizes": (64, 128, 320, 512), "patch_sizes": (4, 2, 2, 2),
        "strides": (4, 2, 2, 2), "num_attention_heads": (1, 2, 5, 8),
        "mlp_ratios": (8, 8, 4, 4), "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "qkv_bias": True},
    same={"depths": "depths", "sequence_reduction_ratios": "sr_ratios",
          "hidden_sizes": "dims", "num_attention_heads": "n_heads",
          "layer_norm_eps": "norm_eps", "qkv_bias": "qkv_bias"},
    to_ours=lambda config: {"mlp_ratios": config["mlp_ratios"],
                            "patch_size": config["patch_sizes"][0],
                            "embed_norm_eps": config["layer_norm_eps"]},
    to_theirs=_pvt_to_theirs, n_labels=1000)

KINDS: dict[str, Kind] = {
    "poolformer": _POOLFORMER,
    "vit": _vit("vit_base_patch16_224", {
        "ViTForImageClassification": {}, "ViTModel": None}),
    "deit": _vit("deit_base_distilled_patch16_224", {
        "DeiTForImageClassification": {"dist_head": False},
        "DeiTForImageClassificationWithTeacher": {}, "DeiTModel": None}),
    "resnet": _RESNET,
    "pvt": _PVT,
}
