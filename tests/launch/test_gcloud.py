"""What gcloud prints: real messages, mistaken ones, and none."""

import os
import pathlib
import random
import sys
import time

import clouds
import pytest

ARGS = ["gcloud", "compute", "tpus", "queued-resources", "create"]
PATH = ".".join(ARGS)
WARNING = ("WARNING: Your active project does not match the quota project in "
           "your local Application Default Credentials file. This might result "
           "in unexpected quota issues.\n\n")
# What gcloud 537 printed for a quota, shortened.
HTTP = ("HttpError accessing <https://tpu.googleapis.com/v2/projects/p/nodes?"
        "alt=json>: response: <{{'vary': 'Origin', 'status': {status}}}>, "
        "content <{content}>\nThis may be due to network connectivity issues. "
        "Please check your network settings, and the status of the service you "
        "are trying to reach.\n")
QUOTA = """{
  "error": {
    "code": 429,
    "message": "Quota limit 'TPUV5sLitepodServingPerProjectPerZoneForTPUAPI' \
has been exceeded. Limit: %d in zone us-east5-a.",
    "status": "RESOURCE_EXHAUSTED",
    "details": [{"@type": "type.googleapis.com/google.rpc.QuotaFailure"}]
  }
}
"""
OPERATION = '{\n  "code": %d,\n  "message": "%s"\n}. Cleaned up: []'
NO_ZONE = ("Cloud TPU received a bad request. The requested zone "
           '"asia-south1-a" is not supported. [EID: 0x5a99c4b4f17f265]')

# (what follows "ERROR: (gcloud...) ", exit code, kind)
MESSAGES = [
    ("INVALID_ARGUMENT: " + NO_ZONE, 1, "refused"),
    ("PERMISSION_DENIED: Permission denied on 'locations/x' (or it may not "
     "exist). This command is authenticated as NOT_FOUND@quota.example", 1,
     "refused"),
    ("[me@x.example] does not have permission to access projects instance [p] "
     "(or it may not exist): quota", 1, "refused"),
    (OPERATION % (3, "FLEX_START provisioning model is not supported"), 1,
     "refused"),
    ("unrecognized arguments: --spt", 2, "refused"),
    ("argument --zone: expected one argument", 2, "refused"),
    ('SSH Key is not present in the SSH agent. Please run "ssh-add x"', 1,
     "refused"),
    (HTTP.format(status=429, content=QUOTA % 0), 1, "refused"),
    (HTTP.format(status=429, content=QUOTA % 4), 1, "quota"),
    ("RESOURCE_EXHAUSTED: Quota 'TPUV2sPreemptiblePod' exhausted. Limit 32 in "
     "zone europe-west4-a", 1, "quota"),
    ("RESOURCE_EXHAUSTED: Quota 'GPUS_ALL_REGIONS' exceeded. Limit: 0.0 "
     "globally.", 1, "refused"),
    ("RESOURCE_EXHAUSTED: You have no more\n- '@type': "
     "type.googleapis.com/google.rpc.QuotaFailure", 1, "quota"),
    (OPERATION % (8, "There is no more capacity in the zone; NOT_FOUND quota"),
     1, "capacity"),
    ("RESOURCE_EXHAUSTED: Insufficient reserved capacity. Contact customer "
     "support to increase your quota", 1, "capacity"),
    ("RESOURCE_EXHAUSTED: Quota exceeded for quota metric 'Read requests' and "
     "limit 'Read requests per minute' of service 'tpu.googleapis.com'", 1,
     "failed"),
    ("UNAUTHENTICATED: Request had invalid authentication credentials.", 1,
     "auth"),
    (HTTP.format(status=401, content="<html>"), 1, "auth"),
    ("There was a problem refreshing your current auth tokens: "
     "('invalid_grant: Bad Request', {'error': 'invalid_grant'})\nPlease run:"
     "\n\n  $ gcloud auth login\n", 1, "auth"),
    ("There was a problem refreshing your current auth tokens: "
     "HTTPSConnectionPool(host='oauth2.googleapis.com', port=443): Max retries "
     "exceeded\nPlease run:\n\n  $ gcloud auth login\n", 1, "failed"),
    ("You do not currently have an active account selected.", 1, "auth"),
    ("UNAVAILABLE: The service is currently unavailable: PERMISSION_DENIED", 1,
     "failed"),
    ("INTERNAL: an internal error, INVALID_ARGUMENT", 1, "failed"),
    ("DEADLINE_EXCEEDED: late", 1, "failed"),
    ("HTTPError 503: We encountered an internal error.", 1, "failed"),
    (HTTP.format(status="'502'", content="<html>Bad gateway</html>"), 1,
     "failed"),
    ("unable to find the server\nThis may be due to network connectivity "
     "issues. Please check", 1, "failed"),
    ("NOT_FOUND: Resource 'projects/p/x' was not found", 1, "absent"),
    ("HTTPError 404: The specified bucket does not exist.", 1, "absent"),
    ("gs://no-such-bucket not found: 404.", 1, "absent"),
    ("One or more URLs matched no objects.", 1, "absent"),
    ("Nodes instance [s24] not found: quota", 1, "absent"),
    ("ALREADY_EXISTS: Resource 's24' already exists", 1, "exists"),
    ("Nodes instance [s24] is the subject of a conflict: NOT_FOUND", 1,
     "exists"),
    ("[/usr/bin/ssh] exited with return code [255].", 1, "unknown"),
    ("The word quota, NOT_FOUND and UNAUTHENTICATED: within a text", 1,
     "unknown"),
    ("", 1, "unknown"),
    ('{"code": ' + "9" * 5000 + "}", 1, "unknown"),
    ('{"code": true, "message": []}', 1, "unknown"),
    ("[" * 50_000, 1, "unknown"),
    ("{" * 50_000, 1, "unknown"),
]


