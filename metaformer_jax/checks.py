"""What only several values of an experiment together can tell, or the disk.

Each function yields a line for each thing that is wrong; `config` has checked
every value by itself before. Nothing here imports jax.
"""

import pathlib
import re
from collections.abc import Iterator

from metaformer_jax import errors
from metaformer_jax.data import policies
from metaformer_jax.experiment import Experiment
from metaformer_jax.models import registry


def check(cfg: Experiment) -> Iterator[str]:
  """What only several keys together, or the file system, can tell."""
  try:
    spec = registry.get_spec(cfg.model.name)
  except ValueError as e:
    yield f"config.model.name: {e}"
  else:
    yield from _check_model(cfg, spec)
  train, optim = cfg.train, cfg.optim
  if train.batch_size % train.accumulate:
    yield (f"config.train.batch_size: {train.batch_size} is not divisible by "
           f"config.train.accumulate = {train.accumulate}; nearest: "
           f"{nearest_multiple(train.batch_size, train.accumulate)}")
  if train.steps is None and optim.warmup_epochs >= train.epochs:
    yield (f"config.optim.warmup_epochs: {optim.warmup_epochs} is not below "
           f"config.train.epochs = {train.epochs}")
  for key in ("crop_area", "crop_ratio"):
    low, high = getattr(cfg.data, key)
    if low > high:
      yield f"config.data.{key}: ({low}, {high}) does not ascend"
  yield from _check_init(cfg)
  yield from _check_mesh(cfg)
  yield from _check_data(cfg)


def check_batch(cfg: Experiment, n_devices: int) -> Iterator[str]:
  """Whether each device gets the same number of images in a micro-batch."""
  divisor = n_devices * cfg.train.accumulate
  if cfg.train.batch_size % divisor:
    yield (f"config.train.batch_size: {cfg.train.batch_size} is not divisible "
           f"by {n_devices} devices x {cfg.train.accumulate} micro-batches; "
           f"nearest: {nearest_multiple(cfg.train.batch_size, divisor)}")


