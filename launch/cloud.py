"""The gcloud commands for a TPU slice, as lists of arguments, and their errors.

Needs only Python and gcloud.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import subprocess
import sys

# TPU generation -> default runtime version; --runtime_version overrides it.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

# Kinds of gcloud errors, by their messages; the first that matches counts.
_KINDS = {
    "absent": r"\bNOT_FOUND\b|matched no objects",
    "exists": r"\bALREADY_EXISTS\b",
    "quota": r"\bRESOURCE_EXHAUSTED\b|[Qq]uota",
    "refused": r"\b(PERMISSION_DENIED|INVALID_ARGUMENT|UNAUTHENTICATED)\b"
               r"|unrecognized arguments|argument --|gcloud auth login"
               r"|not present in the SSH agent",
}

# Bucket names: a-z, 0-9, and in between also - _ and dots.
_BUCKET = re.compile(r"gs://([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)(?=/|$)")

# A new machine has no worker.sh yet.
_STATE = ("if [ -f worker.sh ]; then bash worker.sh state; "
          "else echo worker - none none; fi")


class UsageError(Exception):
  """The command line is wrong; the message is one line."""


class CloudError(Exception):
  """A command failed.

  Attributes:
    kind: absent, exists, quota, refused (would fail again), or failed.
    out: what it printed before it failed.
  """

  def __init__(self, kind: str, message: str, out: str = ""):
    super().__init__(message)
    self.kind = kind
    self.out = out


@dataclasses.dataclass(frozen=True)
class Worker:
  """One line of `worker.sh state`; see there for the values of status."""

  index: str
  run: str
  status: str


class Gcloud:
  """Runs commands."""

  def __call__(self, args: list[str], timeout: float = 300) -> str:
    """Returns what a command prints; raises CloudError if it fails."""
    try:
      done = subprocess.run(args, capture_output=True, text=True,
                            errors="replace", timeout=timeout,
                            stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as e:
      raise CloudError("failed", f"{shlex.join(args[:6])} ... did not finish "
                       f"within {timeout:g} seconds") from e
    except FileNotFoundError as e:
      raise CloudError("refused", f"{args[0]} is not installed, or not on "
                       "PATH") from e
    if done.returncode == 0:
      return done.stdout
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if "ERROR" in line] or lines[-1:]
    message = said[0].strip() if said else f"exit code {done.returncode}"
    kind = next((k for k, pattern in _KINDS.items()
                 if re.search(pattern, done.stderr)), "failed")
    raise CloudError(kind, message, done.stdout)

  def show(self, args: list[str]) -> int:
    """Runs a command on this terminal; returns its exit code."""
    return subprocess.run(args, check=False).returncode


class DryRun(Gcloud):
  """Prints the commands, one per line, and answers as if they succeeded."""

  def __init__(self, active: bool, run: str = "none"):
    """
    Args:
      active: whether the slice exists already.
      run: id of the run that will be started on it.
    """
    self._active, self._run = active, run
    self._started = False

  def __call__(self, args, timeout=300):
    print(shlex.join(args))
    self._active |= "create" in args
    self._started |= "bash worker.sh start" in args[-1]
    if "describe" in args and not self._active:
      raise CloudError("absent", "the slice does not exist yet")
    if "describe" in args:  # The queued resource, or the node.
      return '{"state": {"state": "ACTIVE"}, "networkEndpoints": [{}]}'
    if args[-1].endswith(_STATE):
      return "worker 0 " + (f"{self._run} 0" if self._started else "none none")
    return ""

  def show(self, args):
    print(shlex.join(args))
    return 0


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice: a queued resource, and the node of the same name."""

  name: str
  zone: str
  project: str | None
  accelerator: str
  runtime_version: str
  spot: bool
  create_flags: tuple[str, ...] = ()

  def _gcloud(self, *words: str) -> list[str]:
    where = [f"--zone={self.zone}"]
    if self.project:
      where.append(f"--project={self.project}")
    return ["gcloud", "compute", "tpus", *words, *where]

  def create(self) -> list[str]:
    """Requests the slice, which is billed once it is ACTIVE."""
    return [*self._gcloud("queued-resources", "create", self.name),
            "--quiet", f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={self.runtime_version}",
            *(["--spot"] if self.spot else []), *self.create_flags]

  def describe(self) -> list[str]:
    return [*self._gcloud("queued-resources", "describe", self.name),
            "--format=json"]

  def describe_node(self) -> list[str]:
    return [*self._gcloud("tpu-vm", "describe", self.name), "--format=json"]

  def delete(self) -> list[str]:
    """Deletes the queued resource and its machines, in any state."""
    return [*self._gcloud("queued-resources", "delete", self.name),
            "--quiet", "--force"]

  def copy(self, *files: str) -> list[str]:
    """Copies files to the home folder of every host."""
    return [*self._gcloud("tpu-vm", "scp", *files, f"{self.name}:"),
            "--quiet", "--worker=all"]

  def ssh(self, command: str, worker: str = "all") -> list[str]:
    return [*self._gcloud("tpu-vm", "ssh", self.name), "--quiet",
            f"--worker={worker}", f"--command={command}"]

  def worker(self, *args: str, worker: str = "all") -> list[str]:
    """Runs worker.sh with these arguments."""
    return self.ssh(shlex.join(["bash", "worker.sh", *args]), worker)

  def state(self, worker: str = "all") -> list[str]:
    return self.ssh(_STATE, worker)


