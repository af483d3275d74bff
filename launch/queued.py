"""A slice as a queued resource of the Cloud TPU API."""

import dataclasses
import re

import cloud
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


@dataclasses.dataclass(frozen=True)
class QueuedSlice(cloud.Slice):
  """A queued resource, and the node of the same name."""

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

  def _delete(self) -> list[str]:
    return [*self._gcloud("queued-resources", "delete", self.name),
            "--quiet", "--force"]

  def _ssh(self, command: str, worker: str) -> list[str]:
    return [*self._gcloud("tpu-vm", "ssh", self.name), "--quiet",
            f"--worker={worker}", f"--command={command}"]

  @property
  def removal(self) -> str:
    return " ".join(self._delete())

  def create(self, gcloud: commands.Gcloud) -> None:
    gcloud([*self._gcloud("queued-resources", "create", self.name),
            "--quiet", f"--node-id={self.name}",
            f"--accelerator-type={self.accelerator}",
            f"--runtime-version={self.runtime_version}",
            *(["--spot"] if self.spot else []), *self.create_flags])

  def state(self, gcloud: commands.Gcloud) -> cloud.State:
    try:
      found = commands.read_object(gcloud([
          *self._gcloud("queued-resources", "describe", self.name),
          "--format=json"]))
    except commands.CloudError as e:
      if e.kind == "absent":
        return cloud.State("ABSENT", "absent")
      raise
    found = commands.value(found, "state", dict)
    name = commands.value(found, "state", str)
    if not name or not re.fullmatch(r"[A-Z_]{1,40}", name):
      raise commands.CloudError("unknown",
                                "gcloud printed no state of the slice")
    phase = _PHASES.get(name, "waiting")
    return cloud.State(name, phase,
                       _failure(found) if phase == "failed" else None)

  def hosts(self, gcloud: commands.Gcloud) -> tuple[str, int]:
    found = commands.read_object(gcloud([
        *self._gcloud("tpu-vm", "describe", self.name), "--format=json"]))
    name = commands.value(found, "state", str)
    hosts = commands.value(found, "networkEndpoints", list)
    if not name or not hosts:
      raise commands.CloudError("unknown", "gcloud printed no state or no "
                                "networkEndpoints of the node")
    return commands.one_line(name, 40), len(hosts)

  def delete(self, gcloud: commands.Gcloud) -> None:
    gcloud(self._delete(), timeout=1800)

  def copy(self, gcloud: commands.Gcloud, *files: str) -> None:
    gcloud([*self._gcloud("tpu-vm", "scp", *files, f"{self.name}:"),
            "--quiet", "--worker=all"], timeout=900)

  def ssh(self, gcloud: commands.Gcloud, command: str, worker: str = "all",
          timeout: float = 300) -> str:
    return gcloud(self._ssh(command, worker), timeout=timeout)

  def show(self, gcloud: commands.Gcloud, command: str, worker: str) -> int:
    return gcloud.show(self._ssh(command, worker))

  def start(self, gcloud: commands.Gcloud, run: cloud.Run) -> None:
    self.script(gcloud, *run.start)

  def answer(self, args: list[str]) -> str:
    if "describe" not in args:
      return ""
    return ('{"state": "READY", "networkEndpoints": [{}]}'
            if "tpu-vm" in args else '{"state": {"state": "ACTIVE"}}')


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
