"""Runs on gs://, against a fake server, that are killed, cut off and resumed.

`pytest -n0 -s -m soak tests/runtime/test_remote_runs.py` has the long forms.
"""

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time

import fake_gcs
import line_task
import numpy as np
import pods
import pytest
import small_runs
import test_interruptions

from metaformer_jax import errors, storage
from metaformer_jax.config import paths, typed
from metaformer_jax.runtime import mirror
from metaformer_jax.tools import checkpoints as checkpoints_tool

pytest.importorskip("metaformer_jax.gcs")
pytest.importorskip("gcp_storage_emulator")

LINE = """
import sys
import line_task, small_runs
from metaformer_jax import storage
small_runs.run(small_runs.line(train={"steps": 15}), line_task.LineTask(),
               storage.path(sys.argv[1]))
"""


@pytest.fixture
def cloud(tmp_path):
  """A server that keeps its objects when it is killed, and its proxy."""
  with fake_gcs.serving(tmp_path / "objects") as found:
    yield found


@pytest.fixture
def workdir(cloud, request):
  name = re.sub(r"\W+", "_", request.node.name)
  return storage.path(f"gs://{fake_gcs.BUCKET}/{name}")


def saved(workdir):
  """The steps that have a manifest."""
  return sorted(int(name.split("/")[0]) for name
                in (workdir / "checkpoints").objects()
                if re.fullmatch(r"\d+/manifest\.json", name))


def is_saving(workdir):
  return any(p.name.endswith(".unfinished")
             for p in (workdir / "checkpoints").iterdir())


def wait_until(happened, process=None, seconds=200):
  end = time.monotonic() + seconds
  while not happened():
    assert time.monotonic() < end and (process is None or
                                       process.poll() is None)
    time.sleep(0.01)


@pytest.mark.slow
def test_a_killed_run_equals_one_on_disk(workdir, tmp_path, capsys):
  """Bit for bit: what was logged and measured, and the state of each step."""
  process = subprocess.Popen(
      [sys.executable, "-c", LINE, str(workdir)], stderr=subprocess.DEVNULL,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(
          [str(pods.ROOT), str(pods.ROOT / "tests")])})
  try:
    wait_until(lambda: saved(workdir), process)
    wait_until(lambda: is_saving(workdir), process)
  finally:
    process.kill()
    process.wait()
  left, logged = saved(workdir), small_runs.records(workdir)
  assert left and logged[-1]["step"] >= left[-1]
  cfg = small_runs.line(train={"steps": 15}, log={"tensorboard": True})
  folder = tmp_path / "whole"
  task = line_task.LineTask()
  summaries = [small_runs.run(cfg, task, where) for where in (workdir, folder)]
  last = cfg.train.steps
  assert summaries[0]["checkpoint"] == f"{workdir}/checkpoints/{last}"
  assert summaries[0]["score"] == summaries[1]["score"]
  assert pods.losses(workdir) == pods.losses(folder)
  assert small_runs.records(workdir, "eval") == small_runs.records(
      folder, "eval")
  steps = saved(workdir)
  assert steps == sorted(int(p.parent.name) for p in
                         folder.glob("checkpoints/*/manifest.json"))
  for step in steps:
    got, want = (small_runs.restore(cfg, task, where, step)[0]
                 for where in (workdir, folder))
    for a, b in zip(*map(_leaves, (got, want)), strict=True):
      assert np.array_equal(a, b)
  names = {p.name for p in workdir.iterdir()}
  assert names == {"config.json", "parameters.txt", "metrics.jsonl",
                   "metrics.csv", "summary.json", "curves.png",
                   "checkpoints", "tensorboard"}
  assert json.loads((workdir / "summary.json").read_text()) == summaries[0]
  assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
  [events] = (workdir / "tensorboard").objects().values()
  assert events.size > 1000
  args = checkpoints_tool.parse(["verify", f"--workdir={workdir}"])
  assert checkpoints_tool.main(args) == 0
  assert capsys.readouterr().out.count("intact") == len(steps)


def _leaves(state):
  import jax  # noqa: PLC0415

  return [np.asarray(x) for x in jax.tree.leaves(state.trees())]


