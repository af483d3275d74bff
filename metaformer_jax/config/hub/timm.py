"""The config.json that timm writes for a hub, and our experiment."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import conversion
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry, settings, spec

log = logging.getLogger(__name__)

# The rows of our table that timm has by the same name, or by the one without
# the end that says how they were trained.
_ARCHITECTURES = re.compile(
    r"((?:poolformer|poolformerv2|convformer|caformer)_[sbm]\d+|resnet\d+"
    r"|(?:vit|deit)_\w+|mixer_b16_224|resmlp_(?:12|24|big_24)_224)"
    r"(?:_384)?(?:_in21k|_in21ft1k)?")

# Of a model's family: the first convolution, the classifier, and the pooling
# before it.
_LAYERS = {
    "poolformer": ("stem.conv", "head.fc", "avg"),
    "metaformer_baselines": ("stem.conv", "head.fc", "avg"),
    "vit": ("patch_embed.proj", "head", "token"),
    "mlp_mixer": ("stem.proj", "head", "avg"),
    "resmlp": ("stem.proj", "head", "avg"),
    "resnet": ("conv1", "fc", "avg"),
}

# Our hyper-parameters by the arguments of timm's models that can vary them.
_ARGUMENTS = {
    "vit": {"patch_size": "patch_size", "embed_dim": "dim", "depth": "depth",
            "num_heads": "n_heads", "mlp_ratio": "mlp_ratio"},
    "mlp_mixer": {"mlp_ratio": "mlp_ratio"},
    "resnet": {"layers": "depths"},
}

# A setting of a family that is written although timm computes something else.
APPROXIMATE = ("poolformer", "head_norm_first")

# Arguments that do not change what trained weights compute.
_IGNORED = re.compile(
    r"num_classes|img_size|(\w+_)?drop(_path|_block)?_rate|scriptable|no_jit"
    r"|exportable|dynamic_img_size|strict_img_size")


def _settings(row: spec.ModelSpec) -> settings.Family:
  """What timm computes: PoolFormer's head takes the mean before the norm."""
  changed = {"head_norm_first": False} if row.family == "poolformer" else {}
  return row.override(**changed)


def read(config: Mapping[str, Any],
         wanted: str | None = None) -> dict[str, Any]:
  """The sections "model", "task" and "data" of a config.json.

  Args:
    config: its content; older files have what is in "pretrained_cfg" at the
      top level.
    wanted: not used, as "architecture" is the model's name.

  Raises:
    ValueError: what is wrong, or cannot be expressed, in one line.
  """
  del wanted
  row = _row(config["architecture"])
  made = config.get("pretrained_cfg", config)
  arguments = config.get("model_args") or {}
  for key, value in (("pretrained_cfg", made), ("model_args", arguments)):
    if not isinstance(value, dict):
      raise ValueError(f"{key}: {conversion.shown(value)} is not a section of "
                       "keys")
  _check(row, made, arguments)
  changed = {ours: arguments[theirs] for theirs, ours in _ARGUMENTS.get(
      row.family, {}).items() if theirs in arguments}
  if _settings(row) != row.settings:
    changed["head_norm_first"] = False
  n = next((found["num_classes"] for found in (arguments, config, made)
            if found.get("num_classes") is not None), row.num_classes)
  if config.get("architectures") == ["TimmWrapperModel"]:  # Of transformers.
    n = 0
  if type(n) is not int or n < 0:
    raise ValueError(f"num_classes: {conversion.shown(n)} is not a number of "
                     "classes")
  size = _side("img_size", arguments.get("img_size")) or _side(
      "input_size", made.get("input_size"))
  task = {"num_classes": n, "class_names": _names(config, made, n),
          "image_size": size, "crop_pct": made.get("crop_pct"),
          "interpolation": made.get("interpolation")}
  return {"model": {"name": row.name, **changed}, "task": task,
          "data": {key: made.get(key) for key in ("mean", "std")}}


def keys(config: Mapping[str, Any]) -> dict[str, str]:
  """The arguments of our hyper-parameters, for messages."""
  return {ours: theirs for theirs, ours in _ARGUMENTS.get(
      _row(config["architecture"]).family, {}).items()}


def _row(architecture: Any) -> spec.ModelSpec:
  """The row of an architecture, with or without the tag of its weights."""
  known = [name for name in registry.list_models()
           if _ARCHITECTURES.fullmatch(name)]
  name = str(architecture).partition(".")[0]
  if name not in known:
    raise ValueError(f"architecture: {conversion.shown(architecture)} is not "
                     f"one of this package{errors.did_you_mean(name, known)}")
  return registry.get_spec(name)


