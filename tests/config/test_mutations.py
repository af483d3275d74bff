"""Every shipped config with one mistake: refused in one line, exit code 2.

The mistakes are made from the types and limits of the fields, and from two
tables. Each is made in one of the configs, in turn; some are also given on the
command line, as --config_json or as overrides. `-m soak` makes each in every
config.
"""

import dataclasses
import functools
import itertools
import json
import math
import re
import types
import typing

import command_line
import ml_collections
import pytest
import source_files
from shipped import CONFIGS, load

from metaformer_jax import cli, errors
from metaformer_jax.config import saved, schema, tasks, typed

ROOT = command_line.ROOT
FOLDER = {"data.source": "folder"}
TFDS = {"data.source": "tfds", "data.path": None}
META = {"model.name": "poolformer_s12", "model.depths": None,
        "model.dims": None, "model.token_mixers": None,
        "model.res_scale_init": None}
RULES = "mesh.rules"

# Mistakes across several keys; the key that is reported comes first.
TOGETHER = [
    ("model.name", {"model.name": "poolformer_s13"}),
    ("model.name", {"model.name": "Poolformer_S12"}),
    ("model.name", {"model.name": "../poolformer_s12"}),
    ("model.name", {"model.name": "os.system"}),
    ("model.name", {"model.name": "poolformer_s1²"}),
    ("model.depths", {**META, "model.depths": [1, 2]}),
    ("model.depths", {**META, "model.dims": [8, 8, 8, 8, 8]}),
    ("model.depths", {**META, "model.token_mixers": ["pooling"]}),
    ("model.depths", {**META, "model.res_scale_init": [1.0]}),
    ("model.depths", {**META, "model.depths": [], "model.dims": [],
                      "model.token_mixers": []}),
    ("model.depths", {**META, "model.depths": [10**6] * 4}),
    ("model.dims", {**META, "model.dims": [10**6] * 4}),
    ("model.in_patch_size", {**META, "model.in_pad": 3,
                             "model.in_patch_size": 10**5}),
    ("task.num_classes", {**META, "task.num_classes": 2**31 - 1}),
    ("model.in_pad", {**META, "model.in_pad": 100_000}),
    ("model.pool_size", {**META, "model.pool_size": 2**31 - 1}),
    ("model.conv_kernel_size", {**META, "model.conv_kernel_size": 99_999}),
    ("model.position_embeddings", {**META, "model.position_embeddings": [9]}),
    ("model.mlp_ratio", {**META, "model.mlp_ratio": 1e-6}),
    ("task.image_size", {**META, "task.image_size": 2, "model.in_pad": 0}),
    ("model.pool_size", {"model.name": "resnet18", "model.pool_size": 3}),
    ("model.dims", {"model.name": "resnet18", "model.dims": [8] * 4}),
    ("model.depths", {"model.name": "resnet18", "model.depths": [1, 1]}),
    ("model.depth", {"model.name": "resnet18", "model.depth": 1}),
    ("model.dims", {"model.name": "pvt_tiny", "model.dims": [64] * 4,
                    "model.depths": None}),
    ("task.image_size", {"model.name": "pvt_tiny", "task.image_size": 31,
                         "model.depths": None, "model.dims": None}),
    ("model.mlp_ratio", {"model.name": "mixer_b16_224",
                         "model.mlp_ratio": 4.0}),
    ("model.norm", {"model.name": "deit_small_patch16_224",
                    "model.mlp_ratio": None, "model.norm": "none"}),
    ("train.batch_size", {"train.batch_size": 97, "train.accumulate": 8}),
    ("train.batch_size", {"train.batch_size": 8, "train.accumulate": 16}),
    ("train.batch_size", {"mesh.data": 7, "mesh.fsdp": 3}),
    ("train.batch_size", {"mesh.data": 10**6, "mesh.fsdp": 1}),
    ("mesh", {"mesh.data": -1, "mesh.fsdp": -1}),
    ("mesh.data", {"mesh.data": 0}),
    ("mesh.fsdp", {"mesh.fsdp": 0}),
    (RULES, {RULES: [["(", 0]]}),
    (RULES, {RULES: [["a", 0.0]]}),
    (RULES, {RULES: [[0, "a"]]}),
    (RULES, {RULES: [["a", 10**30]]}),
    (RULES, {RULES: [["a", 0, 0]]}),
    (RULES, {RULES: [[]]}),
    (RULES, {RULES: [["a"], {"b": 1}]}),
    (RULES, {RULES: [["a", None]]}),
    ("train.batch_size", {"train.batch_size": 2**24, "train.accumulate": 1,
                          "task.image_size": 1024}),
    ("eval.batch_size", {"eval.batch_size": 2**31 - 1}),
    ("task.image_size", {"task.image_size": 10**6}),
    ("train.epochs", {"train.epochs": 1e30}),
    ("optim.cooldown_epochs", {"optim.cooldown_epochs": 1e30}),
    ("optim.warmup_epochs", {"train.epochs": 2.0, "train.steps": None,
                             "optim.warmup_epochs": 2.0}),
      ("checkpoint.best_metric", {"checkpoint.best_metric": "top2"}),
    ("checkpoint.best_metric", {"checkpoint.best_metric": "topp1"}),
    ("checkpoint.best_metric", {"checkpoint.best_metric": ""}),
    ("task.crop_area", {"task.crop_area": [1.0, 0.5]}),
    ("task.crop_ratio", {"task.crop_ratio": [2.0, 1.0]}),
    ("task.auto_augment", {"task.auto_augment": "rand"}),
    ("task.auto_augment", {"task.auto_augment": "augmix"}),
    ("task.auto_augment", {"task.auto_augment": "rand-m9-n9999999-inc1"}),
    ("task.auto_augment", {"task.auto_augment": "rand-m9-m9-inc1"}),
    ("data.path", {**FOLDER, "data.path": None}),
    ("data.path", {**FOLDER, "data.path": ""}),
    ("data.path", {**FOLDER, "data.path": "/no/such/folder"}),
    ("data.path", {**FOLDER, "data.path": "README.md"}),
    ("data.path", {**FOLDER, "data.path": "gs://bucket/imagenet"}),
    ("data.path", {**FOLDER, "data.path": "x" * 3000}),
    ("data.path", {**FOLDER, "data.path": "~nobody-here/x"}),
    ("data.train_split", {**FOLDER, "data.path": str(ROOT),
                          "data.train_split": "trian"}),
    ("data.eval_split", {**FOLDER, "data.path": str(ROOT),
                         "data.eval_split": "vall"}),
    ("data.path", {"data.source": "idx", "data.path": None}),
    ("data.path", {"data.source": "idx", "data.path": "configs"}),
    ("data.name", {**TFDS, "data.name": None}),
    ("data.name", {**TFDS, "data.name": ""}),
    ("task.eval_labels", {**TFDS, "data.name": "x",
                          "task.eval_labels": "real"}),
    ("task.eval_labels", {"data.source": "digits",
                          "task.eval_labels": "number"}),
    ("task.real_path", {"task.eval_labels": "real"}),
    ("task.real_path", {"task.eval_labels": "real", "task.real_path": "/no"}),
    ("task.num_classes", {"data.source": "digits", "task.num_classes": 9}),
    ("init", {"init": "nowhere.safetensors"}),
    ("init", {"init": "x" * 400}),
    ("log.compilation_cache", {"log.compilation_cache": "README.md/x"}),
]

