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

import ade_tree
import coco_tree
import command_line
import ml_collections
import pytest
import source_files
from config_mistakes import (
  OF_DETECTION,
  OF_SEGMENTATION,
  OVERRIDES,
  TOGETHER,
)
from shipped import CONFIGS, load

from metaformer_jax import cli, errors
from metaformer_jax.config import saved, schema, tasks, typed


def fields(cls=schema.Experiment, prefix=""):
  """(key, its type without None, whether it may be None, its limits)."""
  for f in dataclasses.fields(cls):
    if dataclasses.is_dataclass(f.type):
      if f.type is not tasks.Task:
        yield from fields(f.type, f"{prefix}{f.name}.")
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


def from_fields(found):
  """(the key that is reported, {key: value}) for every key of `fields`."""
  for key, kind, optional, limits in found:
    for value in wrong_values(kind, limits):
      yield key, {key: value}
    if not optional:
      yield key, {key: None}
    misspelt = key[:-2] + key[-1]
    yield misspelt, {misspelt: 1}


def of_sections():
  """The same for every section."""
  for section, keys in typed.default().to_dict().items():
    if not isinstance(keys, dict):
      continue
    for value in (None, 3, "x", [], [[]]):
      yield section, {section: value}
    yield f"{section}.section", {f"{section}.section": {}}


CHANGES = {
    "classification": [
        *from_fields(fields()), *of_sections(),
        *from_fields(fields(tasks.Classification, "task.")), *TOGETHER],
    "segmentation": [
        *from_fields(fields(tasks.Segmentation, "task.")), *OF_SEGMENTATION],
    "detection": [
        *from_fields(fields(tasks.Detection, "task.")), *OF_DETECTION]}


def task_of(argument):
  return load(argument).task.name


def in_turn(step=1):
  """Pairs of a config and one of its task's changes."""
  for task, changes in CHANGES.items():
    configs = [argument for argument in CONFIGS if task_of(argument) == task]
    yield from zip(itertools.cycle(configs), changes[::step])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder for the sources folder and idx."""
  root = tmp_path_factory.mktemp("data")
  source_files.write_empty(root)
  ade_tree.make(root, n_train=1, n_val=1)
  coco_tree.make(root, n_train=3, n_val=1)
  return root


@functools.cache
def shipped(argument, data):
  """A shipped config, its data in place, as JSON."""
  config = load(argument)
  if config.data.source in ("folder", "idx"):
    config.data.path = str(data)
    config.task.num_classes = 1
  elif config.data.source == "coco":
    config.data.path = str(data / "coco")
    config.task.update({"num_classes": None, "class_names": None,
                        "category_ids": None})
  elif config.data.source == "ade20k":
    config.data.path = str(data)
    config.init = None  # That of ResNet is a file.
  return typed.to_json(cli.resolve(config))


def overrides(argument, data):
  """The command line of a shipped config with data of this machine."""
  saved = json.loads(shipped(argument, data))
  return [f"--config={argument}",
          f"--config.data.path={saved['data']['path']}",
          *[f"--config.init={saved['init']}"] * ("ade20k" in argument),
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
  every = [change for changes in CHANGES.values() for change in changes]
  assert len(every) > 900
  assert set(typed.keys()) - {key for key, _ in every} == set()
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


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_change_is_refused(data, step):
  for path, (key, changes) in in_turn(step=step):
    refused_here(path, data, key, changes)


@pytest.mark.slow
def test_changes_as_json(data, tmp_path):
  part = [*in_turn(step=25)]
  assert len(part) >= 40
  refused(*as_files(part, data, tmp_path))


def test_changes_as_overrides(data):
  lines, keys = [], []
  for path, (override, key) in zip(CONFIGS[::-1], OVERRIDES, strict=False):
    lines.append([*overrides(path, data), override])
    keys.append(key)
  refused(lines, keys)


def test_changes_at_the_entry_point(data, tmp_path):
  """Some of them, as users run the entry point."""
  lines, keys = as_files([*in_turn(step=400)], data, tmp_path)
  for line, key in zip(lines, keys):
    result = command_line.run([*line, f"--workdir={tmp_path / 'run'}"])
    command_line.check_refused(result)
    assert is_reported(result.err.removeprefix("ConfigError: "), f".{key}")
  assert not (tmp_path / "run").exists()


@pytest.mark.soak
@pytest.mark.parametrize("path", CONFIGS)
def test_every_change_of_a_config(path, data):
  for key, changes in CHANGES[task_of(path)]:
    refused_here(path, data, key, changes)
  refused([[*overrides(path, data), override] for override, _ in OVERRIDES],
          [key for _, key in OVERRIDES])
