"""launch/tpu_vm.py against a simulated gcloud.

The commands of every scenario are compared with tests/golden/launch; to update
these: UPDATE_GOLDEN=1 pytest -n0 tests/launch/test_launch.py
"""

import ast
import re
import shlex
import subprocess
import sys
import tarfile

import pytest
from launches import ROOT, check_golden, commands, read_state

WHERE = ["--name=s24", "--zone=us-west4-a"]
SLICE = ["--accelerator=v5litepod-8", "--spot"]
RUN = ["--", "--config=configs/poolformer_s24.py",
       "--workdir=gs://runs-bucket/s24", "--config.data.source=tfds",
       "--config.data.path=gs://data-bucket/tfds", "--config.seed=1"]
SUPERVISE = ["supervise", *WHERE, *SLICE, "--poll_seconds=0",
             "--max_restarts=2", "--max_refusals=2", *RUN]

QUOTA = ("RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been "
         "exceeded. Limit: 8 in zone us-west4-a.")
NO_CAPACITY = ('{\n  "code": 8,\n  "message": "There is no more capacity in '
               'the zone \\"us-west4-a\\""\n}')
FLAKE = "Could not reach https://tpu.googleapis.com: timed out"

# name -> (scenario, exit code, part of the expected message)
SCENARIOS = {
    "success": ({
        "queue": [["ACTIVE"]], "runs": [["running", "running", [0]]]}, 0,
        "done"),
    "waiting": ({
        "queue": [["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES",
                   "PROVISIONING", "ACTIVE"]],
        "runs": [["running", [0]]]}, 0, "WAITING_FOR_RESOURCES"),
    "suspended_before_start": ({
        "queue": [["WAITING_FOR_RESOURCES", "SUSPENDING", "SUSPENDED"],
                  ["ACTIVE"]], "runs": [[[0]]]}, 0, "SUSPENDED"),
    "preempted": ({
        "queue": [["ACTIVE"] * 4 + ["SUSPENDING", "SUSPENDED"], ["ACTIVE"]],
        "runs": [["running"], ["running", [0]]], "steps": [0, 1000]}, 0,
        "SUSPENDED"),
    # The machines get SIGTERM before the state of the queue changes.
    "preempted_while_saving": ({
        "queue": [["ACTIVE"] * 3 + ["SUSPENDING", "SUSPENDED"], ["ACTIVE"]],
        "runs": [["running", [143]], ["running", [0]]], "steps": [0, 700]}, 0,
        "from step 700"),
    "killed_worker": ({
        "hosts": 2, "queue": [["ACTIVE"]],
        "runs": [["running", [134, 137]], ["running", [0, 0]]],
        "steps": [0, 1000]}, 0, "exit codes [134, 137]"),
    "lost_host": ({
        "hosts": 2, "queue": [["ACTIVE"], ["ACTIVE"]],
        "runs": [["running", [134, None]], ["running", [0, 0]]]}, 0,
        "1 hosts do not answer"),
    "silent_slice": ({
        "queue": [["ACTIVE"], ["ACTIVE"]],
        "runs": [["running", [None]], [[0]]]}, 0, "does not answer"),
    "diverged": ({
        "hosts": 2, "queue": [["ACTIVE"]], "runs": [["running", [3, 3]]]}, 3,
        "diverged"),
    "diverged_and_followers": ({
        "hosts": 3, "queue": [["ACTIVE"]],
        "runs": [["running", [134, 3, 134]]]}, 3,
        "the last line of the log"),
    "misconfigured": ({
        "hosts": 2, "queue": [["ACTIVE"]], "runs": [[[2, 2]]]}, 2,
        "a configuration error"),
    "no_quota_at_first": ({
        "queue": [["ACTIVE"]], "runs": [[[0]]],
        "faults": {"create": [QUOTA, QUOTA]}}, 0, "trying again later"),
    "no_quota": ({
        "queue": [["ACTIVE"]], "runs": [],
        "faults": {"create": [QUOTA] * 3}}, 1,
        "request more quota"),
    "quota_of_zero": ({
        "queue": [], "runs": [],
        "faults": {"create": [QUOTA.replace("8", "0")]}}, 2, "Limit: 0"),
    # Nothing is billed meanwhile, so --max_refusals does not count.
    "no_capacity_for_long": ({
        "queue": [["ACTIVE"]], "runs": [[[0]]],
        "faults": {"create": [NO_CAPACITY] * 9}}, 0, "no more capacity"),
    "unknown_zone": ({
        "queue": [], "runs": [], "faults": {"create": [
            "NOT_FOUND: Resource 'projects/p/locations/z' was not found"]}}, 2,
        "run the same command again"),
    "login_expires": ({
        "queue": [["ACTIVE"]], "runs": [["running", [0]]],
        "faults": {"describe": [""] * 2 + ["UNAUTHENTICATED: Request had "
                                           "invalid credentials"] * 7}}, 0,
        "UNAUTHENTICATED"),
    "login_expired": ({
        "queue": [["ACTIVE"]], "runs": [], "faults": {"describe": [
            "There was a problem refreshing your current auth tokens: "
            "Reauthentication failed. cannot prompt during non-interactive "
            "execution."] * 8}}, 2, "8 times in a row"),
    "request_failed": ({
        "queue": [["WAITING_FOR_RESOURCES", "FAILED:8"], ["ACTIVE"]],
        "runs": [[[0]]]}, 0, "FAILED: RESOURCE_EXHAUSTED: why"),
    "request_refused": ({
        "queue": [["FAILED:3"]], "runs": []}, 2, "fix the command"),
    "permission_denied": ({
        "queue": [], "runs": [], "faults": {"create": [
            "PERMISSION_DENIED: Permission 'tpu.nodes.create' denied"]}}, 2,
        "PERMISSION_DENIED"),
    "network_flakes": ({
        "queue": [["ACTIVE"]], "runs": [["running", "running", [0]]],
        "faults": {"describe": [FLAKE, "", FLAKE, "", FLAKE],
                   "tpu-vm ssh": ["", "", "", "", FLAKE], "ls": [FLAKE],
                   "delete": [FLAKE], "tpu-vm scp": [FLAKE]}}, 0, "timed out"),
    "fruitless": ({
        "queue": [["ACTIVE"]], "runs": [["running", [1]]] * 3,
        "steps": [600]}, 1,
        "no checkpoint after step 600 in 3 attempts"),
    # Each attempt makes progress, so their number is not limited.
    "slow_progress": ({
        "queue": [["ACTIVE"]], "runs": [[[1]]] * 4 + [[[0]]],
        "steps": list(range(600, 1600, 100))}, 0, "done"),
    "deleted_by_someone_else": ({
        "queue": [["ACTIVE", "ACTIVE", "ACTIVE", "ABSENT"]],
        "runs": [["running"]]}, 1, "deleted by someone else"),
    "something_else_runs": ({
        "queue": [["ACTIVE"]], "runs": [["running"]],
        "foreign": "0123456789ab"}, 2,
        "used by another run"),
    "something_else_ran": ({
        "queue": [["ACTIVE"]], "runs": [[[3]], ["running", [0]]],
        "foreign": "0123456789ab"}, 0, "done"),
    "attached_again": ({
        "queue": [["ACTIVE"]], "runs": [["running", [0]]],
        "foreign": "THIS"}, 0,
        "done"),
}