@dataclasses.dataclass(frozen=True)
class Run:
  """One experiment: flags of metaformer_jax.main, and the buckets they use."""

  flags: tuple[str, ...]
  workdir: str
  buckets: tuple[str, ...]

  @classmethod
  def of(cls, flags: list[str]) -> "Run":
    """Parses a run's flags; replaces gs://BUCKET by its mount /gcs/BUCKET.

    Raises:
      UsageError: the config or workdir is missing, or the workdir is not in a
        bucket.
    """
    for flag in flags:
      if not re.match(r"--?[a-z].*=", flag, re.DOTALL):
        raise UsageError(f"{flag!r} after --: write --flag=value")
      if "gs://" in _BUCKET.sub("", flag):
        raise UsageError(f"{flag!r} after --: not a valid bucket name; use a-z "
                         "and 0-9, in between also - _ and dots")
    values = dict(flag.lstrip("-").split("=", 1) for flag in flags)
    if "config" not in values and "config_json" not in values:
      raise UsageError("--config is missing: give the run's flags after --, "
                       "e.g. -- --config=configs/poolformer_s24.py "
                       "--workdir=gs://BUCKET/runs/s24")
    workdir = values.get("workdir", "").rstrip("/")
    if not re.fullmatch(_BUCKET.pattern + "/.+", workdir):
      raise UsageError("--workdir after --: give gs://BUCKET/FOLDER; a folder "
                       "on a machine is deleted with it")
    flags = [f"--workdir={workdir}" if flag.lstrip("-").startswith("workdir=")
             else flag for flag in flags]
    buckets = sorted({b for flag in flags for b in _BUCKET.findall(flag)})
    return cls(tuple(_BUCKET.sub(r"/gcs/\1", flag) for flag in flags), workdir,
               tuple(buckets))

  @property
  def command(self) -> list[str]:
    return [".venv/bin/python", "-m", "metaformer_jax.main", *self.flags]

  @property
  def id(self) -> str:
    """Differs between runs with different flags."""
    return hashlib.sha256(json.dumps(self.command).encode()).hexdigest()[:12]


def slice_state(gcloud: Gcloud, where: Slice) -> tuple[str, dict]:
  """(state of the queued resource, its error); ("ABSENT", {}) if none.

  The error is a dict with "code" and "message", or empty.
  """
  try:
    found = json.loads(gcloud(where.describe())).get("state", {})
  except CloudError as e:
    if e.kind == "absent":
      return "ABSENT", {}
    raise
  except ValueError as e:
    raise CloudError("failed", f"gcloud did not print JSON: {e}") from e
  return (found.get("state", "UNKNOWN"),
          found.get("failedData", {}).get("error", {}))


def node(gcloud: Gcloud, where: Slice) -> tuple[str, int]:
  """(state of the node, number of its hosts)."""
  try:
    found = json.loads(gcloud(where.describe_node()))
  except ValueError as e:
    raise CloudError("failed", f"gcloud did not print JSON: {e}") from e
  return (found.get("state", "UNKNOWN"),
          max(1, len(found.get("networkEndpoints", []))))


def workers(gcloud: Gcloud, where: Slice, worker: str = "all") -> list[Worker]:
  """The state of each host that answers.

  Raises:
    CloudError: gcloud refused the command, so that no host was asked.
  """
  try:
    out = gcloud(where.state(worker), timeout=120)
  except CloudError as e:
    if e.kind == "refused":
      raise
    out = e.out
  return [Worker(*found) for found in
          re.findall(r"^worker (\S+) (\S+) (\S+)\r?$", out, re.MULTILINE)]


def say(message: str) -> None:
  """Prints to stderr; stdout is for commands and states."""
  print(message, file=sys.stderr, flush=True)