def test_metrics_are_stored_at_least_once_a_minute(workdir, monkeypatch):
  monkeypatch.setattr(mirror, "INTERVAL", 0.05)
  storage.write(workdir / "metrics.jsonl", "old\n")
  copies = mirror.Mirror(workdir)
  copies.fetch("metrics.jsonl")
  with (copies.folder / "metrics.jsonl").open("a") as file:
    file.write("new\n")
  wait_until(lambda: (workdir / "metrics.jsonl").read_text() == "old\nnew\n",
             seconds=20)
  (copies.folder / "sub").mkdir()
  (copies.folder / "sub/events").write_text("last")
  copies.close()
  assert (workdir / "sub/events").read_text() == "last"
  assert not copies.folder.exists()


class Runs(test_interruptions.Runs):
  """Its workdir is on object storage."""

  def __init__(self, folder, cfg, workdir):
    super().__init__(folder, cfg)
    self.workdir = workdir

  def saved(self):
    return saved(self.workdir)

  def saving(self):
    return is_saving(self.workdir)

  def end(self, rng, during_save):
    """Kills it at a random moment; returns whether it was saving."""
    first = max(self.saved(), default=0)
    while not self.over() and max(self.saved(), default=0) <= first:
      time.sleep(0.01)
    time.sleep(rng.random() * 0.5)
    while during_save and not self.over() and not self.saving():
      time.sleep(0.001)
    time.sleep(rng.random() * 0.2)
    os.kill(self.pid, signal.SIGSTOP)
    saving = self.saving()
    os.kill(self.pid, signal.SIGKILL)
    return saving


def assert_as_on_disk(runs, tmp_path):
  """The workdir is that of a run on disk which nothing has disturbed."""
  whole = tmp_path / "whole"
  runs.start(whole)
  assert runs.finish() == 0, runs.stderr.read_text()
  assert pods.losses(runs.workdir) == pods.losses(whole)
  assert small_runs.records(runs.workdir, "eval") == small_runs.records(
      whole, "eval")
  copy = tmp_path / "copy"
  folder = runs.workdir / "checkpoints" / str(runs.cfg.train.steps)
  for name in folder.objects():
    path = copy / "checkpoints" / folder.name / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (folder / name).download(path)
  got, want = (test_interruptions.arrays_of(where, runs.cfg.train.steps)
               for where in (copy, whole))
  assert any("opt_state" in name for name in want) and got == want


@pytest.fixture
def runs(tmp_path, workdir, request):
  started = Runs(tmp_path, test_interruptions.experiment_of(*request.param),
                 workdir)
  yield started
  started.close()


@pytest.mark.parametrize(("n", "runs"), [
    pytest.param(3, (60, 16), id="few", marks=pytest.mark.slow),
    pytest.param(100, (1000, 16), id="many", marks=pytest.mark.soak)],
    indirect=["runs"])
