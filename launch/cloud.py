"""A TPU slice: the gcloud commands for it, and what their answers mean.

The supervisor knows the cloud only by the commands of `Slice` and by `State`,
`node`, `workers` and `newest_step`: all that is special to queued resources is
here. Needs only Python and gcloud.
"""

import dataclasses
import hashlib
import json
import re
import shlex
import sys

import commands

# TPU generation -> default runtime version; --runtime_version overrides it.
RUNTIMES = {
    "v2": "tpu-ubuntu2204-base",
    "v3": "tpu-ubuntu2204-base",
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

# What the states of a queued resource mean for whoever waits for the slice
# (google.cloud.tpu.v2.QueuedResourceState.State). A name that is not listed
# is waited for.
_PHASES = {"ACTIVE": "active", "SUSPENDED": "lost", "FAILED": "failed"}

# Errors of a request that would fail again, in the same zone.
_FINAL = ("absent", "auth", "refused")

# Bucket names: a-z, 0-9, and in between also - _ and dots.
_BUCKET = re.compile(r"gs://([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)(?=/|$)")

# A new machine has no worker.sh yet.
_STATE = ("if [ -f worker.sh ]; then bash worker.sh state; "
          "else echo worker - none none; fi")

# A line of `worker.sh state`, to its end: of 255, a lost connection could leave
# a 2. Other lines, e.g. the system's, are no answers.
_ANSWER = re.compile(r"^worker ([\w.-]{1,64}) ([\w.-]{1,64}) "
                     r"(none|running|[0-9]{1,3})\r?\n", re.MULTILINE | re.ASCII)


class UsageError(Exception):
  """The command line is wrong; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Worker:
  """One line of `worker.sh state`; see there for the values of status."""

  index: str
  run: str
  status: str


@dataclasses.dataclass(frozen=True)
class State:
  """The state of a slice.

  Attributes:
    name: as the cloud calls it, or ABSENT.
    phase: absent, waiting, active, lost (its machines are gone), or failed.
    error: if it failed, why.
  """

  name: str
  phase: str
  error: commands.CloudError | None = None

  @property
  def final(self) -> bool:
    """Whether the same request would fail again."""
    return self.error is not None and self.error.kind in _FINAL

  def __str__(self):
    return f"{self.name}: {self.error}" if self.error else self.name


class DryRun(commands.Gcloud):
  """Prints the commands, one per line, and answers as if they succeeded."""

  def __init__(self, active: bool, run: str = "none"):
    """
    Args:
      active: whether the slice exists already.
      run: id of the run that will be started on it.
    """
    super().__init__()
    self._active, self._run = active, run
    self._started = False

  def __call__(self, args, timeout=300):
    print(shlex.join(args))
    self._active |= "create" in args
    self._started |= "bash worker.sh start" in args[-1]
    if "describe" in args and not self._active:
      raise commands.CloudError("absent", "the slice does not exist yet")
    if "storage" in args:
      raise commands.CloudError("absent", "there are no checkpoints yet")
    if "describe" in args:
      return ('{"state": "READY", "networkEndpoints": [{}]}'
              if "tpu-vm" in args else '{"state": {"state": "ACTIVE"}}')
    if args[-1].endswith(_STATE):
      found = f"{self._run} 0" if self._started else "none none"
      return f"worker 0 {found}\n"
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


def slice_state(gcloud: commands.Gcloud, where: Slice) -> State:
  """The state of the queued resource.

  Raises:
    CloudError: gcloud failed, or its answer has no state.
  """
  try:
    found = commands.read_object(gcloud(where.describe()))
  except commands.CloudError as e:
    if e.kind == "absent":
      return State("ABSENT", "absent")
    raise
  found = commands.value(found, "state", dict)
  name = commands.value(found, "state", str)
  if not name or not re.fullmatch(r"[A-Z_]{1,40}", name):
    raise commands.CloudError("unknown", "gcloud printed no state of the slice")
  phase = _PHASES.get(name, "waiting")
  return State(name, phase, _failure(found) if phase == "failed" else None)


def _failure(found: dict) -> commands.CloudError:
  """The error of a request that failed; found: its state."""
  error = commands.value(commands.value(found, "failedData", dict), "error",
                         dict)
  status = commands.status_name(commands.value(error, "code", int))
  message = commands.value(error, "message", str) or "no reason given"
  details = " ".join(commands.value(detail, "@type", str) or "" for detail in
                     commands.value(error, "details", list) or ())
  return commands.CloudError(commands.kind_of(status, message, details),
                             f"{status}: {message}" if status else message)


def node(gcloud: commands.Gcloud, where: Slice) -> tuple[str, int]:
  """(state of the node, number of its hosts).

  Raises:
    CloudError: gcloud failed, or its answer lacks them.
  """
  found = commands.read_object(gcloud(where.describe_node()))
  name = commands.value(found, "state", str)
  hosts = commands.value(found, "networkEndpoints", list)
  if not name or not hosts:
    raise commands.CloudError("unknown", "gcloud printed no state or no "
                              "networkEndpoints of the node")
  return commands.one_line(name, 40), len(hosts)


def workers(gcloud: commands.Gcloud, where: Slice,
            worker: str = "all") -> list[Worker]:
  """The state of each host that answers.

  Raises:
    CloudError: no host was asked: the command or the login was refused, or the
      cloud itself did not answer.
  """
  try:
    out = gcloud(where.state(worker), timeout=120)
  except commands.CloudError as e:
    if e.kind in ("refused", "auth", "failed"):
      raise
    out = e.out
  return [Worker(*found) for found in _ANSWER.findall(out)]


def newest_step(gcloud: commands.Gcloud, run: Run) -> int:
  """The step of the newest complete checkpoint in the bucket; 0 if none.

  A step is complete when it has its manifest, which is written last.

  Raises:
    CloudError: the checkpoints cannot be listed, or the answer is not a list of
      them.
  """
  folder = f"{run.workdir}/checkpoints"
  try:
    out = gcloud(["gcloud", "storage", "ls", f"{folder}/*/manifest.json"])
  except commands.CloudError as e:
    if e.kind == "absent":
      return 0
    raise
  lines = [line.strip() for line in out.splitlines() if line.strip()]
  found = [re.fullmatch(rf"{re.escape(folder)}/([^/]+)/manifest\.json", line)
           for line in lines]
  if not found or not all(found):  # Without any, gcloud reports an error.
    raise commands.CloudError("unknown", "gcloud storage ls did not print a "
                              f"list of manifests of {folder}")
  steps = [int(step[1]) for step in found
           if re.fullmatch("[0-9]{1,18}", step[1])]
  return max(steps, default=0)


def say(message: str) -> None:
  """Prints to stderr; stdout is for commands and states."""
  print(message, file=sys.stderr, flush=True)
