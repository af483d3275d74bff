"""The other launchers: valid files that respect the exit codes."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import command_line
import pytest
import yaml
from kubeflow_trainer_api import models

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DOCKERFILE = LAUNCH / "Dockerfile"


def lint(tool: str, *args) -> str:
  """The output of a linter from the extra `test`; "" if all is well."""
  program = shutil.which(tool, path=os.pathsep.join(
      [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]))
  assert program, f"{tool} is missing; pip install '.[test]' brings it"
  done = subprocess.run([program, *map(str, args)], capture_output=True,
                        text=True, cwd=ROOT)
  return done.stdout + done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_shell_scripts_are_clean(path):
  assert lint("shellcheck", path) == ""


def test_the_dockerfile_is_clean():
  assert lint("hadolint", DOCKERFILE) == ""


def lost(given, kept, where=""):
  """Yields the keys of a document that the model dropped: unknown ones."""
  if isinstance(given, dict):
    for key, value in given.items():
      if key not in (kept or {}):
        yield f"{where}.{key}"
      else:
        yield from lost(value, kept[key], f"{where}.{key}")
  elif isinstance(given, list):
    for i, (a, b) in enumerate(zip(given, kept, strict=True)):
      yield from lost(a, b, f"{where}[{i}]")
  elif given != kept:
    yield where


def read(name: str) -> dict:
  return yaml.safe_load((LAUNCH / name).read_text())


def check_job_set(found: dict) -> None:
  """Raises ValueError or AssertionError if the API has no such key or type."""
  kept = models.JobsetV1alpha2JobSet.from_dict(found).to_dict()
  assert not list(lost(found, kept))


def job_of(found: dict) -> dict:
  return found["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_job_set_is_valid():
  check_job_set(read("gke_jobset.yaml"))


@pytest.mark.parametrize("damage", [
    lambda job: job.update(backofLimit=0),
    lambda job: job.update(backoffLimit="none"),
    lambda job: job["podFailurePolicy"]["rules"][0].pop("action"),
    lambda job: job["template"]["spec"].pop("containers"),
    lambda job: job["template"]["spec"]["volumes"][0]["csi"].update(bucket="b"),
], ids=["unknown_key", "wrong_type", "no_action", "no_container", "no_field"])
def test_an_invalid_job_set_is_detected(damage):
  found = read("gke_jobset.yaml")
  damage(job_of(found))
  with pytest.raises((ValueError, AssertionError)):
    check_job_set(found)


def test_the_job_set_keeps_the_exit_code_contract():
  found = read("gke_jobset.yaml")
  job = job_of(found)
  # Any pod that fails ends the job; 2 and 3 also end the set.
  assert job["backoffLimit"] == 0
  assert job["template"]["spec"]["restartPolicy"] == "Never"
  (rule,) = job["podFailurePolicy"]["rules"]
  main = job["template"]["spec"]["containers"][0]["name"]
  assert rule == {"action": "FailJob", "onExitCodes": {
      "containerName": main, "operator": "In", "values": [2, 3]}}
  policy = found["spec"]["failurePolicy"]
  assert policy["rules"] == [{"action": "FailJobSet",
                              "onJobFailureReasons": ["PodFailurePolicy"]}]
  assert policy["maxRestarts"] > 0


def test_sky_pilot_keeps_the_exit_code_contract():
  recovery = read("skypilot.yaml")["resources"]["job_recovery"]
  assert recovery["max_restarts_on_errors"] == 0
  # SkyPilot reports 137 for the other hosts when one has failed.
  assert not {0, 2, 3, 137} & set(recovery["recover_on_exit_codes"])
  assert {1, 134, 143} <= set(recovery["recover_on_exit_codes"])


@pytest.mark.soak
def test_the_sky_pilot_task_is_valid():
  sky = pytest.importorskip("sky", reason="pip install skypilot")
  task = sky.Task.from_yaml(str(LAUNCH / "skypilot.yaml"))
  assert "metaformer_jax.main" in task.run


def sky_pilot_command() -> list[str]:
  return shlex.split(read("skypilot.yaml")["run"].replace("\\\n", ""))[1:]


def job_set_command() -> list[str]:
  container = job_of(read("gke_jobset.yaml"))["template"]["spec"]["containers"]
  return container[0]["command"]


def page_commands() -> list[list[str]]:
  """The commands of docs/tpu.md and its parts."""
  pages = [ROOT / "docs" / "tpu.md", *(ROOT / "docs" / "tpu").glob("*.md")]
  text = "\n".join(p.read_text() for p in pages).replace("\\\n", " ")
  main = ["python", "-m", "metaformer_jax.main"]
  flags = re.findall(r" -- +(--config=.*)$", text, re.MULTILINE)
  xpk = re.findall(r'--command="(.*)"$', text, re.MULTILINE)
  assert len(flags) >= 3 and len(xpk) == 1
  return [*([*main, *shlex.split(f)] for f in flags), *map(shlex.split, xpk)]


def docker_command() -> list[str]:
  (entry,) = set(re.findall(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE.read_text(),
                            re.MULTILINE))
  return yaml.safe_load(entry)


def test_each_calls_the_same_program_with_valid_flags(tmp_path):
  lines = []
  for command in (*page_commands(), sky_pilot_command(), job_set_command(),
                  docker_command()):
    assert command[0].endswith("python")
    assert command[1:3] == ["-m", "metaformer_jax.main"]
    bucket = r"gs://(BUCKET|\$\{BUCKET\})|/gcs"
    lines.append([re.sub(bucket, str(tmp_path), flag) for flag in command[3:]])
  (tmp_path / "tfds").mkdir()
  for split in ("train", "val"):
    for label in range(1000):
      (tmp_path / "imagenet" / split / f"{label:04d}").mkdir(parents=True)
  *runs, bare = command_line.fork(lines)
  for run in runs:
    assert run.code == 0, run.err
    assert f"{tmp_path}/runs/" in run.out
  assert bare.code == 2 and "--config" in bare.err


def test_the_images_run_unprivileged_and_hold_no_secrets():
  text = DOCKERFILE.read_text()
  assert text.count("\nUSER 1000\n") == 2
  base, *others = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
  assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
  assert others == ["base", "base"]
  # Only listed files are copied.
  ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
  rules = [line for line in ignored if not line.startswith("#")]
  assert rules[0] == "*"
  copied = re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE)
  names = {name.rstrip("/") for line in copied for name in line.split()}
  assert names == {rule[1:] for rule in rules if rule.startswith("!")}
  assert all((ROOT / name).exists() for name in names)


@pytest.fixture
def shell(tmp_path):
  """Runs a script with these programs replacing the system's."""
  folder = tmp_path / "bin"
  folder.mkdir()

  def run(script, *args, programs=None, **env):
    for name, text in (programs or {}).items():
      (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
      (folder / name).chmod(0o755)
    return subprocess.run(
        ["bash", LAUNCH / script, *args], capture_output=True, text=True,
        timeout=60, cwd=tmp_path, env=os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path),
            "MOUNTS": str(tmp_path / "gcs"), **env})

  return run


