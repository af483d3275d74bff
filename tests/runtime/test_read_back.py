"""What a run reads back from its workdir may be anything."""

import copy
import json
import os
import signal

import numpy as np
import pytest

from metaformer_jax import errors
from metaformer_jax.config import saved, schema
from metaformer_jax.runtime import accounting, workdir, writers

CFG = schema.Experiment(data=schema.Data(source="own_data_of_this_test:make"),
                        log=schema.Log(tensorboard=False))
FILES = ("metrics.jsonl", "config.json", "summary.json", "modules.json")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))  # `own` notes runs there.
  monkeypatch.setattr("os.fsync", lambda _: None)  # Takes most of the time.


def start(folder, finish=False):
  """What a run does with these files, without a model."""
  with workdir.hold(folder):
    workdir.claim(CFG, folder)
    writer = writers.Writer(folder, CFG, 3, ["loss", "top1"], True)
    try:
      writers.last_evaluation(writer.records, 3)
      writer.write(4, "train", {"loss": 1.0, "images_per_second": 2.0})
      writer.write(4, "eval", {"top1": 0.5})
      if finish:
        writer.finish({"step": 4})
    finally:
      writer.close()
  return writer.records


def made(folder):
  """A workdir after three steps."""
  with workdir.hold(folder):
    workdir.claim(CFG, folder)
    writer = writers.Writer(folder, CFG, 0, ["loss"], True)
    for i in (1, 2, 3):
      writer.write(i, "train", {"loss": 1 / i, "skipped_steps": 0})
    writer.write(3, "eval", {"top1": 0.25})
    writer.finish({"step": 3, "top1": 0.25})
    writer.close()
  return folder


ODD = (None, True, False, 0, -1, 1.5, -0.0, 2**63, -10**30, 1e308,
       float("nan"), float("inf"), "", "a", "1", "\0\x1b[2J", "é" * 9000, [],
       {}, [[]], {"a": {"b": [1, {}]}}, [1, "2", None])


def changed(tree, rng):
  """A tree with one value, key or item replaced, removed or added."""
  tree = copy.deepcopy(tree)
  parents = [tree]
  for parent in parents:
    children = parent.values() if isinstance(parent, dict) else parent
    parents += [c for c in children if isinstance(c, dict | list) and c]
  parent = parents[rng.integers(len(parents))]
  odd = copy.deepcopy(ODD[rng.integers(len(ODD))])
  keys = list(parent) if isinstance(parent, dict) else range(len(parent))
  key = keys[rng.integers(len(keys))]
  match rng.integers(5):
    case 0:
      del parent[key]
    case 1 if isinstance(parent, dict):
      parent[str(odd)[:300]] = odd
    case 2:
      return odd
    case _:
      parent[key] = odd
  return tree


def damage(path, rng):
  """Damages a file; mostly, it stays JSON."""
  content = path.read_bytes()
  kind = rng.integers(10)
  if kind < 7:
    lines = ([*content.splitlines()] if path.name == FILES[0] else [content])
    i = rng.integers(len(lines))
    lines[i] = json.dumps(changed(json.loads(lines[i]), rng)).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
  elif kind == 7:
    at = rng.integers(len(content))
    path.write_bytes(content[:at] + rng.bytes(20) + content[at + 20:])
  elif kind == 8:
    path.write_bytes([
        b"", b"\0" * 99, b"[" * 10**5, b'{"a":' * 10**5, b"1" * 9999,
        content[:-9], content * 2][rng.integers(7)])
  else:
    path.unlink()
    match rng.integers(4):
      case 0:
        os.mkfifo(path)
      case 1:
        path.mkdir()
      case 2:
        path.symlink_to("/dev/zero")
      case 3:
        path.symlink_to(path)


