"""The records of a run after a restart, and on a damaged or full disk."""

import csv
import json
import logging
import pathlib
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.plugins.hparams import api_pb2, metadata

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.config.model import Model
from metaformer_jax.runtime import writers


def experiment(**log):
  return schema.Experiment(
      model=Model("poolformer_s12", pool_size=5), log=schema.Log(**log))


def written(workdir, restored, steps, **log):
  """The records after a start from `restored` that did these steps."""
  writer = writers.Writer(workdir, experiment(**log), restored, (), True)
  for i in steps:
    writer.write(i, "train", {"loss": i + restored / 100})
  writer.close()
  return [r["step"] for r in writers.read(workdir / "metrics.jsonl")]


def test_restart_repeats_steps(tmp_path):
  assert written(tmp_path, 0, (1, 2, 3)) == [1, 2, 3]
  file, = (tmp_path / "tensorboard").iterdir()
  file.rename(file.with_name("events.out.tfevents.0.an-hour-ago"))
  assert written(tmp_path, 1, (2, 3, 4)) == [1, 2, 3, 4]
  events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
  events.Reload()
  assert {e.step: e.value for e in events.Scalars("train/loss")
          } == pytest.approx({1: 1.0, 2: 2.01, 3: 3.01, 4: 4.01})


def rows(workdir):
  with (workdir / "metrics.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_table_has_a_column_for_each_metric(tmp_path):
  """Also for those that come later, as of the first evaluation."""
  writer = writers.Writer(
      tmp_path, experiment(tensorboard=False), 0, (), True)
  assert rows(tmp_path) == []
  writer.write(1, "train", {"loss": 0.1, "of classes, worst": 2})
  writer.write(2, "train", {"loss": float("nan")})
  writer.write(2, "eval", {"top1": 0.25})
  writer.write(3, "train", {"loss": 1e-30})
  found = rows(tmp_path)  # Before it is closed.
  writer.close()
  assert [list(row) for row in found] == [
      ["step", "split", "loss", "of classes, worst", "top1"]] * 4
  assert [list(row.values()) for row in found] == [
      ["1", "train", "0.1", "2", ""], ["2", "train", "nan", "", ""],
      ["2", "eval", "", "", "0.25"], ["3", "train", "1e-30", "", ""]]


def test_table_of_a_resumed_run_has_each_step_once(tmp_path):
  written(tmp_path, 0, (1, 2, 3), tensorboard=False)
  with (tmp_path / "metrics.csv").open("a") as file:
    file.write("4,tra")  # The machine has crashed.
  written(tmp_path, 1, (2, 3, 4), tensorboard=False)
  assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [
      ("1", "1.0"), ("2", "2.01"), ("3", "3.01"), ("4", "4.01")]


def test_table_of_very_many_metrics_is_cut(tmp_path):
  writer = writers.Writer(
      tmp_path, experiment(tensorboard=False), 0, (), True)
  for i in range(300):
    writer.write(i, "train", {f"m{i}": i})
  writer.close()
  *_, last = found = rows(tmp_path)
  assert len(last) == 256 and last["step"] == "299"
  assert found[253]["m253"] == "253" and "m254" not in last


def test_hyper_parameters_are_in_tensorboard(tmp_path):
  with writers.Writer(tmp_path, experiment(), 0, ["loss"], True) as writer:
    writer.write(7, "eval", {"top1": 0.25})
    assert metadata.SESSION_END_INFO_TAG not in plugin_data(tmp_path)
    writer.finish({"step": 7})
  found = plugin_data(tmp_path)
  end = metadata.parse_session_end_info_plugin_data(
      found[metadata.SESSION_END_INFO_TAG])
  assert end.status == api_pb2.STATUS_SUCCESS
  start = metadata.parse_session_start_info_plugin_data(
      found[metadata.SESSION_START_INFO_TAG])
  values = {key: getattr(value, value.WhichOneof("kind"))
            for key, value in start.hparams.items()}
  assert values["model.pool_size"] == 5 and values["seed"] == 0
  assert values["model.name"] == "poolformer_s12"
  assert values["optim.decay_all"] is False
  assert values["optim.step_epochs"] == "[30.0, 60.0, 90.0]"
  # Neither what is not set, nor what changes no result.
  assert not {"model.norm", "log.tensorboard", "mesh.fsdp"} & values.keys()
  about = metadata.parse_experiment_plugin_data(found[metadata.EXPERIMENT_TAG])
  assert {info.name for info in about.hparam_infos} == values.keys()
  assert "eval/top1" in [info.name.tag for info in about.metric_infos]


def plugin_data(workdir):
  """What TensorBoard reads of a run's hyper-parameters, by tag."""
  events = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
  events.Reload()
  return events.PluginTagToContent("hparams")


@pytest.mark.parametrize("line", [
    b"garbage\n", b"\0" * 50 + b"\n", b'{"step": 1, "split": "\xff"}\n', b"\n",
    b"[1]\n", b'{"step": 2}\n', b'{"step": "2", "split": "train"}\n',
    b'{"step": true, "split": "train"}\n', b"[" * 99_999 + b"\n"],
    ids=lambda line: repr(line[:20]))
def test_line_that_is_not_a_record_is_ignored(tmp_path, line, caplog):
  written(tmp_path, 0, (1, 2), tensorboard=False)
  path = tmp_path / "metrics.jsonl"
  good = path.read_bytes()
  path.write_bytes(line + good)
  assert written(tmp_path, 2, (3,), tensorboard=False) == [1, 2, 3]
  assert path.read_bytes().startswith(good)
  assert caplog.messages == [f"{path}: 1 of 3 lines are not records; ignored"]
  assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize("end", [
    b'{"step": 3, "spl', '{"step": 3, "split": "é'.encode()[:-1], b"\0" * 99])
def test_incomplete_last_line_is_ignored(tmp_path, end, caplog):
  written(tmp_path, 0, (1, 2), tensorboard=False)
  with (tmp_path / "metrics.jsonl").open("ab") as f:
    f.write(end)
  assert written(tmp_path, 2, (3,), tensorboard=False) == [1, 2, 3]
  assert not caplog.messages


@pytest.mark.parametrize("name", [
    "metrics.jsonl", ".metrics.jsonl.tmp", "metrics.csv"])
def test_obstacle_is_named(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(errors.StorageError,
                     match=rf"{name}: cannot be written: Is a directory"):
    written(tmp_path, 0, (1,))


def test_file_in_place_of_the_events_is_named(tmp_path):
  (tmp_path / "tensorboard").write_text("")
  with pytest.raises(errors.StorageError, match="tensorboard: cannot be wri"):
    written(tmp_path, 0, (1,))


FULL = """
import pathlib, resource, sys
from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import writers
writer = writers.Writer(
    pathlib.Path(sys.argv[1]), schema.Experiment(), 0, (), True)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
try:
  for i in range(9999):
    writer.write(i, "train", {"loss" * int(sys.argv[2]): 1.0})
except errors.StorageError as e:
  print(e)
writer.close()
"""


@pytest.mark.parametrize("length", [1, 1000])  # Which file is full first.
def test_full_disk_is_one_line(tmp_path, length):
  done = subprocess.run([sys.executable, "-c", FULL, tmp_path, str(length)],
                        capture_output=True, text=True, timeout=60, check=True,
                        cwd=pathlib.Path(__file__).parents[2])
  assert done.stdout.count("\n") == 1 and "File too large" in done.stdout
  assert done.stderr == ""


def test_summary_is_written_atomically(tmp_path, monkeypatch):
  writer = writers.Writer(
      tmp_path, experiment(tensorboard=False), 0, ["loss"], True)
  writer.finish({"step": 1})
  before = (tmp_path / "summary.json").read_text()
  assert json.loads(before) == {"step": 1}

  def die(_):
    raise KeyboardInterrupt

  monkeypatch.setattr("os.fsync", die)
  with pytest.raises(KeyboardInterrupt):
    writer.finish({"step": 2, "long": "x" * 99_999})
  assert (tmp_path / "summary.json").read_text() == before
  writer.close()
