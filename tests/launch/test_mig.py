"""launch/tpu_vm.py --backend=mig against a simulated gcloud.

As test_launch.py, whose golden files are of queued resources.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from launches import ROOT, check_golden, commands, read_state

WHERE = ["--name=s24", "--zone=us-east5-a", "--project=p"]
RUN = ["--", "--config=configs/poolformer_s24.py",
       "--workdir=gs://runs-bucket/s24",
       "--config.data.path=gs://data-bucket/tfds"]
LIMITS = ["--poll_seconds=0", "--max_restarts=2", "--max_refusals=2"]
SUPERVISE = ["supervise", *WHERE, "--accelerator=v6e-8", "--spot", *LIMITS,
             *RUN]
OURS = "metaformer_jax launcher 0123456789ab"
FLAKE = "HTTPError 503: Service Unavailable"
UP = [["RUNNING"]]

# name -> (scenario, exit code, part of the expected message); two hosts.
SCENARIOS = {
    "success": ({
        "queue": UP, "runs": [["running", "running", [0, 0]]]}, 0, "done"),
    "waiting": ({
        "queue": [["CREATING", "CREATING", "STAGING", "RUNNING"]],
        "runs": [["running", [0, 0]]]}, 0, "s24 is CREATING"),
    # The group waits for machines by itself: nothing is billed meanwhile.
    "stockout": ({
        "queue": [["CREATING:ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"] * 9
                  + ["RUNNING"]], "runs": [[[0, 0]]]}, 0,
        "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS: why"),
    "no_quota": ({
        "queue": [["CREATING:QUOTA_EXCEEDED"]] * 3, "runs": []}, 1,
        "request more quota"),
    "preempted_at_start": ({
        "queue": [["CREATING", "RUNNING", "STOPPING"], ["RUNNING"]],
        "runs": [[[0, 0]]], "faults": {"install": ["connection lost"]}}, 0,
        "s24 is STOPPING"),
    "preempted": ({
        "queue": [["RUNNING"] * 4 + ["STOPPING"], ["RUNNING"]],
        "runs": [["running"], ["running", [0, 0]]], "steps": [0, 1000]}, 0,
        "s24 is STOPPING"),
    # The machines save before their state changes.
    "preempted_while_saving": ({
        "queue": [["RUNNING"] * 3 + ["STOPPED"], ["RUNNING"]],
        "runs": [["running", [143, 143]], ["running", [0, 0]]],
        "steps": [0, 700]}, 0, "from step 700"),
    "repaired": ({
        "queue": [["REPAIRING"], ["RECREATING"], ["RUNNING"]],
        "runs": [[[0, 0]]]}, 0, "s24 is RECREATING"),
    "lost_host": ({
        "queue": UP * 2, "runs": [["running", [134, None]], [[0, 0]]]}, 0,
        "1 hosts do not answer"),
    "diverged": ({
        "queue": UP, "runs": [["running", [134, 3]]]}, 3,
        "the last line of the log"),
    "one_host": ({
        "hosts": 1, "queue": UP, "runs": [["running", [0]]]}, 0, "done"),
    # What the zone does not have is not asked for again, and nothing is left.
    "unknown_zone": ({
        "queue": [], "runs": [],
        "faults": {"create": ["404 The resource z was not found"]}}, 2,
        "run the same command again"),
    "permission_denied": ({
        "queue": [], "runs": [], "faults": {"template create": [
            "403 Required 'compute.instanceTemplates.create' permission"]}}, 2,
        "PERMISSION_DENIED"),
    "policy_refused": ({
        "queue": [], "runs": [], "faults": {"policy create": [
            "400 Invalid value for field 'acceleratorTopology'"]}}, 2,
        "INVALID_ARGUMENT"),
    "unauthorised": ({
        "queue": [], "runs": [],
        "faults": {"describe": ["401 Invalid credentials"] * 8}}, 2,
        "8 times in a row"),
    "request_refused": ({
        "queue": [["CREATING:CONDITION_NOT_MET"]], "runs": []}, 2,
        "fix the command"),
    "operation_refused": ({
        "queue": UP, "runs": [[[0, 0]]],
        "faults": {"create": ["QUOTA_EXCEEDED Quota 'TPUS' exceeded"]}}, 0,
        "trying again later"),
    "network_flakes": ({
        "queue": UP, "runs": [["running", "running", [0, 0]]],
        "faults": {kind: [FLAKE, "", FLAKE] for kind in (
            "describe", "list-instances", "template create", "policy create",
            "create", "delete", "ls")} | {"scp": ["", FLAKE]}}, 0,
        "Service Unavailable"),
    # Of a launcher that was killed: with other flags, so they are replaced.
    "left_over": ({
        "queue": UP, "runs": [[[0, 0]]], "template": OURS, "policy": OURS}, 0,
        "done"),
    "deleted_by_someone_else": ({
        "queue": [["RUNNING"] * 3 + ["ABSENT"]], "runs": [["running"]]}, 1,
        "deleted by someone else"),
    "foreign_template": ({
        "queue": [], "runs": [], "template": "of another team"}, 2,
        "the instance template s24 exists, and was not made by"),
    "foreign_group": ({
        "queue": UP, "runs": [], "group": "of another team"}, 2,
        "the managed instance group s24 exists, and was not made by"),
    "something_else_runs": ({
        "queue": UP, "runs": [["running"]], "group": OURS,
        "foreign": "0123456789ab"}, 2, "used by another run"),
    "attached_again": ({
        "queue": UP, "runs": [["running", [0, 0]]], "group": OURS,
        "template": OURS, "policy": OURS, "foreign": "THIS"}, 0, "done"),
}
DRY = {
    "create": ["create", *WHERE, "--accelerator=v5p-32",
               "--create_flag=--service-account=trainer@p.example"],
    "run": ["run", *WHERE, "--backend=mig", *RUN],
    "supervise": SUPERVISE,
    "supervise_tpu7x": ["supervise", *WHERE, "--accelerator=tpu7x-8", *RUN],
    "status": ["status", *WHERE, "--backend=mig"],
    "logs": ["logs", *WHERE, "--backend=mig", "--lines=20", "--follow"],
    "exec": ["exec", *WHERE, "--backend=mig", "--", "df", "-h"],
    "delete": ["delete", *WHERE, "--backend=mig"],
}


@pytest.fixture
def play(world):
  """As `world`, with two hosts."""
  def start(**scenario):
    return world(**({"hosts": 2} | scenario))

  return start


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_supervisor_does_the_right_thing(name, launcher, play, capsys):
  scenario, code, message = SCENARIOS[name]
  if scenario.get("foreign") == "THIS":
    run = launcher.cloud.Run.of(RUN[1:])
    scenario = scenario | {"foreign": run.id}
  folder = play(**scenario)
  argv = SUPERVISE
  if name == "one_host":
    argv = [a.replace("v6e-8", "v5p-8") for a in argv]
  assert launcher.main(argv) == code
  assert message in capsys.readouterr().err
  calls = commands(folder)
  check_golden(f"mig_{name}", calls, folder)
  state = read_state(folder)
  # Nothing is left, but for what others made or a request that was refused.
  left = {"foreign_group", "foreign_template", "request_refused",
          "something_else_runs", "deleted_by_someone_else"}
  parts = [state["exists"], state["template"], state["policy"]]
  assert any(parts) == (name in left)
  if name.startswith("foreign"):
    assert " delete " not in calls and "worker.sh" not in calls
  starts = calls.count("bash worker.sh start")
  assert starts == scenario.get("hosts", 2) * (
      len(scenario["runs"]) - ("foreign" in scenario))


@pytest.fixture
def changed(launcher, monkeypatch):
  """Replaces the supervisor's sleep or clock."""
  start = launcher.supervisor.Supervisor.__init__
  return lambda **given: monkeypatch.setattr(
      start, "__kwdefaults__", start.__kwdefaults__ | given)