# Overrides, and the key that is reported.
OVERRIDES = [
    ("--config.seed=1e3", "seed"), ("--config.seed=", "seed"),
    ("--config.seed=0x", "seed"), ("--config.seed=½", "seed"),
    ("--config.seed=" + "9" * 5000, "seed"),
    ("--config.optim.base_lr=1,5", "optim.base_lr"),
    ("--config.optim.base_lr=nan", "optim.base_lr"),
    ("--config.optim.base_lr=-inf", "optim.base_lr"),
    ("--config.optim.base_lr=1e400", "optim.base_lr"),
    ("--config.optim.base_lr=--1", "optim.base_lr"),
    ("--config.model.depths=(1,2", "model.depths"),
    ("--config.model.depths=[1,[2],3,4]", "model.depths"),
    ("--config.data.mean={1:2}", "data.mean"),
    ("--config.model.depths=__import__('os').getpid()", "model.depths"),
    ("--config.model.depths=1,2,x,4", "model.depths"),
    ("--config.model.dims=" + "(" * 300, "model.dims"),
    ("--config.mesh.rules=open('x','w')", "mesh.rules"),
    ("--config.mesh.rules=((lambda: 1, 0),)", "mesh.rules"),
    ("--config.data.mean=0.5", "data.mean"),
    ("--config.data.mean=(.5,.5,.5", "data.mean"),
    ("--config.log.tensorboard=ja", "log.tensorboard"),
    ("--config.train.batch_szie=8", "train.batch_szie"),
    ("--config.trian.batch_size=8", "trian.batch_size"),
    ("--config.train.batch_size.x=8", "train.batch_size.x"),
    ("--config.train=8", "train"), ("--config.model={}", "model"),
    ("--config.=8", ""), ("--config..seed=8", ".seed"),
    ("--config.__class__=8", "__class__"),
    ("--config.model.__init__=8", "model.__init__"),
    ("--config.optim.name=adam w", "optim.name"),
    ("--config.optim.name=Adamw", "optim.name"),
    ("--config.data.source=imagenet", "data.source"),
    ("--noconfig.train.batch_size", None),  # absl's words.
    ("--confg.seed=1", None), ("--config_seed=1", None), ("seed=1", None),
    ("--config.seed", None), ("--workdir=configs/quickstart.py", None),
]