def kind(launcher, code, err, args=ARGS):
  """The kind of the error of a command that prints this."""
  gcloud = launcher.commands.Gcloud(lambda args, timeout: (code, b"", err))
  with pytest.raises(launcher.commands.CloudError) as caught:
    gcloud(args)
  assert "\n" not in str(caught.value) and str(caught.value).isprintable()
  assert 0 < len(str(caught.value)) <= 600
  return caught.value.kind


@pytest.mark.parametrize("text, code, expected", MESSAGES,
                         ids=range(len(MESSAGES)))
@pytest.mark.parametrize("before", ["", WARNING, "ERROR: (gcloud.x) quota\n"])
def test_the_kind_of_an_error(text, code, expected, before, launcher):
  err = f"{before}ERROR: ({PATH}) {text}\n".encode()
  assert kind(launcher, code, err) == expected


@pytest.mark.parametrize("crash, expected", [
    ("ConnectionError", "failed"), ("ReadTimeout", "failed"),
    ("ServerNotFoundError", "failed"), ("SSLError", "failed"),
    ("AttributeError", "unknown")])
def test_a_crash_of_gcloud(crash, expected, launcher):
  err = (f"ERROR: gcloud crashed ({crash}): PERMISSION_DENIED quota\n\n"
         "If you would like to report this issue, run\n  gcloud feedback\n")
  assert kind(launcher, 1, err.encode()) == expected


@pytest.mark.parametrize("args", [["git", "archive", "v9"], ARGS])
def test_what_another_program_prints_is_not_gclouds_error(args, launcher):
  # E.g. of the run's own tools on a host, whose exit code gcloud returns.
  err = (b"ERROR: (gcloud.storage.cp) PERMISSION_DENIED: no\n"
         b"gcsfuse: INVALID_ARGUMENT: quota\nRESOURCE_EXHAUSTED: NOT_FOUND\n")
  assert kind(launcher, 2, err, args=args) == "unknown"
  assert kind(launcher, -9, b"", args=args) == "unknown"