def test_a_run_that_hangs_is_restarted(launcher, play, changed, capsys):
  folder = play(queue=UP, runs=[["running"], [[0, 0]]], steps=[600])
  changed(clock=itertools.count(step=3600.0).__next__)
  assert launcher.main(SUPERVISE) == 0
  assert "in 14400 seconds: the run hangs" in capsys.readouterr().err
  check_golden("mig_hang", commands(folder), folder)


def test_ctrl_c_leaves_the_run_and_says_how_to_continue(
    launcher, play, changed, capsys):
  folder = play(queue=UP, runs=[["running"]])

  def interrupt(seconds):
    raise KeyboardInterrupt

  changed(sleep=interrupt)
  assert launcher.main(SUPERVISE) == 130
  assert "attaches again" in capsys.readouterr().err
  check_golden("mig_ctrl_c", commands(folder), folder)
  state = read_state(folder)
  assert state["exists"] and len(state["did"]["started"]) == 2


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_only_prints_the_commands(name, launcher, play, capsys):
  folder = play(queue=[], runs=[])
  command, *rest = DRY[name]
  assert launcher.main([command, "--dry_run", *rest]) == 0
  assert not (folder / "calls").exists()
  check_golden(f"mig_dry_run_{name}", capsys.readouterr().out, folder)


