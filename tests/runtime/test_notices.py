"""Notices of the metadata server: the run saves and ends as with SIGTERM."""

import logging
import pathlib
import socket
import threading
import time

import line_task
import metadata_server
import pods
import pytest
import small_runs

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import notices

ENDING = [("preempted", "TRUE"),
          ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
          ("upcoming-maintenance", '{"maintenance_status": "ONGOING"}'),
          ("upcoming-maintenance", '{"maintenanceStatus": "ONGOING"}')]


class Noticed(line_task.Points):
  """Gives the notice at some batch, then waits until it has been received."""

  def __init__(self, at, give):
    self._at, self._give = at, give

  def train_batches(self, position):
    for batch in super().train_batches(position):
      position += 8
      if position // 8 == self._at:
        self._give()
      yield batch


def with_notice(at, give):
  task = line_task.LineTask()
  task.make_data = {"train": Noticed(at, give),
                    "eval": line_task.Points()}.get
  return task


def wait_until(done, seconds=10):
  end = time.monotonic() + seconds
  while not done():
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.fixture
def server(monkeypatch):
  with metadata_server.serving() as found:
    monkeypatch.setenv("GCE_METADATA_HOST", found.host)
    yield found


def test_a_notice_saves_and_ends_the_run(server, tmp_path, caplog):
  key = "preempted"
  caplog.set_level(logging.WARNING)
  cfg = small_runs.line(train={"steps": 12})
  whole = small_runs.run(cfg, line_task.LineTask(), tmp_path / "whole")
  assert not caplog.messages

  def give():
    wait_until(lambda: server.requests.count(key) >= 2)  # It waits for changes.
    server.put(key, "TRUE")
    wait_until(lambda: caplog.messages[1:])

  server.requests.clear()
  with pytest.raises(errors.Preempted, match="SIGTERM at step") as e:
    small_runs.run(cfg, with_notice(8, give), tmp_path / "parts")
  assert e.value.exit_code == 143
  assert caplog.messages[0].startswith(
      f"the metadata of this machine say {key}: ")
  saved = max(int(p.name) for p in (tmp_path / "parts/checkpoints").iterdir())
  assert 7 <= saved < 12
  server.put(key, "FALSE")
  summary = small_runs.run(cfg, line_task.LineTask(), tmp_path / "parts")
  assert summary["error"] == whole["error"]


@pytest.mark.parametrize("key, value", [
    ("preempted", "FALSE"), ("preempted", "true"),
    ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE"),
    ("upcoming-maintenance", '{"maintenance_status": "PENDING", "x": "y"}'),
    ("upcoming-maintenance", "ONGOING"), ("upcoming-maintenance", "[" * 60000),
    ("upcoming-maintenance", '["ONGOING"]')])
def test_other_values_change_nothing(key, value, server):
  told = []
  watch = notices.Watch(told.append)
  watch.start()
  wait_until(lambda: server.requests.count(key) >= 2)
  server.put(key, value)
  wait_until(lambda: server.requests.count(key) >= 3)
  watch.close()
  assert not told


@pytest.mark.parametrize("key, value", ENDING)
def test_what_is_so_at_the_start(key, value, server):
  """A maintenance: only its return counts, or a restarted run would end."""
  server.put(key, value)
  told = []
  watch = notices.Watch(told.append)
  watch.start()
  if key == "preempted":
    wait_until(lambda: told == [key])
    return
  wait_until(lambda: server.requests.count(key) >= 2)
  assert not told
  server.put(key, metadata_server.QUIET[key])
  wait_until(lambda: server.requests.count(key) >= 3)
  server.put(key, value)
  wait_until(lambda: told == [key])


GOOGLE = {"Metadata-Flavor": "Google", "ETag": "0"}


@pytest.mark.parametrize("answer", [
    (404, GOOGLE, b"TRUE"), (503, GOOGLE, b"TRUE"), (302, GOOGLE, b"TRUE"),
    (200, {}, b"TRUE"), (200, {"ETag": "0"}, b"TRUE"),
    (200, {"Metadata-Flavor": "Google"}, b"TRUE"),
    (200, GOOGLE | {"ETag": "0&x=1"}, b"TRUE"), (200, GOOGLE, b"\xff\xfe"),
    (200, GOOGLE | {"Content-Length": "9"}, b"TRUE"),
    (200, GOOGLE, b"TRUE" * 60000)])
def test_what_is_no_metadata_server_changes_nothing(
    answer, monkeypatch, caplog):
  monkeypatch.setattr(notices, "_PAUSE", 0.01)
  told = []
  with metadata_server.serving(answer=lambda key: answer) as server:
    monkeypatch.setenv("GCE_METADATA_HOST", server.host)
    watch = notices.Watch(told.append)
    watch.start()
    wait_until(lambda: server.requests.count("preempted") >= 3)
  watch.close()  # And the server is gone.
  assert not told
  assert not [r for r in caplog.records if r.levelno > logging.DEBUG]


@pytest.mark.parametrize("firmware", [None, b"KVM\n", b"", b"\xff"])
def test_elsewhere_nothing_is_asked(firmware, monkeypatch, tmp_path):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  path = tmp_path / "product_name"
  if firmware is not None:
    path.write_bytes(firmware)
  monkeypatch.setattr(notices, "_FIRMWARE", path)

  def refuse(*args, **kwargs):
    raise AssertionError("asked")

  monkeypatch.setattr(socket, "getaddrinfo", refuse)
  monkeypatch.setattr(threading.Thread, "start", refuse)
  notices.Watch(refuse).start()


def test_a_machine_of_google_asks_its_metadata_server(monkeypatch, tmp_path):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  path = pathlib.Path(tmp_path, "product_name")
  path.write_text("Google Compute Engine\n")
  monkeypatch.setattr(notices, "_FIRMWARE", path)
  monkeypatch.setattr(notices, "_PAUSE", 60.0)
  asked = []

  def resolve(host, port, *args):
    asked.append((host, port))
    raise socket.gaierror("not here")

  monkeypatch.setattr(socket, "getaddrinfo", resolve)
  watch = notices.Watch(asked.append)
  watch.start()
  wait_until(lambda: len(asked) == 3)
  watch.close()
  assert set(asked) == {("metadata.google.internal", 80)}


@pytest.mark.slow
def test_of_two_processes_one_is_told_and_both_save_the_same_step(tmp_path):
  cfg = pods.small(train=schema.Train(batch_size=16, steps=100_000))
  with metadata_server.serving() as server:
    pod = pods.start(cfg, tmp_path / "run", 2, 1, tmp_path,
                     last_env={"GCE_METADATA_HOST": server.host})
    pods.wait_for_step(pod, tmp_path / "run", 3)
    wait_until(lambda: server.requests.count("preempted") >= 2, 60)
    server.put("preempted", "TRUE")
    assert pods.finish(pod) == [143, 143]
  told = "the metadata of this machine say preempted"
  assert [told in pods.said(tmp_path, tmp_path / "run", i)
          for i in range(2)] == [False, True]
  ended = [next(line for line in pods.said(
      tmp_path, tmp_path / "run", i).splitlines() if "Preempted: " in line)
      for i in range(2)]
  assert ended[0] == ended[1] and "Preempted: SIGTERM at step" in ended[0]
