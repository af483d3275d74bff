"""The config.json of Hugging Face transformers, and our hyper-parameters.

Reading and writing check each other: what one direction loses, the way back
does not restore, and is reported.
"""

import dataclasses
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

from metaformer_jax.config import conversion
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry, settings, spec

log = logging.getLogger(__name__)

Config = Mapping[str, Any]

# Our activations by their names there.
_ACTIVATIONS = {"gelu": "gelu", "relu": "relu", "relu2": "squared_relu",
                "silu": "silu", "swish": "silu"}
_ACTIVATION_NAMES = {ours: theirs for theirs, ours in _ACTIVATIONS.items()
                     if theirs != "swish"}

# Keys that do not change what trained weights compute.
IGNORED = (
    # They are read elsewhere.
    "architectures", "model_type", "id2label", "label2id", "num_labels",
    "image_size",
    # Of training.
    "attention_probs_dropout_prob", "drop_path_rate", "hidden_dropout_prob",
    "initializer_range", "finetuning_task", "problem_type",
    # Of models that are no classifiers; or never used.
    "encoder_stride", "out_features", "out_indices", "patch_size", "pooler_act",
    "pooler_output_size", "stage_names", "stride",
    # Of how a program runs, and where the file comes from.
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
    "attn_implementation", "dtype", "name_or_path", "output_attentions",
    "output_hidden_states", "return_dict", "torch_dtype", "torchscript",
    "transformers_version", "use_bfloat16", "use_cache",
    # Of language models: older versions write them for all.
    "add_cross_attention", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "is_decoder", "is_encoder_decoder",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings",
)

# A setting that is written although transformers computes another value: PVT's
# one epsilon of all norms, which the official code has in most of them only.
APPROXIMATE = ("embed_norm_eps",)

# Initial values: they are kept, but need not be the same after both directions.
_INITIAL = ("layer_scale_init_value",)


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


def read(config: Config, wanted: str | None = None) -> dict[str, Any]:
  """The sections "model" and "task" of a config.json.

  Args:
    config: its content.
    wanted: name of the model, if the caller knows it; by default the row of
      our table with most of the settings.

  Raises:
    ValueError: what is wrong, or cannot be expressed, in one line.
  """
  name = config["model_type"]
  if name not in [*KINDS]:
    raise ValueError(f"model_type: {conversion.shown(name)} is not one of "
                     f"{', '.join(KINDS)}")
  kind = KINDS[name]
  fixed, has_head = _of_class(kind, config)
  given = {key: _convert(key, config[key], default) if key in config else
           default for key, default in kind.defaults.items()}
  ours = dataclasses.replace(kind.ours(given), **fixed)
  problems = [f"{key}: {conversion.shown(config[key])} is not a known setting"
              for key in config if key not in (*kind.defaults, *IGNORED)]
  back = kind.theirs(ours)
  problems += [
      f"{key}: {conversion.shown(value)} cannot be expressed here, only "
      f"{conversion.shown(back[key])}" for key, value in given.items()
      if back[key] != value and key not in _INITIAL]
  if problems:
    raise ValueError("; ".join(problems))
  name, overrides = _nearest(kind, ours, wanted)
  n, names = _labels(config, kind.n_labels) if has_head else (0, None)
  task = {"num_classes": n, "class_names": names}
  if kind.is_sized:
    task["image_size"] = _convert(
        "image_size", config.get("image_size", 224), 224)
  return {"model": {"name": name, **overrides}, "task": task}


def keys(config: Config) -> dict[str, str]:
  """The keys of our hyper-parameters, for messages."""
  return {ours: theirs for theirs, ours in KINDS[
      config["model_type"]].same.items()}


def _of_class(kind: Kind, config: Config) -> tuple[Mapping[str, Any], bool]:
  """What the class of the folder's model fixes, and whether it has a head."""
  names = config.get("architectures") or [next(iter(kind.classes))]
  if not (isinstance(names, list) and len(names) == 1
          and names[0] in [*kind.classes]):
    raise ValueError(f"architectures: {conversion.shown(names)} is not one of "
                     f"{', '.join(kind.classes)}")
  fixed = kind.classes[names[0]]
  return fixed or {}, fixed is not None


def _convert(key: str, value: Any, default: Any) -> Any:
  """A value of JSON in the form of the default; ValueError if it is another."""
  numbers = (int,) if isinstance(default, int) else (int, float)

  def is_number(n, types=(int, float)):
    return type(n) in types and abs(n) < 2**31

  if isinstance(default, bool):
    fits = isinstance(value, bool)
  elif isinstance(default, str):
    fits = isinstance(value, str)
  elif isinstance(default, tuple):
    fits = isinstance(value, list) and value and all(map(is_number, value))
    value = tuple(value) if fits else value
  else:
    if isinstance(value, list) and value and value[:1] * 2 == value:
      value = value[0]  # Height and width of a square.
    fits = is_number(value, numbers)
  if not fits:
    raise ValueError(f"{key}: {conversion.shown(value)} is not like "
                     f"{conversion.shown(default)}")
  return "silu" if (key, value) == ("hidden_act", "swish") else value