def test_kills(runs, n, tmp_path):
  rng, n_saving = random.Random(0), 0
  for i in range(n):
    runs.start()
    n_saving += runs.end(rng, during_save=i % 4 != 3)
    code = runs.finish()
    assert code in (-signal.SIGKILL, 0), runs.stderr.read_text()
    if code == 0:
      break
  print(f"{i + 1} kills, {n_saving} of them during a save; steps "
        f"{runs.saved()}")
  runs.start()
  assert runs.finish() == 0, runs.stderr.read_text()
  assert_as_on_disk(runs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("runs", [(120, 16)], indirect=True)
def test_faults_and_a_server_that_restarts(runs, cloud, tmp_path):
  """One request in forty fails, and the server is killed in the middle."""
  server, proxy = cloud
  proxy.faults = fake_gcs.every(40)
  runs.start()
  wait_until(lambda: len(runs.saved()) > 1)

  def restart():
    proxy.is_away = True
    time.sleep(1)  # It does not write its folder atomically.
    server.kill()
    time.sleep(5)
    server.start()
    proxy.is_away = False

  thread = threading.Thread(target=restart)
  thread.start()
  code = runs.finish()
  thread.join()
  print(f"{proxy.n_faults} faults")
  assert code == 0, runs.stderr.read_text()
  assert proxy.n_faults > 10
  proxy.faults = iter(())
  assert_as_on_disk(runs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [
    pytest.param({}, id="small arrays, which process 0 writes"),
    pytest.param({"data": 1, "fsdp": -1, "min_size": 8}, id="fsdp")])
def test_two_processes(workdir, tmp_path, mesh):
  """Both are killed and resume."""
  cfg = pods.small(
      train=dataclasses.replace(pods.small().train, steps=20),
      mesh=dataclasses.replace(pods.small().mesh, **mesh))
  processes = pods.start(cfg, workdir, 2, 2, tmp_path)
  wait_until(lambda: saved(workdir), processes[0])
  for process in processes:
    process.kill()
    process.wait()
  assert pods.finish(pods.start(cfg, workdir, 2, 2, tmp_path), 500) == [0, 0], (
      pods.said(tmp_path, workdir))
  whole = tmp_path / "whole"
  assert pods.finish(pods.start(cfg, whole, 2, 2, tmp_path), 500) == [0, 0]
  assert pods.losses(workdir) == pods.losses(whole)
  assert saved(workdir)[-1] == 20
  parts = {name.split("/")[2] for name in (workdir / "checkpoints").objects()
           if name.startswith("20/params/ocdbt.process_")}
  assert len(parts) == (2 if mesh else 1)


@pytest.mark.slow
def test_two_processes_go_on_while_the_bucket_is_away(workdir, tmp_path, cloud):
  proxy = cloud[1]
  cfg = pods.small(train=dataclasses.replace(pods.small().train, steps=150))
  processes = pods.start(cfg, workdir, 2, 2, tmp_path)
  wait_until(lambda: saved(workdir), processes[0])
  proxy.is_away = True
  wait_until(lambda: "not saved; training goes on" in pods.said(
      tmp_path, workdir), processes[0])
  proxy.is_away = False
  assert pods.finish(processes, 500) == [0, 0], pods.said(tmp_path, workdir)
  assert saved(workdir)[-1] == 150
  assert len(pods.losses(workdir)) == 150


@pytest.mark.slow
def test_commands(workdir, tmp_path):
  """A run, its evaluation, predictions and conversion, all on gs://."""
  cfg = dataclasses.replace(pods.small(), train=dataclasses.replace(
      pods.small().train, steps=6))
  assert pods.finish(pods.start(cfg, workdir, 1, 1, tmp_path)) == [0], (
      pods.said(tmp_path, workdir))

  def call(module, *args, code=0):
    found = subprocess.run(
        [sys.executable, "-m", f"metaformer_jax.{module}", *args],
        capture_output=True, text=True, env=pods.environment(1), cwd=tmp_path)
    assert found.returncode == code, found.stderr
    return found.stdout if code == 0 else found.stderr

  measured = json.loads(call("tools.evaluate", f"--workdir={workdir}"))
  [logged] = small_runs.records(workdir, "eval")[-1:]
  assert measured["top1"] == pytest.approx(logged["top1"], abs=1e-6)
  call("tools.convert", f"--input={workdir}", "--layout=flax",
       "--output=w.safetensors")
  file = workdir.with_name("weights") / "w.safetensors"
  file.write_bytes((tmp_path / "w.safetensors").read_bytes())
  row = json.loads(call("tools.evaluate", f"--weights={file}", "--json",
                        "--config.data.source=digits"))
  assert row["top1"] == measured["top1"]
  (tmp_path / "init.json").write_text(typed.to_json(
      dataclasses.replace(cfg, init=str(file))))
  call("main", "--config_json=init.json", f"--workdir={workdir}_2")
  said = call("main", "--config_json=init.json", "--workdir=gs://none/run",
              code=2)
  assert said.count("\n") == 1 and "gs://none/run" in said


def test_a_url_is_refused_where_files_are_needed():
  with pytest.raises(errors.ConfigError, match="is a URL; give a local path"):
    paths.local("--output", "gs://bkt/weights.safetensors")
