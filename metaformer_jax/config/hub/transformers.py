"""The config.json of Hugging Face transformers, and our experiment.

Reading and writing check each other: what one direction loses, the way back
does not restore, and is reported.
"""

import dataclasses
import logging
import re
from collections.abc import Mapping
from typing import Any

from metaformer_jax.config import conversion, imagenet
from metaformer_jax.config.hub import kinds
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry, settings

log = logging.getLogger(__name__)

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


def read(config: kinds.Config, wanted: str | None = None) -> dict[str, Any]:
  """The sections "model" and "task" of a config.json.

  Args:
    config: its content.
    wanted: name of the model, if the caller knows it; by default the row of
      our table with most of the settings.

  Raises:
    ValueError: what is wrong, or cannot be expressed, in one line.
  """
  name = config["model_type"]
  if name not in [*kinds.KINDS]:
    raise ValueError(f"model_type: {conversion.shown(name)} is not one of "
                     f"{', '.join(kinds.KINDS)}")
  kind = kinds.KINDS[name]
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


def keys(config: kinds.Config) -> dict[str, str]:
  """The keys of our hyper-parameters, for messages."""
  return {ours: theirs for theirs, ours in kinds.KINDS[
      config["model_type"]].same.items()}


def _of_class(kind: kinds.Kind,
              config: kinds.Config) -> tuple[Mapping[str, Any], bool]:
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


def _nearest(kind: kinds.Kind, ours: settings.Family,
             wanted: str | None) -> tuple[str, dict[str, Any]]:
  """Of the rows that the type can express, the nearest; and what differs."""
  rows = {name: registry.get_spec(name) for name in (
      kind.row, *registry.list_models())}
  rows = {name: row for name, row in rows.items()
          if row.family == kind.spec.family
          and not _lost(kind, {}, row.settings)}
  if wanted in rows:
    rows = {wanted: rows[wanted]}

  def different(name):
    return {key: value for key, value in vars(ours).items()
            if value != getattr(rows[name].settings, key)}

  best = min(rows, key=lambda name: len(different(name)))
  return best, different(best)


def _labels(config: kinds.Config, default: int) -> tuple[int, list[str] | None]:
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
  return len(names), None if plain else list(imagenet.recognized(names))


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
           for model_type, kind in kinds.KINDS.items()
           for name, fixed in kind.classes.items()
           if fixed is not None and kind.spec.family == row.family]
  if not found:
    raise ValueError(f"name: {row.name} is not a model of transformers")
  lost, model_type, name = min(found, key=lambda item: len(item[0]))
  if lost:
    raise ValueError("; ".join(
        f"{key}: {conversion.shown(getattr(ours, key))}" for key in lost))
  names = cfg.task.class_names or [
      f"LABEL_{i}" for i in range(cfg.task.num_classes)]
  if tuple(names) == imagenet.ids():
    names = imagenet.synonyms()
  kind, labels = kinds.KINDS[model_type], dict(enumerate(names))
  return {**kind.theirs(ours), "num_channels": in_chans,
          "architectures": [name], "model_type": model_type,
          "id2label": labels, "label2id": {n: i for i, n in labels.items()},
          **({"num_labels": len(labels)} if model_type == "pvt" else {}),
          **({"image_size": cfg.task.image_size} if kind.is_sized else {})}


def _lost(kind: kinds.Kind, fixed: Mapping[str, Any],
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
