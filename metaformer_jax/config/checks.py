"""What only several values of an experiment together can tell, or the disk.

Each function yields a line for each thing that is wrong; `config` has checked
every value by itself before. Nothing here imports jax.
"""

import itertools
import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from metaformer_jax import errors
from metaformer_jax.config import policies
from metaformer_jax.config.schema import Experiment, Log
from metaformer_jax.models import registry

# Beyond any run; what is larger would end for want of memory, or never begin.
_MAX_SIDE = 2**14  # Of an image, pixels.
_MAX_BATCH_BYTES = 2**40
_MAX_BLOCKS = 10_000
_MAX_PARAMETERS = 10**11
_MAX_EPOCHS = 1e6
_MAX_NDIM = 64  # Of an array: NumPy's.
_MAX_OPERATIONS = 100  # Of RandAugment, on one image.


def check(cfg: Experiment, files: bool = True) -> Iterator[str]:
  """What only several keys together, or the file system, can tell.

  Args:
    cfg: each value checked by itself.
    files: whether what the config names must be on this machine; it need not
      when the run will be on another.
  """
  try:
    spec = registry.get_spec(cfg.model.name)
  except ValueError as e:
    yield f"config.model.name: {e}"
  else:
    yield from _check_model(cfg, spec)
  yield from _check_images(cfg)
  yield from _check_train(cfg)
  for key in ("crop_area", "crop_ratio"):
    low, high = getattr(cfg.data, key)
    if low > high:
      yield f"config.data.{key}: ({low}, {high}) does not ascend"
  yield from _check_mesh(cfg)
  yield from _check_data(cfg)
  if files:
    yield from _check_init(cfg)
    yield from _check_cache(cfg)
    yield from _check_data_files(cfg)


def _check_images(cfg: Experiment) -> Iterator[str]:
  side = cfg.data.image_size
  if side > _MAX_SIDE:
    yield (f"config.data.image_size: {side} is above the largest, {_MAX_SIDE}")
    return
  largest = _MAX_BATCH_BYTES // (3 * side**2)
  for section in ("train", "eval"):
    n = getattr(cfg, section).batch_size
    if n > largest:
      yield (f"config.{section}.batch_size: {n} images of {side} x {side} "
             f"pixels are more than 1 TiB; largest: {largest}")


def _check_train(cfg: Experiment) -> Iterator[str]:
  train, optim = cfg.train, cfg.optim
  if train.batch_size % train.accumulate:
    yield (f"config.train.batch_size: {train.batch_size} is not divisible by "
           f"config.train.accumulate = {train.accumulate}; nearest: "
           f"{nearest_multiple(train.batch_size, train.accumulate)}")
  if train.steps is None and optim.warmup_epochs >= train.epochs:
    yield (f"config.optim.warmup_epochs: {optim.warmup_epochs} is not below "
           f"config.train.epochs = {train.epochs}")
  for section, key in (("train", "epochs"), ("optim", "cooldown_epochs")):
    n = getattr(getattr(cfg, section), key)
    if n > _MAX_EPOCHS:
      yield f"config.{section}.{key}: {n} is above the largest, {_MAX_EPOCHS}"
  metric, measured = cfg.checkpoint.best_metric, ("top1", "top5")
  if cfg.task == "classification" and metric not in measured:
    yield (f"config.checkpoint.best_metric: {metric!r} is no measure of which "
           f"the highest is the best{errors.did_you_mean(metric, measured)}")


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
    elif (isinstance(spec.hparams[key], tuple)
          and not isinstance(overrides[key], tuple)):
      yield (f"config.model.{key}: {overrides[key]!r}, but {spec.name} has "
             f"several, {spec.hparams[key]}, which cannot be set")
      return
  hparams = spec.hparams | {
      k: v for k, v in overrides.items() if k in spec.hparams}
  stages = {k: len(hparams[k]) for k in (
      "depths", "dims", "widths", "token_mixers", "n_heads")
            if isinstance(hparams.get(k), tuple)}
  if hparams.get("res_scale_init"):
    stages["res_scale_init"] = len(hparams["res_scale_init"])
  if len(set(stages.values())) > 1 or 0 in stages.values():
    yield ("config.model: " + ", ".join(
        f"{k} has {n}" for k, n in stages.items()) +
           " stages; give each the same number")
    return
  yield from _check_windows(cfg, hparams, overrides)
  yield from _check_channels(cfg, hparams)
  n_stages = len(hparams.get("depths", ()))
  for stage in hparams.get("position_embeddings", ()):
    if stage > n_stages:
      yield (f"config.model.position_embeddings: there is no stage {stage}; "
             f"nearest: {n_stages}")


