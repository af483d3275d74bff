"""Weights & Biases: what is sent, by which process, and how a run ends.

The package is replaced by one that records, but for the last tests, which need
the real one (`pip install 'metaformer-jax[wandb]'`) and no network.
"""

import json
import logging
import re
import struct
import sys
import time
import types

import line_task
import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import tracking, writers

CFG = schema.Experiment(log=schema.Log(tensorboard=False, wandb="mixers"))


class Error(Exception):
  pass


class CommError(Error):
  pass


class AuthenticationError(CommError):
  pass


class Run:
  """A run as `wandb.init` returns it; `calls` is what it was told."""

  offline, dir, url = False, "files", "https://a/run"

  def __init__(self, step):
    self.step, self.calls, self.summary = step, [], {}

  def log(self, data, step):
    self.calls.append((step, data))

  def mark_preempting(self):
    self.calls.append("preempting")

  def finish(self, exit_code):
    self.calls.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
  """The package, which keeps its runs, and what they were started with."""
  module = types.ModuleType("wandb")
  module.runs, module.asked, module.step = [], [], 0
  module.Settings = dict
  module.errors = types.SimpleNamespace(
      Error=Error, CommError=CommError,
      AuthenticationError=AuthenticationError)

  def init(**kwargs):
    module.asked.append(kwargs)
    module.runs.append(Run(module.step))
    return module.runs[-1]

  module.init = init
  monkeypatch.setitem(sys.modules, "wandb", module)
  return module


def test_a_resumed_run_continues(wandb, tmp_path):
  with writers.Writer(tmp_path, CFG, 0, (), True) as writer:
    writer.write(1, "train", {"loss": 2.0, "epoch": 0.5})
    writer.write(2, "train", {"loss": 1.5})
    writer.write(2, "eval", {"top1": 0.25})
  wandb.step = 2  # Of what its server has.
  with writers.Writer(tmp_path, CFG, 1, ["loss"], True) as writer:
    for i in (1, 2, 3):
      writer.write(i, "train", {"loss": 2.5 - i / 2})
    writer.finish({"step": 3, "top1": 0.5})
  first, second = wandb.runs
  assert first.calls == [
      (1, {"train/loss": 2.0, "train/epoch": 0.5}), (2, {"train/loss": 1.5}),
      (2, {"eval/top1": 0.25}), 0]
  assert second.calls == [
      (2, {"train/loss": 1.5}), (3, {"train/loss": 1.0}), 0]
  assert second.summary == {"summary/step": 3, "summary/top1": 0.5}
  one, other = wandb.asked
  assert one == other and re.fullmatch("[0-9a-f]{16}", one["id"])
  assert (one["project"], one["entity"]) == ("mixers", None)
  assert one["name"] == f"{tmp_path.parent.name}/{tmp_path.name}"
  assert one["config"]["optim"]["base_lr"] == CFG.optim.base_lr
  assert one["config"]["log"]["wandb"] == "mixers"


def test_another_project_is_another_run(wandb, tmp_path):
  other = small_runs.changed(CFG, log={"wandb": "team/others"})
  for cfg in (CFG, CFG, other, other):
    tracking.Tracker(tmp_path, cfg).close()
  ids = [asked["id"] for asked in wandb.asked]
  assert ids[0] == ids[1] != ids[2] == ids[3]
  assert (wandb.asked[2]["entity"], wandb.asked[2]["project"]) == (
      "team", "others")


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"project": "mixers", "id": 3}', "[" * 9999,
    '{"project": "mixers", "id": "../../../../evil"}'], ids=lambda t: t[:30])
def test_damaged_id_is_replaced(wandb, tmp_path, text):
  (tmp_path / "wandb_run.json").write_text(text)
  tracking.Tracker(tmp_path, CFG).close()
  kept = json.loads((tmp_path / "wandb_run.json").read_text())
  assert kept == {"project": "mixers", "id": wandb.asked[0]["id"]}
  assert re.fullmatch("[0-9a-f]{16}", kept["id"])


@pytest.mark.parametrize("error, calls", [
    (errors.Preempted("SIGTERM"), ["preempting", 143]),
    (errors.DivergedError("nan"), [3]), (errors.StorageError("full"), [1]),
    (RuntimeError("a bug"), [1]), (KeyboardInterrupt(), [1])],
    ids=lambda value: type(value).__name__)
def test_how_a_run_ended_is_told(wandb, tmp_path, error, calls):
  with pytest.raises(type(error)), writers.Writer(
      tmp_path, CFG, 0, (), True):
    raise error
  assert wandb.runs[0].calls == calls


def test_a_whole_run(wandb, tmp_path):
  cfg = small_runs.line(log={"wandb": "lines"})
  summary = small_runs.run(cfg, line_task.LineTask(), tmp_path)
  run, = wandb.runs
  *logged, code = run.calls
  assert code == 0
  assert run.summary == {f"summary/{k}": v for k, v in summary.items()}
  assert wandb.asked[0]["config"] == json.loads(
      (tmp_path / "config.json").read_text())
  sent = [(step, name, value) for step, data in logged
          for name, value in data.items()]
  assert sent == [
      (record["step"], f"{record['split']}/{name}", value)
      for record in writers.read(tmp_path / "metrics.jsonl")
      for name, value in record.items() if name not in ("step", "split")]


