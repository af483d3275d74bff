"""Runs of several processes: the same numbers, joint ends, resumption."""

import dataclasses
import signal
import socket
import time

import pods
import pytest

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.runtime import devices, launchers, rendezvous
from metaformer_jax.tasks import classification
from metaformer_jax.training import loop


def train(cfg, workdir):
  """Trains on the eight devices of this process."""
  cfg, task = classification.create(cfg)
  loop.train_and_evaluate(cfg, task, devices.make_mesh(cfg), workdir)


def test_sigterm_to_one_saves_one_step_and_any_number_resumes(tmp_path):
  """SIGTERM to the second of 2 x 4, then 1 x 8: equals an uninterrupted run."""
  cfg = pods.small(train=schema.Train(
      batch_size=16, steps=24, ema_decay=0.9))
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  train(cfg, whole)
  pod = pods.start(cfg, parts, 2, 4, tmp_path)
  pods.wait_for_step(pod, parts, 4)
  pod[1].send_signal(signal.SIGTERM)
  time.sleep(0.1)
  pod[1].send_signal(signal.SIGTERM)
  assert pods.finish(pod) == [143, 143], pods.said(tmp_path, parts)
  ended = [pods.said(tmp_path, parts, i).splitlines()[-1] for i in (0, 1)]
  assert ended[0] == ended[1] and "Preempted: SIGTERM at step" in ended[0]
  step = int(ended[0].split(" at step ")[1].partition(";")[0])
  assert 4 < step < 24
  assert max(int(p.name) for p in (parts / "checkpoints").iterdir()
             if p.name.isdecimal()) == step
  train(cfg, parts)
  want, got = pods.losses(whole), pods.losses(parts)
  assert want.keys() == got.keys() == set(range(1, 25))
  for i in want:
    assert got[i] == pytest.approx(want[i], rel=1e-6 if i <= step + 1 else 1e-5)
  assert pods.summary(parts)["n_examples"] == 297
  for name in ("top1", "top5", "bad_images", "skipped_steps"):
    assert pods.summary(parts)[name] == pods.summary(whole)[name]


@pytest.mark.slow
def test_a_finished_pod_may_be_started_again(tmp_path):
  """All processes know that its last step is evaluated."""
  cfg = pods.small(train=schema.Train(batch_size=16, steps=6))
  summaries = []
  for _ in range(2):
    pod = pods.start(cfg, tmp_path / "run", 2, 2, tmp_path)
    assert pods.finish(pod) == [0, 0], pods.said(tmp_path, tmp_path / "run")
    summaries.append(pods.summary(tmp_path / "run"))
  assert summaries[0] == summaries[1]


@pytest.mark.soak
@pytest.mark.parametrize("stages", [
    pytest.param([(1, 8), (1, 4), (1, 1), (1, 8)], id="devices"),
    pytest.param([(2, 4), (1, 4), (4, 1), (2, 1)], id="processes"),
    pytest.param([(2, 2), (4, 2), (1, 1), (1, 8)], id="fsdp"),
])
def test_resumed_by_any_number_of_devices_and_processes(
    tmp_path, stages, request):
  """Every stage but the last ends with a SIGTERM to its last process."""
  cfg = pods.small()
  if "fsdp" in request.node.callspec.id:
    cfg = dataclasses.replace(cfg, mesh=schema.Mesh(
        data=1, fsdp=-1, min_size=8, heartbeat_seconds=5))
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  train(dataclasses.replace(cfg, mesh=schema.Mesh(data=1)), whole)
  resumed = []
  for i, (n_processes, n_devices) in enumerate(stages):
    pod = pods.start(cfg, parts, n_processes, n_devices, tmp_path)
    if i == len(stages) - 1:
      assert pods.finish(pod) == [0] * n_processes, pods.said(tmp_path, parts)
      break
    pods.wait_for_step(pod, parts, 8 * (i + 1))
    pod[-1].send_signal(signal.SIGTERM)
    assert pods.finish(pod) == [143] * n_processes, pods.said(tmp_path, parts)
    resumed.append(max(int(p.name) for p in (parts / "checkpoints").iterdir()
                       if p.name.isdecimal()))
  want, got = pods.losses(whole), pods.losses(parts)
  assert want.keys() == got.keys()
  difference = {i: abs(got[i] / want[i] - 1) for i in want}
  print(stages, "resumed at", resumed, "largest difference of a loss",
        f"{max(difference.values()):.1e}")
  assert all(difference[i + 1] < 1e-6 for i in resumed)
  assert max(difference.values()) < 1e-5