def fields(cls=schema.Experiment, prefix=""):
  """(key, its type without None, whether it may be None, its limits)."""
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      section = tasks.Classification if f.type is tasks.Task else f.type
      yield from fields(section, f"{prefix}{f.name}.")
      continue
    optional = isinstance(f.type, types.UnionType)
    kind = typing.get_args(f.type)[0] if optional else f.type
    yield prefix + f.name, kind, optional, f.metadata


def wrong_numbers(kind, limits):
  """Numbers of the right type that are out of their limits."""
  for bound, step in (("low", -1), ("high", 1), ("above", 0)):
    if limits[bound] is not None:
      yield kind(limits[bound] + step)
  yield 10**30 if kind is int else 1e39
  if limits["each"] == "odd":
    yield 4


def wrong_values(kind, limits):
  """Values that a key of this kind cannot have."""
  yield from ({}, {"a": 1}, [{}], "x\0")
  if kind is bool:
    yield from (0, 1, "true", 1.0)
  elif kind is int:
    yield from (True, 1.5, 8.0, "8", [8], math.inf, *wrong_numbers(int, limits))
  elif kind is float:
    yield from (True, "1e-3", [0.1], -math.inf, 1e-60,
                *wrong_numbers(float, limits))
  elif kind is str:
    yield from (0, True, ["a"], "x" * 9000, "\ud800")
    if limits["choices"]:
      yield from ("", "ü", limits["choices"][0] + "x")
  else:
    yield from (3, "3", True)
    item, *_ = typing.get_args(kind)
    if item in (int, float):
      length = limits["length"] or 4
      yield from ([v] * length for v in (
          None, "a", [1], True, *wrong_numbers(item, limits)))
    if limits["length"]:
      yield from ([], [0.5] * (limits["length"] + 1))


def from_fields():
  """(the key that is reported, {key: value}) for every key and section."""
  for key, kind, optional, limits in fields():
    for value in wrong_values(kind, limits):
      yield key, {key: value}
    if not optional:
      yield key, {key: None}
    misspelt = key[:-2] + key[-1]
    yield misspelt, {misspelt: 1}
  for section, keys in typed.default().to_dict().items():
    if not isinstance(keys, dict):
      continue
    for value in (None, 3, "x", [], [[]]):
      yield section, {section: value}
    yield f"{section}.section", {f"{section}.section": {}}


