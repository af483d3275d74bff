"""A cloud in memory: what gcloud prints for one slice, while time passes."""

import json
import random
import string
from collections.abc import Callable

# As `gcloud compute tpus queued-resources describe --format=json` prints it
# (https://cloud.google.com/tpu/docs/reference/rest/v2/projects.locations.queuedResources).
QUEUED = {
    "createTime": "2026-10-01T08:00:00.123456789Z",
    "name": "projects/p/locations/us-west4-a/queuedResources/s24",
    "spot": {},
    "state": {"state": "ACTIVE", "stateInitiator": "SERVICE"},
    "tpu": {"nodeSpec": [{
        "node": {"acceleratorType": "v5litepod-16", "bootDisk": {},
                 "runtimeVersion": "v2-alpha-tpuv5-lite",
                 "schedulingConfig": {"spot": True}},
        "nodeId": "s24", "parent": "projects/1234/locations/us-west4-a"}]}}
FAILED = QUEUED | {"state": {"state": "FAILED", "failedData": {"error": {
    "code": 8, "message": "There is no more capacity in the zone",
    "details": [{"@type": "type.googleapis.com/google.rpc.QuotaFailure",
                 "violations": [{"subject": "project:1"}]}]}}}}
NODE = {
    "acceleratorType": "v5litepod-16", "health": "HEALTHY", "id": "1234",
    "name": "projects/p/locations/us-west4-a/nodes/s24",
    "networkEndpoints": [
        {"ipAddress": "10.0.0.2", "port": 8470,
         "accessConfig": {"externalIp": "34.1.2.3"}},
        {"ipAddress": "10.0.0.3", "port": 8470, "accessConfig": {}}],
    "state": "READY"}


class World:
  """Answers the launcher's commands; `sleep` and `clock` are its time.

  Attributes:
    creations, starts: times at which the slice, or the run on it, was made.
  """

  def __init__(self, behave: Callable[[int, float], tuple[int, int | None]],
               queued: float = 0, readable: Callable[[float], bool] = bool):
    """
    Args:
      behave: from the number of the start, from 0, and the seconds since it, to
        the newest step and the run's exit code, None if it runs.
      queued: seconds that a request waits.
      readable: whether the checkpoints can be listed at a time, in seconds.
    """
    self._behave, self._queued, self._readable = behave, queued, readable
    self._now = 1.0
    self._run = None
    self._step = 0
    self.creations, self.starts = [], []

  def clock(self) -> float:
    return self._now

  def sleep(self, seconds: float) -> None:
    self._now += seconds

  def execute(self, args: list[str],
              timeout: float) -> tuple[int, bytes, bytes]:
    """Runs a command: (exit code, stdout, stderr)."""
    del timeout
    self._now += 1
    try:
      return 0, self._answer(" ".join(args[:5]), args).encode(), b""
    except LookupError as e:
      path = ".".join(args[:5 if "compute" in args else 3])
      return 1, b"", f"ERROR: ({path}) {e.args[0]}\n".encode()

  def _answer(self, command: str, args: list[str]) -> str:
    if command.startswith("git"):
      return ""
    if "storage ls" in command:
      if not self._readable(self._now):
        raise LookupError("HTTPError 503: We encountered an internal error.")
      if not self._look()[0]:
        raise LookupError("One or more URLs matched no objects.")
      return args[3].replace("*", str(self._step)) + "\n"
    if command.endswith("queued-resources create"):
      self.creations.append(self._now)
      return ""
    if len(self.creations) == 0 or self.creations[-1] is None:
      raise LookupError("NOT_FOUND: Resource 's24' was not found")
    if command.endswith("queued-resources delete"):
      self._run = None
      self.creations.append(None)
      return ""
    if command.endswith("queued-resources describe"):
      waits = self._now < self.creations[-1] + self._queued
      return json.dumps(QUEUED | ({"state": {"state": "WAITING_FOR_RESOURCES"}}
                                  if waits else {}))
    if command.endswith("tpu-vm describe"):
      return json.dumps(NODE)
    return self._host(args[-1].partition("=")[2], args)

  def _look(self) -> tuple[int, int | None]:
    if self._run is None:
      return self._step, None
    self._step, code = self._behave(len(self.starts) - 1,
                                    self._now - self.starts[-1])
    return self._step, code

  def _host(self, command: str, args: list[str]) -> str:
    words = command.split()
    if command.startswith("if "):
      _, code = self._look()
      status = "running" if code is None else code
      found = f"{self._run} {status}" if self._run else "none none"
      hosts = range(1 if "--worker=0" in args else 2)
      return "".join(f"worker {i} {found}\n" for i in hosts)
    if words[:3] == ["bash", "worker.sh", "stop"]:
      self._look()
      self._run = None
    elif words[:3] == ["bash", "worker.sh", "start"]:
      if self._run:
        raise LookupError("another run is active already")
      self._run = words[3]
      self.starts.append(self._now)
    return "the last line of the log\n" if "log" in words else ""