def _nearest(kind: Kind, ours: settings.Family,
             wanted: str | None) -> tuple[str, dict[str, Any]]:
  """The row with most of the settings, and the others."""
  rows = {name: registry.get_spec(name) for name in (
      kind.row, *registry.list_models())}
  rows = {name: row for name, row in rows.items()
          if row.family == kind.spec.family}
  if wanted in rows:
    rows = {wanted: rows[wanted]}

  def different(name):
    return {key: value for key, value in vars(ours).items()
            if value != getattr(rows[name].settings, key)}

  best = min(rows, key=lambda name: len(different(name)))
  return best, different(best)


def _labels(config: Config, default: int) -> tuple[int, list[str] | None]:
  """Number of the classes, and their names unless they are only numbers."""
  labels, n = config.get("id2label"), config.get("num_labels")
  if n is not None and (type(n) is not int or n < 0):
    raise ValueError(f"num_labels: {conversion.shown(n)} is not a number of "
                     "classes")
  if labels is None:
    return default if n is None else n, None
  if not isinstance(labels, dict) or not all(
      isinstance(name, str) for name in labels.values()):
    raise ValueError(f"id2label: {conversion.shown(labels)} does not map "
                     "numbers to names")
  if n not in (None, len(labels)):
    if config["model_type"] == "pvt":  # Of it only, num_labels decides.
      log.warning("id2label has %d names, but num_labels is %d: the names are "
                  "not used", len(labels), n)
      return n, None
    raise ValueError(f"num_labels: {n}, but id2label has {len(labels)} names")
  by_number = {}
  for key, name in labels.items():
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
      raise ValueError(f"id2label: {conversion.shown(key)} is not the number "
                       "of a class")
    by_number[int(key)] = name
  absent = sorted(set(range(len(labels))) - by_number.keys())
  if absent:
    raise ValueError(f"id2label: has {len(labels)} names, but none for the "
                     f"class {absent[0]}")
  names = [by_number[i] for i in range(len(labels))]
  plain = names == [f"LABEL_{i}" for i in range(len(names))]
  return len(names), None if plain else names


def write(cfg: Experiment, in_chans: int) -> dict[str, Any]:
  """The config.json of a classifier; of the classes, the one that fits best.

  Args:
    cfg: the experiment that made it, complete.
    in_chans: channels of its images.

  Raises:
    ValueError: no class can express the hyper-parameters; in one line.
  """
  row = registry.get_spec(cfg.model.name)
  ours = row.override(**cfg.model.overrides())
  found = [(_lost(kind, fixed, ours), model_type, name)
           for model_type, kind in KINDS.items()
           for name, fixed in kind.classes.items()
           if fixed is not None and kind.spec.family == row.family]
  lost, model_type, name = min(found, key=lambda item: len(item[0]),
                               default=(None,) * 3)
  if not found:
    raise ValueError(f"name: {row.name} is not a model of transformers")
  if lost:
    raise ValueError("; ".join(
        f"{key}: {conversion.shown(getattr(ours, key))}" for key in lost))
  names = cfg.task.class_names or [
      f"LABEL_{i}" for i in range(cfg.task.num_classes)]
  kind, labels = KINDS[model_type], dict(enumerate(names))
  return {**kind.theirs(ours), "num_channels": in_chans,
          "architectures": [name], "model_type": model_type,
          "id2label": labels, "label2id": {n: i for i, n in labels.items()},
          **({"num_labels": len(labels)} if model_type == "pvt" else {}),
          **({"image_size": cfg.task.image_size} if kind.is_sized else {})}


def _lost(kind: Kind, fixed: Mapping[str, Any],
          ours: settings.Family) -> list[str]:
  """The settings that a class of models cannot express."""
  config = kind.theirs(ours)
  back = dataclasses.replace(kind.ours(config), **fixed)
  broken = [key for key, value in config.items() if isinstance(value, tuple)
            and any(type(n) is not int for n in value)]
  lost = [f.name for f in dataclasses.fields(ours)
          if f.metadata["role"] != "training" and f.name not in APPROXIMATE
          and getattr(back, f.name) != getattr(ours, f.name)]
  # Ratios that round to the same width are the same.
  is_width = "intermediate_size" in kind.defaults
  return broken + [key for key in lost if not (key == "mlp_ratio" and is_width)]