def test_other_processes_and_other_runs_do_not_need_it(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "wandb", None)  # Cannot be imported.
  with writers.Writer(tmp_path, CFG, 0, (), enabled=False) as writer:
    writer.write(1, "train", {"loss": 1.0})
  for name in (None, ""):
    cfg = small_runs.changed(CFG, log={"wandb": name})
    writers.check(cfg.log)
    with writers.Writer(tmp_path, cfg, 0, (), True) as writer:
      writer.write(1, "train", {"loss": 1.0})
  assert not (tmp_path / "wandb_run.json").exists()


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")])
def test_a_missing_package_is_named_before_anything_is_written(
    monkeypatch, tmp_path, module):
  """Also if a folder of that name can be imported."""
  monkeypatch.setitem(sys.modules, "wandb", module)
  cfg = small_runs.line(log={"wandb": "lines"})
  with pytest.raises(errors.ConfigError, match=(
      r"config\.log\.wandb: .* pip install 'metaformer-jax\[wandb\]'")) as e:
    small_runs.run(cfg, line_task.LineTask(), tmp_path / "run")
  assert len(str(e.value).splitlines()) == 1
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error, kind", [
    (Error("Invalid project name 'a?'"), errors.ConfigError),
    (AuthenticationError("no key"), errors.ConfigError),
    (CommError("timed out"), errors.UserError)])
def test_what_it_refuses_is_one_line(
    monkeypatch, wandb, tmp_path, error, kind):
  def init(**_):
    raise error

  monkeypatch.setattr(wandb, "init", init)
  with pytest.raises(errors.UserError) as e:
    writers.Writer(tmp_path, CFG, 0, (), True)
  assert type(e.value) is kind
  assert str(e.value).startswith(f"config.log.wandb: mixers: {error}; run wand")


def test_a_failure_of_the_service_does_not_end_a_run(
    monkeypatch, wandb, tmp_path, caplog):
  def log(*_, **__):
    raise BrokenPipeError("service has ended")

  monkeypatch.setattr(Run, "log", log)
  with caplog.at_level(logging.WARNING), writers.Writer(
      tmp_path, CFG, 0, (), True) as writer:
    writer.write(1, "train", {"loss": 1.0})
  assert caplog.messages == ["wandb: service has ended"]
  assert len(writers.read(tmp_path / "metrics.jsonl")) == 1


def test_another_experiment_does_not_continue_the_run(wandb, tmp_path):
  """The one before ended before its first checkpoint."""
  from metaformer_jax.runtime import workdir  # noqa: PLC0415

  ids = []
  for seed in (0, 0, 1):
    cfg = schema.Experiment(seed=seed, log=CFG.log)
    with workdir.hold(tmp_path):
      workdir.claim(cfg, tmp_path)
      tracking.Tracker(tmp_path, cfg).close()
    ids.append(wandb.asked[-1]["id"])
  assert ids[0] == ids[1] != ids[2]


def records(path):
  """The records that the real package has written for one process.

  The file is a log of LevelDB behind seven bytes: blocks of parts with a
  checksum, a length and a kind (whole, first, middle, last).
  """
  from wandb.proto import wandb_internal_pb2  # noqa: PLC0415

  content, at, data = path.read_bytes(), 7, b""
  assert content.startswith(b":W&B")
  while at < len(content):
    if 2**15 - at % 2**15 < 7:  # The rest of a block has no part.
      at += 2**15 - at % 2**15
      continue
    length, kind = struct.unpack("<HB", content[at + 4:at + 7])
    data += content[at + 7:at + 7 + length]
    at += 7 + length
    if kind in (1, 4):
      record = wandb_internal_pb2.Record()
      record.ParseFromString(data)
      yield record
      data = b""


def test_the_real_package_offline(monkeypatch, tmp_path, capfd):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
  with pytest.raises(errors.Preempted), writers.Writer(
      tmp_path, CFG, 0, (), True) as writer:
    writer.write(1, "train", {"loss": 0.5})
    raise errors.Preempted("SIGTERM")
  with writers.Writer(tmp_path, CFG, 1, ["loss"], True) as writer:
    writer.write(2, "train", {"loss": 0.25})
    writer.write(2, "eval", {"top1": 0.75})
    writer.finish({"step": 2})
  assert capfd.readouterr() == ("", "")
  run_id = json.loads((tmp_path / "wandb_run.json").read_text())["id"]
  for _ in range(100):  # Its process writes the last records soon after.
    found = dict(told(path, run_id) for path in tmp_path.glob(
        f"wandb/offline-run-*/run-{run_id}.wandb"))
    if None not in found:
      break
    time.sleep(0.2)
  assert found == {143: {"train/loss": 0.5},
                   0: {"train/loss": 0.25, "eval/top1": 0.75}}


def told(path, run_id):
  """The exit code, and the metrics, that the real package has recorded."""
  values, code = {}, None
  for record in records(path):
    for item in record.history.item:
      key = item.key or "/".join(item.nested_key)
      values[key] = json.loads(item.value_json)
    if record.HasField("exit"):
      code = record.exit.exit_code
    if record.HasField("run"):
      assert (record.run.project, record.run.run_id) == ("mixers", run_id)
  return code, {key: value for key, value in values.items() if "/" in key}
