"""A slice as a managed instance group of Compute Engine.

Made of an instance template and, for several hosts, a workload policy with the
topology and a group in bulk mode, which waits until all machines can be created
at once. All three have the slice's name. Sources of the flags:
docs/tpu/flags.md.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shlex

import cloud
import commands
import compute

# TPU generation -> (machine type, family of images, cores per chip that its
# name counts, axes of the topology).
GENERATIONS = {
    "v5p": ("ct5p-hightpu", "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e", 2, 3),
    "v6e": ("ct6e-standard", "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e", 1, 2),
    "tpu7x": ("tpu7x-standard", "ubuntu-accel-2404-amd64-tpu-tpu7x", 2, 3),
}
# Chips of one machine; a slice of v6e with one chip has a machine with one.
_CHIPS = 4
# Chips of the largest slice, by the number of axes of its topology.
_MOST_CHIPS = {2: 256, 3: 4096}

# What this launcher makes has a description that begins so. Nothing else is
# changed or deleted.
_MARK = "metaformer_jax launcher "

# Port of process 0; jax's own default.
_PORT = 8476

# States of an instance that is going away, or has gone, and actions of the
# group that end one.
_LOST = ("STOPPING", "STOPPED", "TERMINATED", "SUSPENDING", "SUSPENDED",
         "PENDING_STOP", "DEPROVISIONING", "REPAIRING")
_ENDING = ("ABANDONING", "DELETING", "RECREATING", "RESTARTING", "STOPPING",
           "SUSPENDING")
# Errors with which a group goes on trying.
_WAITED_FOR = ("capacity", "failed", "unknown")


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of a slice: machine type, number of hosts, topology such as "4x4"."""

  machine: str
  hosts: int
  topology: str