DRY = {
    "create": ["create", *WHERE, "--project=p", "--accelerator=v4-32",
               "--create_flag=--service-account=trainer@p.example"],
    "run": ["run", *WHERE, *RUN],
    "supervise": SUPERVISE,
    "status": ["status", *WHERE],
    "logs": ["logs", *WHERE, "--worker=3", "--lines=20", "--follow"],
    "restart": ["restart", *WHERE, "--ref=v1.0", *RUN],
    "exec": ["exec", *WHERE, "--", "df", "-h", "'/gcs'"],
    "delete": ["delete", *WHERE, "--project=p"],
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_supervisor_does_the_right_thing(name, launcher, world, capsys):
  scenario, code, message = SCENARIOS[name]
  if scenario.get("foreign") == "THIS":
    run = launcher.cloud.Run.of(RUN[1:])
    scenario = scenario | {"foreign": run.id}
  folder = world(**scenario)
  assert launcher.main(SUPERVISE) == code
  assert message in capsys.readouterr().err
  calls = commands(folder)
  check_golden(name, calls, folder)
  state = read_state(folder)
  # Only another run's slice, or a failed request, is left.
  left = {"something_else_runs", "request_refused"}
  assert state["exists"] == (name in left)
  starts = calls.count("bash worker.sh start")
  assert starts == len(scenario["runs"]) - ("foreign" in scenario)


@pytest.mark.parametrize("name", DRY)
def test_a_dry_run_only_prints_the_commands(
    name, launcher, world, capsys):
  folder = world(queue=[], runs=[])
  command, *rest = DRY[name]
  assert launcher.main([command, "--dry_run", *rest]) == 0
  assert not (folder / "calls").exists()
  check_golden(f"dry_run_{name}", capsys.readouterr().out, folder)


def test_a_dry_run_prints_what_is_run(launcher, world, capsys):
  folder = world(queue=[["ACTIVE"]], runs=[[[0]]])
  assert launcher.main(["supervise", "--dry_run", *SUPERVISE[1:]]) == 0
  printed = capsys.readouterr().out
  assert launcher.main(SUPERVISE) == 0
  # The first call is `git status`.
  _, calls = commands(folder).split("\n", 1)
  assert calls == printed


def test_a_slice_that_is_kept_is_mentioned(launcher, world, capsys):
  folder = world(queue=[["ACTIVE"]], runs=[[[3]]])
  assert launcher.main([SUPERVISE[0], "--keep", *SUPERVISE[1:]]) == 3
  assert "is billed; to delete it: gcloud" in capsys.readouterr().err
  assert read_state(folder)["exists"]
  assert "delete" not in commands(folder)


def test_the_launcher_needs_only_python():
  files = list((ROOT / "launch").glob("*.py"))
  known = sys.stdlib_module_names | {file.stem for file in files}
  for node in (node for file in files for node in
               ast.walk(ast.parse(file.read_text()))):
    names = ([alias.name for alias in node.names]
             if isinstance(node, ast.Import) else
             [node.module] if isinstance(node, ast.ImportFrom) else [])
    assert {name.partition(".")[0] for name in names} <= known


def test_only_what_is_committed_is_sent(launcher, tmp_path):
  class Git(launcher.commands.Gcloud):
    """Runs git, but not gcloud."""

    def __call__(self, args, timeout=300):
      return super().__call__(args, timeout) if args[0] == "git" else ""

  def git(*args):
    subprocess.run(["git", "-C", tmp_path, "-c", "user.name=n",
                    "-c", "user.email=e", *args], check=True)

  git("init", "--quiet")
  (tmp_path / "sent").write_text("as committed")
  git("add", "sent")
  git("commit", "--quiet", "--message=m")
  (tmp_path / "sent").write_text("as changed")
  (tmp_path / "new").write_text("not committed")
  args, _ = launcher.parse(["status", *WHERE])
  launcher.supervisor.launch(
      Git(), launcher.make_slice(args), launcher.cloud.Run.of(RUN[1:]),
      tmp_path, "HEAD")
  archive = tmp_path / "build" / "s24" / "metaformer_jax.tar.gz"
  with tarfile.open(archive) as found:
    assert found.getnames() == ["sent"]
    assert found.extractfile("sent").read() == b"as committed"


def test_the_commands_in_the_docs_work(launcher, capsys):
  pages = [ROOT / "docs" / "tpu.md", *(ROOT / "docs" / "tpu").glob("*.md")]
  text = "\n".join(p.read_text() for p in pages).replace("\\\n", " ")
  lines = re.findall(r"^python launch/tpu_vm\.py (.*)$", text, re.MULTILINE)
  documented = {line.split()[0] for line in lines}
  assert documented >= {"supervise", "status", "logs", "exec", "delete"}
  for line in lines:
    command, *rest = shlex.split(line.replace("BUCKET", "my-bucket"),
                                 comments=True)
    rest = [word for word in rest if word != "--dry_run"]
    assert launcher.main([command, "--dry_run", *rest]) == 0
    assert capsys.readouterr().out.startswith("gcloud ")


@pytest.mark.parametrize("argv, message", [
    (["fly"], "invalid choice"),
    (["create", *WHERE], "--accelerator"),
    (["create", *WHERE, "--accelerator=v9-8"], "v5litepod"),
    (["create", *WHERE, "--accelerator=v4;ls"], "v5litepod"),
    (["delete", "--name=-S24", "--zone=z"], "lower-case"),
    (["delete", *WHERE, "--", "--config=x"], "no arguments after --"),
    (["run", *WHERE], "--config is missing"),
    (["run", *WHERE, "--", "--config=c.py"], "gs://BUCKET/FOLDER"),
    (["run", *WHERE, "--", "--config=c.py", "--workdir=runs/x"],
     "gs://BUCKET/FOLDER"),
    (["run", *WHERE, "--", "--config=c.py", "--workdir=gs://b"],
     "gs://BUCKET/FOLDER"),
    (["run", *WHERE, "--", "--config", "c.py"], "--flag=value"),
    (["run", *WHERE, "--", "--config=c.py", "--workdir=gs://b/x",
      "--config.init=gs://BUCKET/y"], "not a valid bucket name"),
    (["exec", *WHERE], "needs a command"),
    (["supervise", *WHERE, *SLICE, "--poll_seconds=-1", *RUN],
     "--poll_seconds"),
    (["run", *WHERE, "--source=/dev", *RUN], "not a git checkout"),
])
def test_a_wrong_command_line_is_one_line(argv, message, launcher, capsys):
  assert launcher.main(argv) == 2
  found = capsys.readouterr()
  assert found.out == ""
  assert found.err.count("\n") == 1
  assert found.err.startswith("UsageError: ") and message in found.err


def test_ctrl_c_leaves_the_run_and_says_how_to_continue(
    launcher, world, capsys, monkeypatch):
  folder = world(queue=[["ACTIVE"]], runs=[["running"]])

  def interrupt(seconds):
    raise KeyboardInterrupt

  start = launcher.supervisor.Supervisor.__init__
  monkeypatch.setattr(start, "__kwdefaults__",
                      start.__kwdefaults__ | {"sleep": interrupt})
  assert launcher.main(SUPERVISE) == 130
  assert "attaches again" in capsys.readouterr().err
  state = read_state(folder)
  assert state["exists"] and not state["stopped"]


def test_status_names_every_host(launcher, world, capsys):
  world(hosts=3, queue=[["ACTIVE"]], runs=[[[0, None, 137]]],
        foreign="0123456789ab")
  assert launcher.main(["status", *WHERE]) == 0
  assert capsys.readouterr().out == (
      "slice s24 ACTIVE\nnode READY, hosts 3\n"
      "worker 0 run 0123456789ab 0\nworker 2 run 0123456789ab 137\n"
      "1 hosts do not answer\n")


@pytest.mark.parametrize("codes, over", [
    ([0], 0), ([0, 0], 0), ([3, 134], 3), ([134, 2], 2), ([2, 3], 3),
    ([0, 3], 3), ([1], None), ([143, 143], None), ([0, 137], None),
    ([134, 137], None), ([], None), ([127], None)])
def test_the_exit_code_contract(codes, over, launcher):
  assert launcher.supervisor.verdict(codes) == over


@pytest.mark.parametrize("codes, message", [
    ([134, 1], 1), ([0, 137], 137), ([134, 127, 1], 127), ([], 1),
    ([143], 143)])
def test_the_most_informative_code_is_returned(codes, message, launcher):
  assert launcher.supervisor.cause(codes) == message


def test_a_pause_doubles_up_to_an_hour(launcher, tmp_path):
  pauses = []
  watcher = launcher.supervisor.Supervisor(
      None, None, None, tmp_path, "HEAD", poll_seconds=60, max_restarts=1,
      max_refusals=1, hang_seconds=0, start_seconds=0, keep=False,
      sleep=pauses.append)
  for times in range(1, 31):
    watcher._back_off(times)
  for times, pause in enumerate(pauses):
    longest = min(60 * 2 ** times, 3600)
    assert longest / 2 <= pause <= longest
  assert len(set(pauses)) == len(pauses)  # Jitter.


def test_only_data_are_read_by_a_mount(launcher):
  run = launcher.cloud.Run.of([
      "--config=c.py", "--workdir=gs://runs/x/", "--config.init=gs://runs/y",
      "--config.data.path=gs://data/tfds",
      "-config.task.real_path=gs://other/real.json",
      "--config.log.compilation_cache=gs://runs/cache"])
  assert run.buckets == ("data", "other")
  assert run.flags == (
      "--config=c.py", "--workdir=gs://runs/x", "--config.init=gs://runs/y",
      "--config.data.path=/gcs/data/tfds",
      "-config.task.real_path=/gcs/other/real.json",
      "--config.log.compilation_cache=gs://runs/cache")