def test_a_dry_run_prints_what_is_run(launcher, play, capsys):
  folder = play(queue=UP, runs=[[[0, 0]]])
  assert launcher.main(["supervise", "--dry_run", *SUPERVISE[1:]]) == 0
  printed = re.sub(r"s24-000(\d)", r"s24-0\g<1>0x", capsys.readouterr().out)
  assert launcher.main(SUPERVISE) == 0
  _, calls = commands(folder).split("\n", 1)  # The first is `git status`.
  assert calls == printed


@pytest.mark.parametrize("accelerator, machine, hosts, topology", [
    # cloud.google.com/tpu/docs/v5p, v6e, tpu7x; v5p and tpu7x count cores.
    ("v5p-8", "ct5p-hightpu-4t", 1, None),
    ("v5p-16", "ct5p-hightpu-4t", 2, "2x2x2"),
    ("v5p-32", "ct5p-hightpu-4t", 4, "2x2x4"),
    ("v5p-64", "ct5p-hightpu-4t", 8, "2x4x4"),
    ("v5p-128", "ct5p-hightpu-4t", 16, "4x4x4"),
    ("v5p-256", "ct5p-hightpu-4t", 32, "4x4x8"),
    ("v6e-1", "ct6e-standard-1t", 1, None),
    ("v6e-4", "ct6e-standard-4t", 1, None),
    ("v6e-8", "ct6e-standard-4t", 2, "2x4"),
    ("v6e-16", "ct6e-standard-4t", 4, "4x4"),
    ("v6e-32", "ct6e-standard-4t", 8, "4x8"),
    ("v6e-256", "ct6e-standard-4t", 64, "16x16"),
    ("tpu7x-8", "tpu7x-standard-4t", 1, None),
    ("tpu7x-128", "tpu7x-standard-4t", 16, "4x4x4")])
def test_the_shape_of_a_slice(accelerator, machine, hosts, topology, launcher):
  found = launcher.mig.shape(accelerator)
  assert (found.machine, found.hosts) == (machine, hosts)
  assert topology in (None, found.topology)


@pytest.mark.parametrize("argv, message", [
    (["--accelerator=v4-8", "--backend=mig"], "--backend=queued"),
    (["--accelerator=v5litepod-8", "--backend=mig"], "--backend=queued"),
    (["--accelerator=tpu7x-8", "--backend=queued"], "--backend=mig"),
    (["--accelerator=v6e-8", "--backend=gke"], "invalid choice"),
    (["--accelerator=v6e-12"], "power of two"),
    (["--accelerator=v6e-2"], "power of two"),
    (["--accelerator=v6e-512"], "from 4 to 256"),
    (["--accelerator=v5p-4"], "from 8 to 8192"),
    (["--accelerator=v5p-9"], "power of two"),
    (["--accelerator=v6e-8", "--zone=z"], "--zone=z"),
    (["--accelerator=v6e-8", f"--name={'a' * 55}"], "54 characters")])
def test_a_wrong_command_line_is_one_line(argv, message, launcher, capsys):
  assert launcher.main(["create", *WHERE, *argv]) == 2
  found = capsys.readouterr()
  assert found.out == "" and found.err.count("\n") == 1
  assert found.err.startswith("UsageError: ") and message in found.err


def test_a_group_needs_the_project(launcher, capsys):
  assert launcher.main(["create", *WHERE[:2], "--accelerator=v6e-8"]) == 2
  assert "--project" in capsys.readouterr().err


def test_older_generations_stay_queued_resources(launcher):
  def kind(*flags):
    args, _ = launcher.parse(["create", *WHERE, *flags])
    return type(launcher.make_slice(args)).__name__

  assert [kind(f"--accelerator={a}") for a in (
      "v2-8", "v4-8", "v5litepod-8", "v5p-8", "v6e-8", "tpu7x-8")] == [
          "QueuedSlice"] * 3 + ["MigSlice"] * 3
  assert kind("--accelerator=v6e-8", "--backend=queued") == "QueuedSlice"


