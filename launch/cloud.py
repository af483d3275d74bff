"""What the supervisor knows of a TPU slice, whichever service provides it.

`Slice` is implemented by `queued.py` (queued resources of the Cloud TPU API)
and by `mig.py` (managed instance groups of Compute Engine). The supervisor
knows the cloud only by its methods and by `State`. Needs only Python and
gcloud.
"""

import abc
import dataclasses
import hashlib
import json
import re
import shlex
import sys

import commands

# Errors of a request that would fail again, in the same zone.
_FINAL = ("absent", "auth", "refused")

# Flags that name data, which are read by a mount. For all others the package
# itself reads and writes buckets.
_DATA = re.compile(r"--?config\.(data|task)\.")

# Bucket names: a-z, 0-9, and in between also - _ and dots.
_BUCKET = re.compile(r"gs://([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)(?=/|$)")

# A new machine has no worker.sh yet.
STATE = ("if [ -f worker.sh ]; then bash worker.sh state; "
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


class Slice(abc.ABC):
  """The machines of a slice, which may not exist yet.

  All methods may raise CloudError.

  Attributes:
    name: of the slice.
    removal: the command that deletes it, for the user.
  """

  name: str
  removal: str

  @abc.abstractmethod
  def create(self, gcloud: commands.Gcloud) -> None:
    """Requests the slice, which is billed once its machines exist."""

  @abc.abstractmethod
  def state(self, gcloud: commands.Gcloud) -> State:
    """Whether its machines exist, and may be used."""

  @abc.abstractmethod
  def hosts(self, gcloud: commands.Gcloud) -> tuple[str, int]:
    """(state of the machines, their number), of an active slice."""

  @abc.abstractmethod
  def delete(self, gcloud: commands.Gcloud) -> None:
    """Deletes everything that `create` made, in any state.

    The kind of the error is "absent" if there is nothing.
    """

  @abc.abstractmethod
  def copy(self, gcloud: commands.Gcloud, *files: str) -> None:
    """Copies files to the home folder of every host."""

  @abc.abstractmethod
  def ssh(self, gcloud: commands.Gcloud, command: str, worker: str = "all",
          timeout: float = 300) -> str:
    """Runs a shell command on a host by its index, or on all; its output."""

  @abc.abstractmethod
  def show(self, gcloud: commands.Gcloud, command: str, worker: str) -> int:
    """The same on this terminal; returns the exit code."""

  @abc.abstractmethod
  def start(self, gcloud: commands.Gcloud, run: "Run") -> None:
    """Starts a run, which is installed, on every host."""

  @abc.abstractmethod
  def answer(self, args: list[str]) -> str:
    """What a command prints for an active slice; for --dry_run."""

  def script(self, gcloud: commands.Gcloud, *args: str, worker: str = "all",
             timeout: float = 300) -> str:
    """Runs worker.sh with these arguments; its output."""
    return self.ssh(gcloud, shlex.join(["bash", "worker.sh", *args]), worker,
                    timeout)

  def workers(self, gcloud: commands.Gcloud,
              worker: str = "all") -> list[Worker]:
    """The state of each host that answers.

    Raises:
      CloudError: no host was asked: the command or the login was refused, or
        the cloud itself did not answer.
    """
    try:
      out = self.ssh(gcloud, STATE, worker, timeout=120)
    except commands.CloudError as e:
      out = heard(e)
    return read_workers(out)


def read_workers(printed: str) -> list[Worker]:
  """The lines of `worker.sh state` in what hosts printed."""
  return [Worker(*found) for found in _ANSWER.findall(printed)]


def heard(error: commands.CloudError) -> str:
  """What hosts printed before a command failed on one; or raises the error."""
  if error.kind in ("refused", "auth", "failed"):
    raise error
  return error.out


@dataclasses.dataclass(frozen=True)
class Run:
  """One experiment.

  Attributes:
    flags: of metaformer_jax.main.
    workdir: gs://BUCKET/FOLDER.
    buckets: those that are mounted.
  """

  flags: tuple[str, ...]
  workdir: str
  buckets: tuple[str, ...]

  @classmethod
  def of(cls, flags: list[str]) -> "Run":
    """Parses a run's flags; replaces gs://BUCKET of data by /gcs/BUCKET.

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
    flags = [f"--workdir={workdir}"
             if flag.lstrip("-").startswith("workdir=") else flag
             for flag in flags]
    buckets = {bucket for flag in flags if _DATA.match(flag)
               for bucket in _BUCKET.findall(flag)}
    return cls(tuple(_BUCKET.sub(r"/gcs/\1", flag) if _DATA.match(flag)
                     else flag for flag in flags),
               workdir, tuple(sorted(buckets)))

  @property
  def command(self) -> list[str]:
    return [".venv/bin/python", "-m", "metaformer_jax.main", *self.flags]

  @property
  def start(self) -> list[str]:
    """Arguments of worker.sh that start it."""
    return ["start", self.id, ",".join(self.buckets), *self.command]

  @property
  def id(self) -> str:
    """Differs between runs with different flags."""
    return hashlib.sha256(json.dumps(self.command).encode()).hexdigest()[:12]


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
