"""What a folder of transformers or timm holds: a config.json and weights."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import json_data, tasks, typed
from metaformer_jax.config.hub import card, processor, timm, transformers
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import registry

# The file of the weights that this package writes too.
WEIGHTS = "model.safetensors"

_CONFIG, _PROCESSOR = "config.json", "preprocessor_config.json"

# Files of weights; an index names several. The first that exists is read.
_WEIGHTS = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin",
            "pytorch_model.bin.index.json")

# The layouts that have folders: how each writes its config.json.
_WRITERS = {"huggingface": transformers.write, "timm": timm.write}
LAYOUTS = tuple(_WRITERS)


def is_part(name: str) -> bool:
  """Whether a folder's file of this name may be read."""
  return name in (_CONFIG, _PROCESSOR) or bool(re.fullmatch(
      r"(model.*\.safetensors|pytorch_model.*\.bin)(\.index\.json)?", name))


def _config(path: pathlib.Path) -> dict[str, Any] | None:
  """The config.json of a folder, if transformers or timm wrote it.

  It has a key that a run's has not. One that cannot be read is not theirs.
  """
  try:
    content = json_data.read(path / _CONFIG)
  except (OSError, ValueError):
    return None
  is_theirs = isinstance(content, dict) and not (
      {"architecture", "model_type"}.isdisjoint(content))
  return content if is_theirs else None


def is_folder(path: pathlib.Path) -> bool:
  """Whether a folder has a config.json of transformers or timm."""
  return _config(path) is not None


def read(path: pathlib.Path, model: str | None = None) -> Experiment:
  """The experiment of a classifier, as far as a folder describes it.

  What it does not say of the preprocessing is as in the model's row.

  Args:
    path: of which `is_folder` is true.
    model: its name, if known: several have the same settings.

  Returns:
    An experiment with the classification task; num_classes is 0 for a model
    without a head.

  Raises:
    ConfigError: a setting cannot be expressed, or is damaged.
  """
  config = _config(path)
  library = timm if "architecture" in config else transformers
  with _errors_of(path / _CONFIG):
    tree = {"data": {}, **library.read(config, model)}
  file = path / _PROCESSOR
  if library is transformers and file.exists():
    with _errors_of(file):
      content = json_data.read(file)
      if not isinstance(content, dict):
        raise ValueError("is not a section of keys")
      for section, values in processor.read(content).items():
        tree[section] = {**values, **tree[section]}  # The model's size stays.
  with _errors_of(path / _CONFIG, library.keys(config)):
    return _experiment(tree)


@contextlib.contextmanager
def _errors_of(file: pathlib.Path,
               keys: Mapping[str, str] | None = None) -> Iterator[None]:
  """Names a file in errors, and our hyper-parameters by its keys."""
  try:
    yield
  except (OSError, ValueError, errors.ConfigError) as e:
    message = str(e)
    for ours, theirs in (keys or {}).items():
      message = re.sub(rf"(config\.model\.|(?<![\w.])){ours}(?=:)", theirs,
                       message)
    raise errors.ConfigError(errors.one_line(f"{file}: {message}")) from e


def _experiment(tree: dict[str, Any]) -> Experiment:
  """The experiment of nested dicts, complete and checked."""
  row = registry.get_spec(tree["model"]["name"])
  task, data = tree["task"], tree["data"]
  for section, key, value in (
      (task, "image_size", row.input_size), (task, "crop_pct", row.crop_pct),
      (task, "interpolation", row.interpolation), (data, "mean", row.mean),
      (data, "std", row.std)):
    if section.get(key) is None:
      section[key] = value
  n = task.pop("num_classes")
  cfg = typed.typed({**tree, "task": {**task, "num_classes": n or None}})
  size = cfg.task.image_size
  typed.refuse(row.override(**cfg.model.overrides()).check(size, size, n))
  # A run needs classes, so that 0 is not a value of the key.
  return dataclasses.replace(
      cfg, task=dataclasses.replace(cfg.task, num_classes=n))


def weights(path: pathlib.Path,
            ) -> pathlib.Path | dict[str, pathlib.Path] | None:
  """Where the weights of a folder are.

  Returns:
    Their file; or for each tensor its file, if there are several; None if there
    are no files of these names.

  Raises:
    WeightsError: an index is damaged or names what is not in the folder.
  """
  file = next((path / name for name in _WEIGHTS if (path / name).exists()),
              None)
  if file is None or file.suffix != ".json":
    return file
  try:
    return _shards(path, json_data.read(file))
  except (OSError, ValueError) as e:
    raise errors.WeightsError(errors.one_line(f"{file}: {e}")) from e


def _shards(path: pathlib.Path, index: Any) -> dict[str, pathlib.Path]:
  """The file of each tensor; ValueError says what is wrong with the index."""
  places = index.get("weight_map") if isinstance(index, dict) else None
  if not isinstance(places, dict) or not places:
    raise ValueError("has no weight_map of tensors to files")
  found = {}
  for name in dict.fromkeys(map(str, places.values())):
    # Names only: an index from outside must not lead out of the folder. The
    # files may be links, as in the cache of huggingface_hub.
    if not re.fullmatch(r"\w[\w.-]*", name):
      raise ValueError(f"weight_map: {name[:200]!r} is not the name of a file "
                       "in this folder")
    if not (path / name).is_file():
      raise ValueError(f"weight_map: {name[:200]} does not exist: download or "
                       "copy all files of the folder")
    found[name] = path / name
  return {tensor: found[str(name)] for tensor, name in places.items()}


def describe(cfg: Experiment, layout: str, in_chans: int,
             measures: Mapping[str, float]) -> dict[str, str]:
  """The files of a folder beside its weights, as text by their names.

  Args:
    cfg: the experiment that made the weights, complete.
    layout: one of `LAYOUTS`.
    in_chans: channels of the images.
    measures: of the weights' evaluation, if there was one.

  Raises:
    ConfigError: the layout's program cannot build the model from such files.
  """
  if not isinstance(cfg.task, tasks.Classification):
    raise errors.ConfigError(
        f"a folder of {layout} holds a classifier, not a model of the task "
        f"{cfg.task.name}; name a .safetensors file")
  try:
    config = _WRITERS[layout](cfg, in_chans)
  except ValueError as e:
    raise errors.ConfigError(
        f"{layout} cannot express this model in a config.json ({e}); a "
        ".safetensors file of the layout flax can") from e
  files = {_CONFIG: config}
  if layout == "huggingface":
    files[_PROCESSOR] = processor.write(cfg)
  return {"README.md": card.text(cfg, layout, measures), **{
      name: json.dumps(content, indent=2, sort_keys=True) + "\n"
      for name, content in files.items()}}