def shape(accelerator: str) -> Shape:
  """The shape of a slice, by its name.

  Raises:
    UsageError: there is no slice of this size.
  """
  generation, _, size = accelerator.partition("-")
  machine, _, cores, axes = GENERATIONS[generation]
  chips, rest = divmod(int(size), cores)
  n = max(0, chips.bit_length() - 1)
  single = generation == "v6e" and chips == 1
  if rest or chips != 1 << n or not (
      single or _CHIPS <= chips <= _MOST_CHIPS[axes]):
    least = cores * _CHIPS
    raise cloud.UsageError(
        f"--accelerator={accelerator}: give {generation}- and a power of two "
        f"from {least} to {cores * _MOST_CHIPS[axes]}, e.g. "
        f"{generation}-{2 * least}")
  sides = sorted(1 << (n + i) // axes for i in range(axes))
  return Shape(f"{machine}-{min(chips, _CHIPS)}t", max(1, chips // _CHIPS),
               "x".join(map(str, sides)))


@dataclasses.dataclass
class MigSlice(cloud.Slice):
  """A managed instance group, its template and its workload policy.

  A host's index is the position of its machine's name in their sorted list.
  """

  name: str
  zone: str
  project: str | None
  accelerator: str
  image_family: str
  spot: bool
  create_flags: tuple[str, ...] = ()
  _names: list[str] = dataclasses.field(default_factory=list)

  def _gcloud(self, *words: str, zone: bool = True) -> list[str]:
    where = [f"--zone={self.zone}"] if zone else []
    if self.project:
      where.append(f"--project={self.project}")
    return ["gcloud", "compute", *words, *where, "--quiet"]

  def _template(self, verb: str) -> list[str]:
    return [*self._gcloud("instance-templates", verb, self.name, zone=False),
            "--log-http"]

  def _policy(self, *verb: str) -> list[str]:
    region = self.zone.rpartition("-")[0]
    return [*self._gcloud("resource-policies", *verb, self.name, zone=False),
            f"--region={region}", "--log-http"]

  def _group(self, verb: str) -> list[str]:
    return [*self._gcloud("instance-groups", "managed", verb, self.name),
            "--log-http"]

  def _ssh(self, host: str, command: str) -> list[str]:
    return [*self._gcloud("ssh", host), f"--command={command}"]

  @property
  def removal(self) -> str:
    project = [f"--project={self.project}"] if self.project else []
    return shlex.join(["python", "launch/tpu_vm.py", "delete", "--backend=mig",
                       f"--name={self.name}", f"--zone={self.zone}", *project])

  def _parts(self) -> tuple[list[str], list[str] | None, list[str]]:
    """Flags of the template, the policy if there is one, and the group."""
    made = shape(self.accelerator)
    template = [
        f"--machine-type={made.machine}", f"--image-family={self.image_family}",
        "--image-project=ubuntu-os-accelerator-images",
        "--boot-disk-size=200GB", "--maintenance-policy=TERMINATE",
        "--scopes=cloud-platform"]
    if self.spot:
      template += ["--provisioning-model=SPOT",
                   "--instance-termination-action=STOP"]
    group = [f"--template={self.name}", f"--size={made.hosts}",
             "--default-action-on-vm-failure=do-nothing"]
    if made.hosts == 1:
      return [*template, *self.create_flags], None, group
    region = self.zone.rpartition("-")[0]
    policy = ["--type=HIGH_THROUGHPUT",
              f"--accelerator-topology={made.topology}"]
    group += ["--target-size-policy-mode=bulk",
              f"--workload-policy=projects/{self.project}/regions/{region}/"
              f"resourcePolicies/{self.name}"]
    return [*template, *self.create_flags], policy, group

  def create(self, gcloud: commands.Gcloud) -> None:
    try:
      self._create(gcloud)
    except commands.CloudError as e:
      if e.kind not in ("exists", "failed", "timeout", "auth", "unknown"):
        # It may never be asked for again; the first error is what counts.
        with contextlib.suppress(commands.CloudError):
          self._clear(gcloud)
      raise

  def _create(self, gcloud: commands.Gcloud) -> None:
    template, policy, group = self._parts()
    self._make(gcloud, "instance template", self._template("create"),
               self._template("describe"), self._template("delete"), template)
    if policy:
      self._make(gcloud, "resource policy",
                 self._policy("create", "workload-policy"),
                 self._policy("describe"), self._policy("delete"), policy)
    _ask(gcloud, [*self._group("create"), _described(group), *group],
         timeout=900)

  def _make(self, gcloud: commands.Gcloud, what: str, create: list[str],
            describe: list[str], delete: list[str], flags: list[str]) -> None:
    """Makes a part; what a launcher that ended has left is replaced."""
    create = [*create, _described(flags), *flags]
    try:
      _ask(gcloud, create)
    except commands.CloudError as e:
      if e.kind != "exists":
        raise
      found = _description(gcloud, describe)
      _require_own(found, what, self.name)
      if f"--description={found}" != _described(flags):
        _ask(gcloud, delete)
        _ask(gcloud, create)

  def state(self, gcloud: commands.Gcloud) -> cloud.State:
    try:
      found = commands.read_object(_ask(gcloud, [
          *self._group("describe"), "--format=json"]))
    except commands.CloudError as e:
      if e.kind == "absent":
        return cloud.State("ABSENT", "absent")
      raise
    _require_own(commands.value(found, "description", str) or "",
                 "managed instance group", self.name)
    size = commands.value(found, "targetSize", int)
    if size is None:
      raise commands.CloudError("unknown", "gcloud printed no targetSize of "
                                "the managed instance group")
    instances = self._instances(gcloud)
    operation = commands.value(commands.value(found, "status", dict),
                               "bulkInstanceOperation", dict)
    return _state(size, instances, _errors(operation, instances))

  def _instances(self, gcloud: commands.Gcloud) -> list[dict]:
    """The group's machines, sorted by name; the names are remembered."""
    printed = _ask(gcloud, [*self._group("list-instances"), "--format=json"])
    found = [item for item in commands.read_list(printed)
             if isinstance(item, dict)]
    names = [_name(item) for item in found]
    if not all(names) or len(set(names)) < len(names):
      raise commands.CloudError("unknown", "gcloud printed no names of the "
                                "managed instance group's machines")
    self._names = sorted(names)
    return sorted(found, key=_name)

  def _hosts(self, gcloud: commands.Gcloud, worker: str = "all") -> list[str]:
    """The names of the host with this index, or of all."""
    if not self._names:
      self._instances(gcloud)
    if not self._names:
      raise commands.CloudError("absent", f"{self.name} has no machines")
    if worker == "all":
      return self._names
    if not worker.isdecimal() or int(worker) >= len(self._names):
      raise commands.CloudError(
          "refused", f"--worker={worker}: give 0 to {len(self._names) - 1}, or "
          "all")
    return [self._names[int(worker)]]

  def hosts(self, gcloud: commands.Gcloud) -> tuple[str, int]:
    found = self._instances(gcloud)
    if not found:
      raise commands.CloudError("unknown", f"{self.name} has no machines")
    states = sorted({_field(item, "instanceStatus") for item in found})
    return " ".join(states), len(found)

  def delete(self, gcloud: commands.Gcloud) -> None:
    try:
      _ask(gcloud, self._group("delete"), timeout=1800)
    except commands.CloudError as e:
      if e.kind != "absent":
        raise
    self._names = []
    self._clear(gcloud)

  def _clear(self, gcloud: commands.Gcloud) -> None:
    """Deletes the template and the policy, if they are this launcher's."""
    for describe, delete in (
        (self._template("describe"), self._template("delete")),
        (self._policy("describe"), self._policy("delete"))):
      try:
        if _description(gcloud, describe).startswith(_MARK):
          _ask(gcloud, delete)
      except commands.CloudError as e:
        if e.kind != "absent":
          raise

  def copy(self, gcloud: commands.Gcloud, *files: str) -> None:
    _all(gcloud, [self._gcloud("scp", *files, f"{host}:")
                  for host in self._hosts(gcloud)], timeout=900)

  def ssh(self, gcloud: commands.Gcloud, command: str, worker: str = "all",
          timeout: float = 300) -> str:
    return "".join(_all(gcloud, [
        self._ssh(host, command) for host in self._hosts(gcloud, worker)],
        timeout))

  def show(self, gcloud: commands.Gcloud, command: str, worker: str) -> int:
    codes = [gcloud.show(self._ssh(host, command))
             for host in self._hosts(gcloud, worker)]
    return max(codes)

  def start(self, gcloud: commands.Gcloud, run: cloud.Run) -> None:
    hosts = self._hosts(gcloud)
    started = []
    for i, host in enumerate(hosts):
      flags = [f"--coordinator={hosts[0]}:{_PORT}",
               f"--process_count={len(hosts)}", f"--process_index={i}"]
      started.append(self._ssh(host, shlex.join([
          "bash", "worker.sh", *run.start, *(flags if len(hosts) > 1 else ())
      ])))
    _all(gcloud, started)

  def workers(self, gcloud: commands.Gcloud,
              worker: str = "all") -> list[cloud.Worker]:
    asked = [self._ssh(host, cloud.STATE)
             for host in self._hosts(gcloud, worker)]
    first = int(worker) if worker.isdecimal() else 0
    found = []
    for i, out in enumerate(gcloud.each(asked, timeout=120), first):
      if isinstance(out, commands.CloudError):
        out = cloud.heard(compute.classified(out))
      found += [dataclasses.replace(line, index=str(i))
                for line in cloud.read_workers(out)[:1]]
    return found

  def answer(self, args: list[str]) -> str:
    hosts = shape(self.accelerator).hosts if self.accelerator else 1
    if "list-instances" in args:
      return json.dumps([
          {"name": f"{self.name}-{i:04}", "instanceStatus": "RUNNING",
           "currentAction": "NONE"} for i in range(hosts)])
    if "describe" in args:
      return json.dumps({"description": _MARK, "targetSize": hosts})
    return ""


def _ask(gcloud: commands.Gcloud, args: list[str], timeout: float = 300) -> str:
  """What a command prints; its error has the kind that the API's code gives."""
  try:
    return gcloud(args, timeout=timeout)
  except commands.CloudError as e:
    raise compute.classified(e) from e


def _all(gcloud: commands.Gcloud, asked: list[list[str]],
         timeout: float = 300) -> list[str]:
  """What commands print that run at the same time; the first error if any."""
  found = gcloud.each(asked, timeout=timeout)
  for error in found:
    if isinstance(error, commands.CloudError):
      raise compute.classified(error)
  return found


def _described(flags: list[str]) -> str:
  digest = hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:12]
  return f"--description={_MARK}{digest}"


def _description(gcloud: commands.Gcloud, describe: list[str]) -> str:
  found = commands.read_object(_ask(gcloud, [*describe, "--format=json"]))
  return commands.value(found, "description", str) or ""


def _require_own(description: str, what: str, name: str) -> None:
  if not description.startswith(_MARK):
    raise commands.CloudError(
        "refused", f"the {what} {name} exists, and was not made by this "
        "launcher: give another --name")


def _field(item: dict, key: str) -> str:
  return commands.one_line(commands.value(item, key, str) or "none", 40)


def _name(item: dict) -> str:
  name = commands.value(item, "name", str) or ""
  return name if re.fullmatch(r"[a-z][-a-z0-9]{0,62}", name) else ""


def _errors(operation: dict | None,
            instances: list[dict]) -> list[commands.CloudError]:
  """Why machines do not exist yet: of the group, then of each machine."""
  check = commands.value(operation, "lastProgressCheck", dict)
  found = [commands.value(check, "error", dict)]
  found += [commands.value(commands.value(item, "lastAttempt", dict), "errors",
                           dict) for item in instances]
  return [error for errors in found
          for error in compute.of_items(commands.value(errors, "errors", list))]


def _state(size: int, instances: list[dict],
           errors: list[commands.CloudError]) -> cloud.State:
  """What a group's machines mean for whoever waits for the slice."""
  pairs = [(_field(item, "instanceStatus"), _field(item, "currentAction"))
           for item in instances]
  for status, action in pairs:
    if status in _LOST or action in _ENDING:
      return cloud.State(status if status in _LOST else action, "lost")
  running = sum(status == "RUNNING" and action in ("NONE", "VERIFYING", "none")
                for status, action in pairs)
  if 0 < size <= running:
    return cloud.State("RUNNING", "active")
  for error in errors:
    if error.kind not in _WAITED_FOR:
      return cloud.State("FAILED", "failed", error)
  return cloud.State("CREATING", "waiting", errors[0] if errors else None)