def test_a_failed_request_is_decided_by_its_code(launcher):
  def state(error):
    document = clouds.QUEUED | {"state": {"state": "FAILED",
                                          "failedData": {"error": error}}}
    return launcher.make_slice(args).state(
        lambda args: clouds.json.dumps(document))

  args, _ = launcher.parse(["status", "--name=s", "--zone=z"])
  kinds = {3: "refused", 5: "absent", 7: "refused", 8: "capacity",
           13: "failed", 16: "auth"}
  others = (9, 99, -1, True, "3", None, 3.5, [], 10 ** 400)
  for code, expected in [*kinds.items(), *((c, "unknown") for c in others)]:
    found = state({"code": code, "message": "PERMISSION_DENIED quota"})
    assert found.error.kind == expected
    assert found.final == (expected in ("refused", "absent", "auth"))
  for error in (None, [], "x", {"details": [None, "x", {"@type": 3}]}):
    assert state(error).error.kind == "unknown"


class Enough(Exception):
  """The supervisor has polled for long enough."""


@pytest.mark.parametrize("part", [
    0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 5))])
@pytest.mark.parametrize("backend", ["queued", "mig"])
def test_whatever_gcloud_prints_the_supervisor_goes_on_or_ends(
    backend, part, launcher, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(launcher.commands, "AT_ONCE", 1)  # By the seed alone.
  ends = set()
  for seed in range(100 * part, 100 * part + 100):
    ends.add(play(seed, backend, launcher, tmp_path))
    last = capsys.readouterr().err.splitlines()[-1]
    assert last and len(last) < 1000
  assert {0, "goes on"} < ends


def play(seed, backend, launcher, folder):
  """The exit code of a supervisor whose gcloud is wrong, or "goes on"."""
  rng = random.Random(seed)
  rate = rng.choice([0.05, 0.3, 1])
  errors = [text for text, _, _ in MESSAGES]
  end = rng.choice([0, 1, 2, 3, 255])
  kind = clouds.World if backend == "queued" else clouds.MigWorld
  world = kind(lambda start, seconds: (
      int(seconds // 200), end if seconds > 1000 else None))
  states = [clouds.QUEUED] * 20 + [clouds.FAILED]
  sleeps = []

  def execute(args, timeout):
    code, out, err = world.execute(args, timeout)
    if code == 0 and "describe" in args and "queued-resources" in args:
      out = clouds.json.dumps(rng.choice(states)).encode()
    if args[0] == "git" or rng.random() > rate:
      return code, out, err
    if rng.random() < 0.1:
      path = ".".join(args[:rng.randrange(1, 6)])
      err = f"ERROR: ({path}) {rng.choice(errors)}".encode()
      return rng.choice([None, 1, 2, 255, -9]), out, clouds.mutate(
          err.decode(), rng)
    return code, clouds.mutate(out.decode(), rng), clouds.mutate(
        err.decode(), rng)

  def sleep(seconds):
    world.sleep(seconds)
    sleeps.append(seconds)
    if len(sleeps) > 40:
      raise Enough

  args, rest = launcher.parse([
      "supervise", "--name=s24", "--zone=us-east5-a", "--project=p",
      f"--accelerator={'v6e-8' if backend == 'mig' else 'v5litepod-16'}", "--",
      "--config=c.py", "--workdir=gs://bucket/s24"])
  watcher = launcher.supervisor.Supervisor(
      launcher.commands.Gcloud(execute), launcher.make_slice(args),
      launcher.cloud.Run.of(rest), folder, "HEAD", poll_seconds=60,
      max_restarts=2, max_refusals=2, hang_seconds=900, start_seconds=1800,
      keep=False, sleep=sleep, clock=world.clock)
  try:
    code = watcher.supervise()
  except Enough:
    return "goes on"
  # Nothing wrong that is printed makes a run done or diverged.
  assert code == end or code in (1, 2)
  return code


def program(folder: pathlib.Path, text: str) -> str:
  """A program that runs this Python, and notes its id and its child's."""
  path = folder / "gcloud"
  path.write_text(
      f"#!{sys.executable} -IS\nimport os, signal, subprocess, sys, time\n"
      "child = subprocess.Popen(['sleep', '300'])\n"
      f"open({str(folder / 'ids')!r}, 'a').write(f'{{os.getpid()}} "
      "{child.pid}\\n')\n" + text)
  path.chmod(0o755)
  return str(path)


def assert_none_left(folder: pathlib.Path) -> None:
  """The noted processes have ended, or do so at once: they got the signal."""
  late = time.monotonic() + 10
  for pid in (folder / "ids").read_text().split():
    stat = pathlib.Path("/proc", pid, "stat")
    try:
      while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < late, f"{pid} is alive"
        time.sleep(0.01)
    except (FileNotFoundError, ProcessLookupError):
      pass


@pytest.mark.parametrize("text", [
    "time.sleep(300)",
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(300)",
    "sys.stdout.close()\nos.close(1)\nos.close(2)\ntime.sleep(300)",
    "while True: os.write(1, b'x' * 65536)",
    "while True: os.write(2, b'x' * 65536)"])
def test_a_command_that_does_not_end_is_killed_with_its_children(
    text, launcher, tmp_path):
  start = time.monotonic()
  with pytest.raises(launcher.commands.CloudError) as caught:
    launcher.commands.Gcloud()([program(tmp_path, text)], timeout=1)
  assert caught.value.kind == "timeout" and "1 seconds" in str(caught.value)
  assert time.monotonic() - start < 30
  assert len(caught.value.out) <= 1 << 24
  assert_none_left(tmp_path)
  with pytest.raises(ChildProcessError):  # The command itself was reaped.
    os.waitpid(int((tmp_path / "ids").read_text().split()[0]), 0)


def test_a_child_that_holds_the_output_does_not_delay_it_for_long(
    launcher, tmp_path):
  text = "print('answer', flush=True)\nos._exit(0)"
  found = launcher.commands.Gcloud()([program(tmp_path, text)], timeout=60)
  assert found == "answer\n"  # Not a time-out.
  assert_none_left(tmp_path)


def test_megabytes_of_warnings_hide_neither_answer_nor_error(
    launcher, tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
  noise = "os.write(2, b'WARNING: NOT_FOUND quota\\n' * 200_000)\n"
  gcloud = launcher.commands.Gcloud()
  program(tmp_path, noise + "print('{}')\nchild.kill()")
  assert gcloud(["gcloud", "x"], timeout=100) == "{}\n"
  program(tmp_path, noise + "child.kill()\nsys.exit('ERROR: (gcloud.x) "
          "PERMISSION_DENIED: no')")
  with pytest.raises(launcher.commands.CloudError) as caught:
    gcloud(["gcloud", "x"], timeout=100)
  assert caught.value.kind == "refused"


def test_a_command_cannot_ask_anything(launcher, tmp_path):
  text = ("child.kill()\nprint(repr(sys.stdin.read()), "
          "os.environ['CLOUDSDK_CORE_DISABLE_PROMPTS'])\n"
          "try: open('/dev/tty')\nexcept OSError: print('no terminal')")
  assert launcher.commands.Gcloud()([program(tmp_path, text)], 60) == (
      "'' 1\nno terminal\n")


@pytest.mark.parametrize("mode, content", [
    (None, ""), (0o644, "#!/bin/sh\n"), (0o755, "\x7fELF nonsense")])
def test_a_program_that_cannot_start_is_one_line(
    mode, content, launcher, tmp_path):
  path = tmp_path / "gcloud"
  if mode:
    path.write_text(content)
    path.chmod(mode)
  with pytest.raises(launcher.commands.CloudError, match="cannot be started") \
      as caught:
    launcher.commands.Gcloud()([str(path)])
  assert caught.value.kind == "refused"