def nearest_multiple(value: int, divisor: int) -> int:
  """The multiple of `divisor` nearest to `value`, at least `divisor`."""
  return max(divisor, (value + divisor // 2) // divisor * divisor)


def _check_model(cfg: Experiment, spec) -> Iterator[str]:
  overrides = cfg.model.overrides()
  for key in overrides:
    if key not in spec.hparams:
      yield (f"config.model.{key}: {spec.name} has no such hyper-parameter"
             f"{errors.did_you_mean(key, spec.hparams)}")
  hparams = {**spec.hparams, **overrides}
  stages = {k: len(hparams[k]) for k in ("depths", "dims", "token_mixers")
            if k in hparams}
  if hparams.get("res_scale_init"):
    stages["res_scale_init"] = len(hparams["res_scale_init"])
  if len(set(stages.values())) > 1 or 0 in stages.values():
    yield ("config.model: " + ", ".join(
        f"{k} has {n}" for k, n in stages.items()) +
           " stages; give each the same number")
  kernel = hparams.get("in_patch_size", hparams.get("patch_size", 1))
  least = kernel - 2 * hparams.get("in_pad", 0)
  if cfg.data.image_size < least:
    yield (f"config.data.image_size: {cfg.data.image_size} is less than the "
           f"stem's kernel, {kernel}, with its padding; nearest: {least}")
  ratio, dims = hparams.get("mlp_ratio"), hparams.get("dims")
  if ratio and dims and int(min(dims) * ratio) < 1:
    yield (f"config.model.mlp_ratio: {ratio} gives an MLP without channels; "
           f"least: {1 / min(dims)}")
  n_stages = len(hparams.get("depths", ()))
  for stage in hparams.get("position_embeddings", ()):
    if stage > n_stages:
      yield (f"config.model.position_embeddings: there is no stage {stage}; "
             f"nearest: {n_stages}")


def _check_init(cfg: Experiment) -> Iterator[str]:
  if cfg.init is None:
    return
  try:
    path = pathlib.Path(cfg.init).expanduser()
    if not path.exists():
      near = [str(p) for p in path.parent.glob("*")]
      yield (f"config.init: {cfg.init!r} does not exist"
             f"{errors.did_you_mean(str(path), near)}")
  except (OSError, RuntimeError, ValueError) as e:
    yield f"config.init: {cfg.init!r}: {e}"


def _check_mesh(cfg: Experiment) -> Iterator[str]:
  mesh = cfg.mesh
  if mesh.data == -1 and mesh.fsdp == -1:
    yield "config.mesh: data and fsdp are both -1; give one of them a size"
  for axis in ("data", "fsdp"):
    if getattr(mesh, axis) == 0:
      yield f"config.mesh.{axis}: 0 is no number of devices; -1 takes the rest"
  if mesh.data > 0 and mesh.fsdp > 0:
    yield from check_batch(cfg, mesh.data * mesh.fsdp)
  for rule in mesh.rules:
    if (len(rule) != 2 or not isinstance(rule[0], str)
        or type(rule[1]) is not int or rule[1] < -1):
      yield (f"config.mesh.rules: {rule!r} is not (regular expression, axis "
             "to split or -1)")
      continue
    try:
      re.compile(rule[0])
    except (re.error, OverflowError, RecursionError) as e:
      yield f"config.mesh.rules: {rule[0]!r} is no regular expression: {e}"


def _check_data(cfg: Experiment) -> Iterator[str]:
  data = cfg.data
  if data.source == "tfds" and not data.name:
    yield ("config.data.name: None with source tfds; give a data set's name, "
           "e.g. imagenet2012")
  if data.source == "folder" and not data.path:
    yield (f"config.data.path: {data.path!r} with source folder; give the "
           "folder that holds train/ and val/")
  if data.source == "idx" and not data.path:
    yield (f"config.data.path: {data.path!r} with source idx; give the folder "
           "that holds the four files of MNIST or Fashion-MNIST")
  try:
    policies.parse(data.auto_augment)
  except ValueError as e:
    yield f"config.data.auto_augment: {data.auto_augment!r} {e}"
  yield from _check_labels(cfg)
  if data.source == "digits":
    yield from _check_n_classes(cfg, 10)
  if not data.path:
    return
  if "://" in data.path:
    if data.source != "tfds":
      yield (f"config.data.path: {data.path} is not a local folder, which "
             f"source {data.source} needs")
    return
  try:
    yield from _check_folders(cfg)
  except (OSError, RuntimeError) as e:  # Not permitted, too long, no home.
    yield f"config.data.path: {data.path}: {e}"


def _check_labels(cfg: Experiment) -> Iterator[str]:
  labels, source = cfg.eval.labels, cfg.data.source
  if labels != "split" and source != "folder":
    yield (f"config.eval.labels: {labels} with source {source}; only source "
           "folder has it")
  if labels == "real" and not pathlib.Path(
      cfg.eval.real_path or "").expanduser().is_file():
    yield (f"config.eval.real_path: {cfg.eval.real_path!r} is not a file; give "
           "real.json of github.com/google-research/reassessed-imagenet")


def _check_n_classes(cfg: Experiment, n_classes: int) -> Iterator[str]:
  if n_classes > cfg.model.num_classes:
    yield (f"config.model.num_classes: {cfg.model.num_classes} is less than "
           f"the data's; nearest: {n_classes}")


def _check_folders(cfg: Experiment) -> Iterator[str]:
  data = cfg.data
  root = pathlib.Path(data.path).expanduser()
  if not root.is_dir():
    hint = ("; install Debian's package dataset-fashion-mnist"
            if root.name == "fashion-mnist" else _nearest_folder(root))
    yield f"config.data.path: {data.path} is not a folder{hint}"
  elif data.source == "idx":
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
                 "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
      if not ((root / name).is_file() or (root / f"{name}.gz").is_file()):
        yield f"config.data.path: {data.path} has no {name}[.gz]"
  elif data.source == "folder":
    for key, split in (("train_split", data.train_split or "train"),
                       ("eval_split", data.eval_split or "val")):
      if not (root / split).is_dir():
        yield (f"config.data.{key}: {data.path} has no folder {split!r}"
               f"{_nearest_folder(root / split)}")
        continue
      classes = [p for p in (root / split).iterdir() if p.is_dir()]
      if not classes:
        yield f"config.data.path: {root / split} has no class folders"
      yield from _check_n_classes(cfg, len(classes))


def _nearest_folder(path: pathlib.Path) -> str:
  """Names what the deepest existing parent holds that comes near."""
  while not path.parent.is_dir():
    path = path.parent
  siblings = [p.name for p in path.parent.iterdir() if p.is_dir()]
  if not siblings:
    return f"; {path.parent} has no folders"
  return f" (in {path.parent}{errors.did_you_mean(path.name, siblings)})"
