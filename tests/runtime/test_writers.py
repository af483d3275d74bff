"""The records of a run after a restart, and on a damaged or full disk."""

import json
import logging
import pathlib
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing import event_accumulator

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import writers


def written(workdir, restored, steps, **log):
  """The records after a start from `restored` that did these steps."""
  writer = writers.Writer(workdir, schema.Log(**log), restored, (), True)
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


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.tmp"])
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
writer = writers.Writer(pathlib.Path(sys.argv[1]), schema.Log(), 0, (), True)
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
  writer = writers.Writer(tmp_path, schema.Log(tensorboard=False), 0, ["loss"],
                          True)
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