SLURM = {
    # Like SLURM: runs a step's processes and returns the highest exit code.
    "srun": 'worst=0; for i in 0 1; do SLURM_PROCID=$i "$@" || '
            '{ c=$?; [ $c -gt $worst ] && worst=$c; }; done; exit $worst',
    "scontrol": 'echo "$@" >>requeued',
}


@pytest.mark.parametrize("codes, code, requeued", [
    ("0 0", 0, False), ("3 134", 3, False), ("134 2", 2, False),
    ("143 143", 0, True), ("0 1", 0, True), ("137 134", 0, True)])
def test_slurm_requeues_what_can_continue(
    codes, code, requeued, shell, tmp_path):
  first, second = codes.split()
  programs = SLURM | {
      "train": f'[ "$SLURM_PROCID" = 0 ] && exit {first}; exit {second}'}
  done = shell("slurm.sh", "--config=c.py", f"--workdir={tmp_path}/run",
               programs=programs, SLURM_JOB_ID="7", PYTHON="train")
  assert done.returncode == code, done.stderr
  assert (tmp_path / "requeued").exists() == requeued


def test_slurm_gives_up_without_progress(shell, tmp_path):
  checkpoints = tmp_path / "run" / "checkpoints"
  checkpoints.mkdir(parents=True)
  programs = SLURM | {"train": "exit 1"}
  codes = []
  for attempt in range(10):
    if attempt == 3:  # This resets the count.
      programs = SLURM | {"train": f"mkdir -p {checkpoints}/500; "
                          f"touch {checkpoints}/500/manifest.json; exit 1"}
    codes.append(shell(
        "slurm.sh", "--config=c.py", f"--workdir={tmp_path}/run",
        programs=programs, SLURM_JOB_ID="7", PYTHON="train").returncode)
  assert codes == [0] * 9 + [1]
  assert (tmp_path / "requeued").read_text() == "requeue 7\n" * 9


def test_slurm_sees_the_steps_in_a_bucket(shell, tmp_path):
  """As gcloud lists them; the notes are beside the job."""
  programs = SLURM | {"train": "exit 1", "gcloud": (
      'echo "$@" >>listed\n'
      f"n=$(wc -l <{tmp_path}/listed)\n"
      "[ $n -ge 4 ] && echo gs://b/run/checkpoints/500/manifest.json\n"
      "echo gs://b/run/checkpoints/60/manifest.json")}
  codes = [shell("slurm.sh", "--config=c.py", "--workdir=gs://b/run",
                 programs=programs, SLURM_JOB_ID="7", PYTHON="train").returncode
           for _ in range(8)]
  assert codes == [0] * 7 + [1]  # The second attempt has saved step 500.
  assert set((tmp_path / "listed").read_text().splitlines()) == {
      "storage ls gs://b/run/checkpoints/*/manifest.json"}
  assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [
      "bin", "slurm"]