def _check_windows(cfg: Experiment, hparams: Mapping[str, Any],
                   overrides: Mapping[str, Any]) -> Iterator[str]:
  """Whether the image is large enough for the kernels, and they for it."""
  side = cfg.data.image_size
  kernel = hparams.get("in_patch_size", hparams.get("patch_size", 1))
  pad = hparams.get("in_pad", 0)
  if pad > kernel:
    yield (f"config.model.in_pad: {pad} is more than the stem's kernel; "
           f"nearest: {kernel}")
  elif side < kernel - 2 * pad:
    yield (f"config.data.image_size: {side} is less than the stem's kernel, "
           f"{kernel}, with its padding; nearest: {kernel - 2 * pad}")
  elif "sr_ratios" in hparams:
    # Patches of 2 follow the stem's; a stage has as many as it reduces by.
    least = max(kernel * 2**i * r for i, r in enumerate(hparams["sr_ratios"]))
    if side < least:
      yield (f"config.data.image_size: {side} gives fewer tokens than are "
             f"reduced to one; nearest: {least}")
  for key in ("pool_size", "conv_kernel_size", "in_patch_size"):
    if overrides.get(key, 0) > 2 * side + 1:
      yield (f"config.model.{key}: {overrides[key]} is more than twice the "
             f"image's side; nearest: {2 * side + 1}")


def _check_channels(cfg: Experiment,
                    hparams: Mapping[str, Any]) -> Iterator[str]:
  """Whether channels can be divided, and the model be held at all."""
  dims = hparams.get("dims", hparams.get("widths")) or (hparams["dim"],)
  depths = hparams.get("depths") or (hparams["depth"],)
  ratio = hparams.get("mlp_ratio")
  if not isinstance(ratio, float):  # There are several, or none to be set.
    ratio = 0
  n_heads = hparams.get("n_heads", 1)
  if isinstance(n_heads, int):
    n_heads = (n_heads,) * len(dims)
  for dim, n in zip(dims, n_heads):
    if dim % n:
      yield (f"config.model.dims: {dim} channels are not divisible by "
             f"{n} heads; nearest: {nearest_multiple(dim, n)}")
  if ratio and int(min(dims) * ratio) < 1:
    yield (f"config.model.mlp_ratio: {ratio} gives an MLP without channels; "
           f"least: {1 / min(dims)}")
  if sum(depths) > _MAX_BLOCKS:
    yield (f"config.model: has {sum(depths)} blocks; the most are "
           f"{_MAX_BLOCKS}")
  # The stem, the downsamplings, the MLPs and the head.
  kernel = hparams.get("in_patch_size", 1)
  least = (3 * kernel**2 * dims[0] + dims[-1] * cfg.model.num_classes
           + sum(9 * a * b for a, b in itertools.pairwise(dims))
           + sum(2 * ratio * n * dim**2 for n, dim in zip(depths, dims)))
  if least > _MAX_PARAMETERS:
    yield (f"config.model: has more than {least:.1g} parameters; the most are "
           f"{_MAX_PARAMETERS:.0e}; lower dims, depths, mlp_ratio, "
           "in_patch_size or num_classes")


def _check_init(cfg: Experiment) -> Iterator[str]:
  if cfg.init is None:
    return
  if not cfg.init:
    yield "config.init: '' names no file; None starts from scratch"
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
        or type(rule[1]) is not int or not -1 <= rule[1] < _MAX_NDIM):
      yield (f"config.mesh.rules: {rule!r:.200} is not (regular expression, "
             "axis to split or -1)")
      continue
    try:
      re.compile(rule[0])
    except (re.error, OverflowError, RecursionError) as e:
      yield f"config.mesh.rules: {rule[0]!r} is no regular expression: {e}"


def _check_cache(cfg: Experiment) -> Iterator[str]:
  """jax itself would warn of a folder that cannot be at each compilation."""
  folder = cfg.log.compilation_cache
  # Where the default cannot be made, no user has asked for it.
  if not folder or folder == Log().compilation_cache or "://" in folder:
    return
  try:
    parent = pathlib.Path(folder).expanduser().absolute()
    while not parent.exists():
      parent = parent.parent
    if not parent.is_dir():
      yield f"config.log.compilation_cache: {parent} is a file, not a folder"
    elif not os.access(parent, os.W_OK):
      yield f"config.log.compilation_cache: {parent} is not writable"
  except (OSError, RuntimeError) as e:  # Too long; the home of nobody.
    yield f"config.log.compilation_cache: {folder}: {e}"


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
    policy = policies.parse(data.auto_augment)
    if getattr(policy, "n_ops", 0) > _MAX_OPERATIONS:
      raise ValueError(f"has an n above {_MAX_OPERATIONS}")
  except ValueError as e:
    yield f"config.data.auto_augment: {data.auto_augment!r} {e}"
  if cfg.eval.labels != "split" and data.source != "folder":
    yield (f"config.eval.labels: {cfg.eval.labels} with source {data.source}; "
           "only source folder has it")
  if data.source == "digits":
    yield from _check_n_classes(cfg, 10)


def _check_data_files(cfg: Experiment) -> Iterator[str]:
  data = cfg.data
  if cfg.eval.labels == "real" and not _is_file(cfg.eval.real_path or ""):
    yield (f"config.eval.real_path: {cfg.eval.real_path!r} is not a file; give "
           "real.json of github.com/google-research/reassessed-imagenet")
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


def _is_file(path: str) -> bool:
  try:
    return pathlib.Path(path).expanduser().is_file()
  except (OSError, RuntimeError):  # Too long; the home of nobody.
    return False


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