def _check(row: spec.ModelSpec, made: Mapping[str, Any],
           arguments: Mapping[str, Any]) -> None:
  """ValueError names what cannot be expressed."""
  size, (*_, pool) = made.get("input_size"), _LAYERS[row.family]
  only = {"in_chans": 3, "global_pool": pool, "crop_mode": "center",
          "channels of input_size": 3}
  given = {**{key: arguments.get(key) for key in ("in_chans", "global_pool")},
           "crop_mode": made.get("crop_mode"),
           "channels of input_size": (
               size[0] if isinstance(size, list) and size else None)}
  problems = [f"{key}: {conversion.shown(value)} cannot be expressed here, "
              f"only {only[key]}" for key, value in given.items()
              if value not in (None, only[key])]
  known = {"in_chans", "global_pool", *_ARGUMENTS.get(row.family, {})}
  problems += [f"model_args: {key}={conversion.shown(value)} cannot be "
               "expressed here" for key, value in arguments.items()
               if key not in known and not _IGNORED.fullmatch(key)]
  if problems:
    raise ValueError("; ".join(problems))


def _side(key: str, value: Any) -> int | None:
  """Of a square, of which timm writes (channels,) height, width."""
  sides = value[-2:] if isinstance(value, list) else [value, value]
  if value is not None and (
      len(sides) != 2 or sides[0] != sides[1] or type(sides[0]) is not int):
    raise ValueError(f"{key}: {conversion.shown(value)} is not the size of "
                     "square images")
  return sides[0]


def _names(config: Mapping[str, Any], made: Mapping[str, Any],
           n: int) -> list[str] | None:
  """The names of n classes: a list, or {number: name}, which may have gaps."""
  names = config.get("label_names", made.get(
      "label_names", made.get("labels")))
  if names is None or not n:
    return None
  if isinstance(names, dict):
    if not {*map(str, range(n))} <= names.keys():
      log.warning("label_names: has no names for some of the %d classes: none "
                  "is used", n)
      return None
    names = [names[str(i)] for i in range(n)]
  if not isinstance(names, list) or len(names) != n or not all(
      isinstance(name, str) for name in names):
    raise ValueError(f"label_names: {conversion.shown(names)} are not the "
                     f"names of {n} classes")
  return names


def write(cfg: Experiment, in_chans: int) -> dict[str, Any]:
  """The config.json of a classifier.

  Args:
    cfg: the experiment that made it, complete.
    in_chans: channels of its images.

  Raises:
    ValueError: timm cannot build the model from a file; in one line.
  """
  row, task = registry.get_spec(cfg.model.name), cfg.task
  found = _ARCHITECTURES.fullmatch(row.name)
  if not found:
    raise ValueError(f"name: {row.name} is not a model of timm")
  name, ours = found[1], row.override(**cfg.model.overrides())
  base = _settings(registry.get_spec(name))
  arguments = {theirs: getattr(ours, key) for theirs, key in _ARGUMENTS.get(
      row.family, {}).items() if getattr(ours, key) != getattr(base, key)}
  lost = [f.name for f in dataclasses.fields(ours)
          if f.metadata["role"] != "training" and not _same(
              row.family, f.name, getattr(ours, f.name), getattr(base, f.name))
          and f.name not in _ARGUMENTS.get(row.family, {}).values()]
  if lost:
    raise ValueError("; ".join(
        f"{key}: {conversion.shown(getattr(ours, key))}" for key in lost))
  first_conv, classifier, _ = _LAYERS[row.family]
  if getattr(ours, "head", None) == "mlp":
    classifier += ".fc2"
  if getattr(ours, "distilled", False):
    classifier = [classifier, f"{classifier}_dist"]
  return {
      "architecture": name, "num_classes": task.num_classes,
      **({"label_names": task.class_names} if task.class_names else {}),
      **({"model_args": arguments} if arguments else {}),
      "pretrained_cfg": {
          "custom_load": False,
          "input_size": [in_chans, task.image_size, task.image_size],
          "fixed_input_size": isinstance(ours, settings.OneStage),
          "interpolation": task.interpolation, "crop_pct": task.crop_pct,
          "crop_mode": "center", "mean": cfg.data.mean, "std": cfg.data.std,
          "num_classes": task.num_classes, "first_conv": first_conv,
          "classifier": classifier}}


def _same(family: str, key: str, one: Any, other: Any) -> bool:
  """Whether a setting has the same effect on trained weights as another."""
  if (family, key) == APPROXIMATE:
    return True
  if key.endswith("_init"):  # Only whether there is anything to initialise.
    one, other = (tuple(map(bool, value)) if isinstance(value, tuple)
                  else bool(value) for value in (one, other))
  return one == other