def test_mutations_are_read_or_told_in_one_line(tmp_path, caplog):
  whole = made(tmp_path / "whole")
  contents = {name: (whole / name).read_bytes() for name in FILES}
  rng = np.random.default_rng(0)
  refused, accepted = set(), set()
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
  for case in range(300):
    folder = tmp_path / str(case)
    folder.mkdir()
    for name, content in contents.items():
      (folder / name).write_bytes(content)
    name = FILES[rng.choice(4, p=[0.5, 0.3, 0.05, 0.15])]
    damage(folder / name, rng)
    signal.alarm(20)
    try:
      if name == "config.json":
        saved.read_run(folder, "own_data_of_this_test")
      records = start(folder, finish=case % 100 == 0)
      accepted.add(name)
      assert all(type(v) in (int, float) for r in records
                 for k, v in r.items() if k != "split")
    except errors.UserError as e:
      refused.add(name)
      line = errors.one_line(e)
      assert len(line) < 7000 and str(folder) in line
    finally:
      signal.alarm(0)
  # A summary is only written; damage to modules.json does not matter.
  assert refused >= {"metrics.jsonl", "config.json"}
  assert accepted == set(FILES)
  assert all(len(m) < 500 for m in caplog.messages)


@pytest.mark.parametrize("change", [
    {"loss": "high"}, {"loss": None}, {"loss": [1]}, {"loss": True},
    {"loss": 10**400}, {"loss": 1e308}, {"step": -1},
    {"step": 2**70}, {"a\x1b[2J": 1}, {"a" * 999: 1}], ids=str)
def test_records_have_numbers(tmp_path, change, caplog):
  made(tmp_path / "run")
  path = tmp_path / "run" / "metrics.jsonl"
  record = {"step": 2, "split": "train", "loss": 0.5} | change
  with path.open("a") as file:
    file.write(json.dumps(record) + "\n")
  records = start(tmp_path / "run", finish=change == {"loss": "high"})
  assert [r["step"] for r in records] == [1, 2, 3, 3, 4, 4]
  assert caplog.messages == [f"{path}: 1 of 5 lines are not records; ignored"]


@pytest.mark.parametrize("values", [
    ("NaN", "-Infinity"), ("3e38", "-3e38"), (str(2**62), "5e-324")])
def test_curves_of_any_numbers_are_drawn(tmp_path, values):
  made(tmp_path / "run")
  with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
    for value in values:
      file.write(f'{{"step": 2, "split": "train", "loss": {value}}}\n')
  assert len(start(tmp_path / "run", finish=True)) == 8
  assert (tmp_path / "run" / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "config.json"])
def test_pipes_do_not_block(tmp_path, name):
  (tmp_path / "run").mkdir()
  os.mkfifo(tmp_path / "run" / name)
  signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
  signal.alarm(20)
  try:
    with pytest.raises(errors.UserError, match=r"--workdir: |metrics\.jsonl: "):
      start(tmp_path / "run")
  finally:
    signal.alarm(0)


@pytest.mark.parametrize("name", ["modules.json", "config.tmp", "metrics.tmp"])
def test_pipes_that_are_only_replaced_do_not_matter(tmp_path, name):
  (tmp_path / "run").mkdir()
  os.mkfifo(tmp_path / "run" / name)
  signal.alarm(20)
  try:
    assert start(tmp_path / "run")
  finally:
    signal.alarm(0)


@pytest.mark.parametrize("change", [
    {"started": float("nan")}, {"started": float("inf")}, {"started": -1.0},
    {"position": 1.5}, {"position": -1}, {"position": True},
    {"skipped_steps": "1"}, {"bad_images": None},
    {"productive_seconds": 10**400}], ids=str)
def test_forged_counts_are_refused(change):
  with pytest.raises(ValueError, match=f"{next(iter(change))} is "):
    accounting.Record(**change)
  accounting.Record(position=2**40, started=1.5, productive_seconds=0)


def test_an_experiment_that_could_not_be_read_again_is_refused(tmp_path):
  task = schema.tasks.Classification(
      num_classes=20_000, class_names=tuple(
          f"{i}{'n' * 3800}" for i in range(20_000)))
  with pytest.raises(errors.ConfigError, match="could not be resumed"):
    workdir.claim(schema.Experiment(task=task), tmp_path)
  assert list(tmp_path.iterdir()) == []