# As `gcloud compute instance-groups managed` prints a group and its machines
# (https://cloud.google.com/compute/docs/reference/rest/v1/instanceGroupManagers).
GROUP = {
    "baseInstanceName": "s24", "currentActions": {"none": 2},
    "description": "metaformer_jax launcher 0123456789ab",
    "kind": "compute#instanceGroupManager", "name": "s24", "targetSize": 2,
    "status": {"isStable": True, "bulkInstanceOperation": {
        "inProgress": False, "lastProgressCheck": {
            "timestamp": "2026-10-01T08:00:00Z", "error": {"errors": [{
                "code": "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS",
                "message": "Waiting for resources"}]}}}}}
MACHINES = [{
    "currentAction": "NONE", "id": "1", "instance": f"zones/z/instances/{name}",
    "instanceStatus": "RUNNING", "name": name, "lastAttempt": {"errors": {
        "errors": [{"code": "INTERNAL_ERROR", "message": "Again"}]}}}
    for name in ("s24-b2cd", "s24-a1bc")]


class MigWorld(World):
  """The same for a managed instance group of two machines."""

  def _answer(self, command: str, args: list[str]) -> str:
    exists = bool(self.creations) and self.creations[-1] is not None
    waits = exists and self._now < self.creations[-1] + self._queued
    if args[1] != "compute":
      return super()._answer(command, args)
    if args[2] in ("instance-templates", "resource-policies"):
      return json.dumps({"description": GROUP["description"]})
    if args[2] == "scp":
      return ""
    if args[2] == "ssh":
      if not exists or waits:
        raise LookupError("Could not fetch resource:\n - it was not found")
      if args[3] == "s24-a1bc" or "worker.sh start" not in args[-1]:
        return self._host(args[-1].partition("=")[2], [*args, "--worker=0"])
      return ""
    if args[4] == "create":
      self.creations.append(self._now)
      return ""
    if not exists:
      raise LookupError("NOT_FOUND: The resource s24 was not found")
    if args[4] == "delete":
      self._run = None
      self.creations.append(None)
      return ""
    if args[4] == "describe":
      return json.dumps(GROUP)
    return json.dumps([machine | ({"instanceStatus": "STAGING",
                                   "currentAction": "CREATING"} if waits else
                                  {}) for machine in MACHINES])


def mutate(text: str, rng: random.Random) -> bytes:
  """A text of JSON, or of lines, with one thing wrong."""
  way = rng.randrange(8)
  try:
    document = json.loads(text)
  except ValueError:
    document = None
  if document is not None and way < 5:
    return _render(document, rng.choice(list(_paths(document))), rng).encode()
  data = text.encode()
  if way == 5:
    return data[:rng.randrange(len(data) + 1)]
  if way == 6:
    return rng.randbytes(rng.randrange(200))
  lines = data.splitlines(keepends=True) or [b""]
  lines.insert(rng.randrange(len(lines) + 1), rng.choice([
      b"WARNING: quota project NOT_FOUND\n", b"\xff\xfe\x00\n", b"worker\n",
      b"worker 0 none " + b"9" * 5000 + b"\n", b"{", b"x" * 100_000]))
  return b"".join(lines)


def _paths(node, path: tuple = ()):
  yield path
  items = node.items() if isinstance(node, dict) else (
      enumerate(node) if isinstance(node, list) else ())
  for key, child in items:
    yield from _paths(child, (*path, key))


def _render(node, target: tuple, rng: random.Random) -> str:
  """JSON text of `node`, with the node at the path `target` changed."""
  if not target:
    return rng.choice([
        "null", "[]", "{}", "[{}]", '""', '"ACTIVE"', '"FAILED"', "7", "-1",
        "16", "3.5", "NaN", "-Infinity", "true", "9" * 5000, "[" * 100_000,
        "[" * 500 + "]" * 500, '{"state": ' * 400 + "1" + "}" * 400,
        r'"\ud800\u001b[31m"', json.dumps(string.printable * 50)])
  key, *rest = target
  if isinstance(node, list):
    return "[" + ", ".join(
        _render(child, tuple(rest), rng) if i == key else json.dumps(child)
        for i, child in enumerate(node)) + "]"
  parts = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in node.items()
           if k != key]
  if rest or rng.random() < 0.7:  # Otherwise it is deleted.
    parts.append(f"{json.dumps(key)}: {_render(node[key], tuple(rest), rng)}")
  if rng.random() < 0.2:
    parts.append(f"{json.dumps(key)}: {json.dumps(node[key])}")
  return "{" + ", ".join(parts) + "}"