CHANGES = [*from_fields(), *TOGETHER]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder for the sources folder and idx."""
  root = tmp_path_factory.mktemp("data")
  source_files.write_empty(root)
  return root


@functools.cache
def shipped(argument, data):
  """A shipped config, its data in place, as JSON."""
  config = load(argument)
  if config.data.source in ("folder", "idx"):
    config.data.path = str(data)
    config.task.num_classes = 1
  return typed.to_json(cli.resolve(config))


def overrides(argument, data):
  """The command line of a shipped config with data of this machine."""
  saved = json.loads(shipped(argument, data))
  return [f"--config={argument}",
          f"--config.data.path={saved['data']['path']}",
          f"--config.task.num_classes={saved['task']['num_classes']}"]


def changed(path, data, changes):
  """A shipped config with some keys set, as a tree."""
  tree = json.loads(shipped(path, data))
  for key, value in changes.items():
    *sections, name = key.split(".")
    holder = tree
    for section in sections:
      holder = holder[section]
    holder[name] = value
  return tree


def is_reported(message, key):
  """Whether a ConfigError reports the key."""
  return re.match(rf"(config\S*: .*; also )?config{re.escape(key)}: ", message)


def refused(lines, keys):
  """Runs the lines; each must be refused for its key."""
  for line, key, result in zip(lines, keys, command_line.fork(lines)):
    try:
      command_line.check_refused(result)
      message = result.err.removeprefix("ConfigError: ")
      assert key is None or is_reported(message, f".{key}")
    except AssertionError as e:
      pytest.fail(f"{str(line)[:300]} {key}: {e}")


def as_files(pairs, data, tmp_path):
  """Writes (config, key, changes) as JSON: the command lines, and the keys."""
  lines, keys = [], []
  for i, (path, (key, changes)) in enumerate(pairs):
    file = tmp_path / f"{i}.json"
    # JSON has no Infinity, but a number too large for a double is read as one.
    file.write_text(json.dumps(changed(path, data, changes)).replace(
        "Infinity", "1e999"))
    lines.append([f"--config_json={file}"])
    keys.append(key)
  return lines, keys


def test_there_are_enough():
  reported = {key for key, _ in CHANGES}
  assert len(CHANGES) > 700 and set(typed.keys()) - reported == set()
  assert len(CONFIGS) > 70


def test_no_shipped_config_is_refused(data, tmp_path):
  file, lines = tmp_path / "config.json", []
  for path in CONFIGS:
    file.write_text(shipped(path, data))
    cfg = cli.resolve(saved.read_json(file))
    assert typed.to_json(cfg) == shipped(path, data)
  for i, path in enumerate(CONFIGS[::5]):
    lines.append([*overrides(path, data), "--workdir=run"])
    copy = tmp_path / f"{i}.json"
    copy.write_text(shipped(path, data))
    lines.append([f"--config_json={copy}", "--workdir=run"])
  results = command_line.fork(lines)
  for line, result in zip(lines, results):
    assert (result.code, result.err) == (0, ""), (line, result)
  for by_file, by_json in zip(results[::2], results[1::2]):
    assert by_json.out == by_file.out


def refused_here(path, data, key, changes):
  """As `refused`, in this process."""
  tree = changed(path, data, changes)
  for form in (tree, ml_collections.ConfigDict(tree)):
    with pytest.raises(errors.ConfigError) as caught:
      cli.resolve(form)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 10_000, message
    # A tuple with another number of stages is reported beside the others.
    assert is_reported(message, f".{key}") or (
        f"{key.rpartition('.')[2]} has " in message), (path, changes, message)


def test_every_change_is_refused(data):
  for path, (key, changes) in zip(itertools.cycle(CONFIGS), CHANGES):
    refused_here(path, data, key, changes)


def test_changes_as_json(data, tmp_path):
  part = CHANGES[::5]
  assert len(part) >= 170
  refused(*as_files(zip(itertools.cycle(CONFIGS), part), data, tmp_path))


def test_changes_as_overrides(data):
  lines, keys = [], []
  for path, (override, key) in zip(CONFIGS[::-1], OVERRIDES, strict=False):
    lines.append([*overrides(path, data), override])
    keys.append(key)
  refused(lines, keys)


def test_changes_at_the_entry_point(data, tmp_path):
  """Some of them, as users run the entry point."""
  lines, keys = as_files(
      zip(CONFIGS[::-15], CHANGES[5::150], strict=False), data, tmp_path)
  for line, key in zip(lines, keys):
    result = command_line.run([*line, f"--workdir={tmp_path / 'run'}"])
    command_line.check_refused(result)
    assert is_reported(result.err.removeprefix("ConfigError: "), f".{key}")
  assert not (tmp_path / "run").exists()


@pytest.mark.soak
@pytest.mark.parametrize("path", CONFIGS)
def test_every_change_of_a_config(path, data):
  for key, changes in CHANGES:
    refused_here(path, data, key, changes)
  refused([[*overrides(path, data), override] for override, _ in OVERRIDES],
          [key for _, key in OVERRIDES])