@pytest.mark.parametrize("status, error, kind", [
    (404, {"code": 404, "message": "exists quota"}, "absent"),
    (409, {"code": 409, "message": "was not found"}, "exists"),
    (403, {"code": 403, "errors": [{"reason": "forbidden"}]}, "refused"),
    (403, {"code": 403, "errors": [{"reason": "quotaExceeded"}]}, "quota"),
    (403, {"code": 403, "errors": [{"reason": "rateLimitExceeded"}]}, "failed"),
    (400, {"code": 400, "errors": [
        {"reason": "resourceInUseByAnotherResource"}]}, "failed"),
    (400, {"code": 400, "message": "401"}, "refused"), (500, {}, "failed"),
    (200, {"errors": [{"code": "QUOTA_EXCEEDED"}]}, "quota"),
    (200, {"errors": [{"code": "QUOTA_EXCEEDED", "errorDetails": [
        {"quotaInfo": {"limit": 0.0}}]}]}, "refused"),
    (200, {"errors": [{"code": "ZONE_RESOURCE_POOL_EXHAUSTED"}]}, "capacity"),
    (200, {"errors": [{"code": "NEW_CODE", "message": "quota"}]}, "unknown"),
    (200, {}, "unknown"), (200, None, "unknown"), (404, None, "absent")])
def test_the_logged_answer_decides(status, error, kind, launcher):
  body = "<html>" if error is None else json.dumps({"error": error}, indent=2)
  err = (f"---- response start ----\nstatus: 404\n-- body start --\n{{}}\n"
         "-- body end --\n---- response end ----\n"
         f"---- response start ----\nstatus: {status}\n-- headers start --\n"
         f"-- body start --\n{body}\n-- body end --\n---- response end ----\n"
         "ERROR: (gcloud.compute.instance-templates.create) Could not fetch "
         "resource:\n - quota NOT_FOUND was not found already exists\n")
  gcloud = launcher.commands.Gcloud(
      lambda args, timeout: (1, b"", err.encode()))
  with pytest.raises(launcher.commands.CloudError) as caught:
    gcloud(["gcloud", "compute", "instance-templates", "create"])
  found = launcher.mig.compute.classified(caught.value)
  assert found.kind == kind and "\n" not in str(found)


def test_status_names_every_host(launcher, play, capsys):
  play(hosts=3, queue=UP, runs=[[[0, None, 137]]], group=OURS,
       foreign="0123456789ab")
  assert launcher.main(["status", *WHERE, "--backend=mig"]) == 0
  assert capsys.readouterr().out == (
      "slice s24 RUNNING\nnode RUNNING, hosts 3\n"
      "worker 0 run 0123456789ab 0\nworker 2 run 0123456789ab 137\n"
      "1 hosts do not answer\n")


def test_a_command_for_one_host(launcher, play, capfd):
  folder = play(hosts=3, queue=UP, runs=[["running"]], group=OURS,
                foreign="0123456789ab")
  where = [*WHERE, "--backend=mig"]
  state = "if [ -f worker.sh ]; then"
  assert launcher.main(["exec", *where, "--worker=1", "--", state]) == 0
  assert commands(folder).splitlines()[-1].startswith(
      "gcloud compute ssh s24-010x ")
  assert capfd.readouterr().out == "worker s24-010x 0123456789ab running\n"
  assert launcher.main(["exec", *where, "--worker=3", "--", state]) == 2
  assert "--worker=3: give 0 to 2" in capfd.readouterr().err


def test_commands_run_at_the_same_time(launcher, monkeypatch):
  monkeypatch.setattr(launcher.commands, "AT_ONCE", 4)
  together = threading.Barrier(4, timeout=20)

  def execute(args, timeout):
    together.wait()
    return int(args[1] == "2"), args[1].encode(), b"no"

  found = launcher.commands.Gcloud(execute).each(
      [["x", str(i)] for i in range(4)])
  assert [str(f) for f in found] == ["0", "1", "no", "3"]
  assert isinstance(found[2], launcher.commands.CloudError)


def test_ctrl_c_ends_commands_on_all_hosts(tmp_path):
  script = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT / "launch")!r})
import commands
print("ready", flush=True)
try:
  commands.Gcloud().each([["sh", "-c", "touch {tmp_path}/" + str(i)
                           + "; exec sleep 300"] for i in range(3)])
except KeyboardInterrupt:
  sys.exit(130)
"""
  with subprocess.Popen([sys.executable, "-c", script], stdout=-1) as p:
    assert p.stdout.readline() == b"ready\n"
    end = time.monotonic() + 20
    while len(os.listdir(tmp_path)) < 3 and time.monotonic() < end:
      time.sleep(0.02)
    p.send_signal(signal.SIGINT)
    assert p.wait(20) == 130