def test_slurm_needs_a_workdir(shell):
  done = shell("slurm.sh", "--config=c.py", SLURM_JOB_ID="7")
  assert done.returncode == 2 and "usage: sbatch" in done.stderr


def wait_for(shell, wanted: str) -> None:
  """Waits until the output of `worker.sh state` ends with `wanted`."""
  for _ in range(200):
    state = shell("worker.sh", "state").stdout
    if state.rstrip().endswith(wanted):
      return
    time.sleep(0.05)
  raise AssertionError(f"{state!r} is not {wanted!r}")


CLOUD = {
    "hostname": "echo t1v-n-1-w-3", "mountpoint": "exit 1", "sudo": '"$@"',
    "gcsfuse": 'echo "$@" >>mounted', "df": "echo Avail; echo 5000",
    # Ends at SIGTERM, as a run does; its child process does not.
    "train": 'trap "echo saved; exit 143" TERM\n'
             "sleep 300 >/dev/null 2>&1 &\n"
             'echo "started $*"; while :; do sleep 0.05; done',
}


def test_a_worker_starts_reports_and_stops_a_run(shell, tmp_path):
  state = shell("worker.sh", "state", programs=CLOUD)
  assert state.stdout == "worker 3 none none\n"
  flags = ["train", "--config=c.py", "a b"]
  started = shell("worker.sh", "start", "id1", "data-bucket,runs-bucket",
                  *flags)
  assert started.returncode == 0, started.stderr
  assert [line.split()[-2:] for line in
          (tmp_path / "mounted").read_text().splitlines()] == [
              [name, f"{tmp_path}/gcs/{name}"]
              for name in ("data-bucket", "runs-bucket")]
  cache = tmp_path / "metaformer_run" / "cache"
  for line, name in zip((tmp_path / "mounted").read_text().splitlines(),
                        ("data-bucket", "runs-bucket"), strict=True):
    words = line.split()
    assert words[:4] == ["--profile=aiml-training", "--implicit-dirs", "-o",
                         "ro"]
    assert words[4] == f"--cache-dir={cache / name}"
    # Of what is free, four fifths for both.
    assert words[5] == f"--file-cache-max-size-mb={5000 * 4 // 5 // 2}"
  wait_for(shell, "worker 3 id1 running")
  again = shell("worker.sh", "start", "id2", "", "train")
  assert again.returncode == 1 and "active already: id1" in again.stderr
  assert shell("worker.sh", "stop", "20").returncode == 0
  wait_for(shell, "worker 3 id1 143")
  log = shell("worker.sh", "log", "10").stdout.splitlines()
  assert log[1:3] == [f"started {flags[1]} a b", "saved"]
  assert "exit code 143" in log[-1]
  # The child process has ended too: nothing holds the accelerator.
  assert shell("worker.sh", "start", "id2", "", "false").returncode == 0
  wait_for(shell, "worker 3 id2 1")


def test_the_log_is_copied_to_a_bucket(shell, tmp_path):
  programs = CLOUD | {"gcloud": f'echo "$@" >>{tmp_path}/copied'}
  shell("worker.sh", "start", "id1", "", "echo", "--workdir=gs://b/run",
        programs=programs)
  wait_for(shell, "worker 3 id1 0")
  assert (tmp_path / "copied").read_text() == (
      f"storage cp {tmp_path}/metaformer_run/log "
      "gs://b/run/logs/t1v-n-1-w-3.log\n")


def test_a_killed_run_is_reported(shell, tmp_path):
  shell("worker.sh", "start", "id1", "", "train", programs=CLOUD)
  home = tmp_path / "metaformer_run"
  for _ in range(600):  # Running from the start, before it has written these.
    if (home / "pid").exists():
      break
    time.sleep(0.05)
  wait_for(shell, "running")
  os.killpg(int((home / "session").read_text()), 9)
  wait_for(shell, "worker 3 id1 137")


def test_a_worker_installs_the_archive(shell, tmp_path):
  (tmp_path / "setup.py").write_text("")
  subprocess.run(["tar", "-czf", "sent.tar.gz", "setup.py"], cwd=tmp_path,
                 check=True)
  stale = tmp_path / "metaformer_jax" / "stale.py"
  stale.parent.mkdir()
  stale.write_text("")
  done = shell("worker.sh", "install", f"{tmp_path}/sent.tar.gz", programs={
      "gcsfuse": "echo --profile string",
      "python3": f'echo "$@" >>{tmp_path}/installed'})
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "metaformer_jax" / "setup.py").exists()
  assert not stale.exists()
  installed = (tmp_path / "installed").read_text().splitlines()
  assert installed[-2:] == ["-m uv venv --quiet --python 3.11",
                            "-m uv pip install --quiet .[tpu,tfds,gcs]"]