@pytest.mark.soak
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others(tmp_path, killed):
  cfg = pods.small(train=schema.Train(batch_size=16, steps=100_000))
  workdir = tmp_path / "run"
  pod = pods.start(cfg, workdir, 2, 1, tmp_path)
  pods.wait_for_step(pod, workdir, 6)
  pod[killed].kill()
  start = time.monotonic()
  codes = pods.finish(pod)
  assert time.monotonic() - start < cfg.mesh.heartbeat_seconds + 10
  assert codes[killed] == -9 and codes[1 - killed] not in (0, 2, 3, 143)
  other = pods.said(tmp_path, workdir, 1 - killed)
  assert ("stopped sending heartbeats):\n1\n" if killed
          else "the leader task") in other


@pytest.mark.slow
def test_config_error_of_one_process_ends_all_with_its_reason(tmp_path):
  cfg = pods.small()
  workdir = tmp_path / "run"
  workdir.mkdir()
  (workdir / "config.json").write_text("{")
  pod = pods.start(cfg, workdir, 2, 1, tmp_path)
  assert pods.finish(pod) == [2, 2]
  lines = [pods.said(tmp_path, workdir, i).splitlines()[-1] for i in (0, 1)]
  assert lines[0].startswith(f"ConfigError: --workdir: {workdir}")
  assert lines[1] == lines[0].replace("ConfigError: ",
                                      "ConfigError: process 0: ")


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[001-002]",
         "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
         "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
ALONE = {"cluster_detection_method": "deactivate"}


@pytest.mark.parametrize(("env", "flags", "want"), [
    pytest.param({}, (None, None, None), None, id="nothing"),
    pytest.param({}, (None, 1, 0), None, id="one"),
    pytest.param({}, ("a:1", 1, None), None, id="one-at-a-coordinator"),
    pytest.param(SLURM, (None, 1, None), None, id="one-of-slurms"),
    pytest.param({"OMPI_COMM_WORLD_SIZE": "?"}, (None, 1, None), None,
                 id="one-despite-the-environment"),
    pytest.param({}, ("a:1", 2, 1), {
        "num_processes": 2, "process_id": 1, "coordinator_address": "a:1",
        **ALONE}, id="flags"),
    pytest.param(SLURM, (None, None, None), {
        "num_processes": 2, "process_id": 1,
        "local_device_ids": [0, 1, 2, 3]}, id="slurm"),
    pytest.param({**SLURM, "SLURM_NTASKS": "8"}, (None, None, None), {
        "num_processes": 8, "process_id": 1}, id="slurm-of-each-gpu"),
    pytest.param(SLURM, ("a:1", None, None), {
        "num_processes": 2, "process_id": 1, "coordinator_address": "a:1",
        **ALONE}, id="slurm-and-coordinator"),
    pytest.param({k: v for k, v in SLURM.items() if "STEP" not in k},
                 (None, None, None), None, id="slurm-shell"),
    pytest.param({**SLURM, "SLURM_NTASKS": "1"}, (None, None, None), None,
                 id="slurm-of-one"),
    pytest.param(OMPI, (None, None, None), {
        "num_processes": 8, "process_id": 3}, id="ompi"),
])
def test_processes_of_the_environment(env, flags, want):
  assert launchers.arguments(env, *flags) == want


@pytest.mark.parametrize(("env", "flags", "reason"), [
    pytest.param({}, (None, 2, 0), "--coordinator: is missing", id="count"),
    pytest.param({}, (None, None, 1), "--coordinator: is missing", id="index"),
    pytest.param({}, ("a:1", None, None), "needs --process_count", id="alone"),
    pytest.param({}, ("a:1", 2, 2), "2 is not one of 2 processes", id="beyond"),
    pytest.param({}, ("a", 2, 1), "not HOST:PORT", id="no-port"),
    pytest.param({}, (":1", 2, 1), "not HOST:PORT", id="no-host"),
    pytest.param({}, ("a:99999", 2, 1), "not HOST:PORT", id="port"),
    pytest.param({k: v for k, v in OMPI.items() if "MCA" not in k},
                 (None, None, None), "Open MPI 5", id="ompi-5"),
    pytest.param({}, (None, 1, 1), "--coordinator: is missing", id="second"),
    pytest.param({**SLURM, "SLURM_PROCID": "x"}, (None, None, None),
                 "^SLURM_PROCID: .* 'x' is not a number", id="no-number"),
    pytest.param({k: v for k, v in OMPI.items() if "RANK" not in k},
                 (None, None, None), "^OMPI_COMM_WORLD_RANK: .* None is",
                 id="half-an-environment"),
])
def test_flags_that_do_not_fit_are_refused(env, flags, reason):
  with pytest.raises(errors.ConfigError, match=reason):
    launchers.arguments(env, *flags)


def test_second_process_0_is_reported():
  with socket.socket() as taken:
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # As gRPC's.
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(errors.WorkerLostError, match=f"port {port}: Address"):
      rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 5)
