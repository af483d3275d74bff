"""Simulates gcloud (and git): one slice, its queue, its hosts and its runs.

Queued resources are here, managed instance groups in fake_mig.py.

A test puts programs of both names on PATH, which call `main`, and writes a file
`scenario`:

  queue   for each slice that is created, the states that successive calls of
          `describe` return; the last one repeats
  runs    for each run that is started, what successive polls return: "running",
          or a list of the hosts' exit codes (None: the host does not answer);
          the last one repeats
  faults  for each kind of call, the errors of its first calls; "": no error
  steps   the newest checkpoint in successive listings
  hosts   number of hosts of the slice
  foreign id of a run that is already on the first slice, running or finished

Every call is recorded in the file `calls`. Unknown flags, and calls that are
not possible in the current state, fail. It is started hundreds of times, so it
imports little; its files hold Python literals.
"""

import os
import sys

import fake_mig

FOLDER = os.environ.get("FAKE_CLOUD", ".")
COMMON = {"--zone", "--project", "--quiet"}
# The flags in the documentation of each command, as far as they are used.
FLAGS = {
    ("queued-resources", "create"): COMMON | {
        "--node-id", "--accelerator-type", "--runtime-version", "--spot",
        "--service-account"},
    ("queued-resources", "describe"): COMMON | {"--format"},
    ("queued-resources", "delete"): COMMON | {"--force"},
    ("tpu-vm", "describe"): COMMON | {"--format"},
    ("tpu-vm", "scp"): COMMON | {"--worker"},
    ("tpu-vm", "ssh"): COMMON | {"--worker", "--command"},
}


class Fault(Exception):
  """An error message of gcloud; the exit code is 1."""


def at(items, i):
  return items[max(0, min(i, len(items) - 1))]


def read(name):
  with open(f"{FOLDER}/{name}") as file:
    return file.read()


class Cloud:
  """The scenario, and its current state."""

  def __init__(self):
    self.scenario = eval(read("scenario"))
    new = not os.path.exists(f"{FOLDER}/state")
    self.now = eval(read("state")) if not new else {
        "created": -1, "exists": False, "looks": 0, "copied": False,
        "installed": False, "run": None, "started": -1, "polls": 0,
        "stopped": True, "calls": {}, "did": {},
        "template": self.scenario.get("template"),
        "policy": self.scenario.get("policy")}
    if new and "group" in self.scenario:
      self.now |= {"created": 0, "exists": True}
    if new and "foreign" in self.scenario:
      self.now |= {"created": 0, "exists": True, "copied": True,
                   "run": self.scenario["foreign"], "started": 0,
                   "stopped": False}

  def save(self):
    with open(f"{FOLDER}/state", "w") as file:
      file.write(repr(self.now))

  def fault(self, kind):
    n = self.now["calls"].get(kind, 0)
    self.now["calls"][kind] = n + 1
    faults = self.scenario.get("faults", {}).get(kind, [])
    if n < len(faults) and faults[n]:
      raise Fault(faults[n])

  def state(self):
    return at(self.scenario["queue"][self.now["created"]],
              self.now["looks"] - 1)

  def need(self, what, condition):
    if not condition:
      raise Fault(f"the fake cloud: {what}")

  def call(self, words, flags):
    """Returns what the command prints."""
    if words[0] == "storage":
      self.fault("ls")
      n = self.now["calls"]["ls"] - 1
      step = at(self.scenario.get("steps", [0]), n)
      if not step:
        raise Fault("One or more URLs matched no objects.")
      return "".join(words[2].replace("*", str(name)) + "\n"
                     for name in (500, step, "9999.damaged"))
    if words[1] != "tpus":
      return fake_mig.call(self, words[1:], flags)
    group, verb, *rest = words[2:]
    unknown = set(flags) - FLAGS[group, verb]
    if unknown:
      raise Fault(f"unrecognized arguments: {' '.join(sorted(unknown))}")
    if group == "queued-resources":
      return getattr(self, verb)(flags)
    self.fault(f"tpu-vm {verb}")
    self.need("NOT_FOUND: there is no node", self.now["exists"])
    self.need("NOT_FOUND: the slice is not active", self.state() == "ACTIVE")
    if verb == "describe":
      hosts = ", ".join(["{}"] * self.scenario.get("hosts", 1))
      return f'{{"state": "READY", "networkEndpoints": [{hosts}]}}'
    if verb == "scp":
      self.need("nothing to copy to", rest[-1].endswith(":"))
      self.now["copied"] = True
      return ""
    return self.ssh(flags["--command"], flags["--worker"])

  def create(self, flags):
    self.fault("create")
    if self.now["exists"]:
      raise Fault("ALREADY_EXISTS: Resource 's24' already exists")
    self.now |= {"created": self.now["created"] + 1, "exists": True, "looks": 0,
                 "copied": False, "installed": False, "run": None,
                 "stopped": True}
    return ""

  def describe(self, flags):
    self.fault("describe")
    self.now["looks"] += 1
    if not self.now["exists"] or self.state() == "ABSENT":
      self.now["exists"] = False
      raise Fault("NOT_FOUND: Resource 's24' was not found")
    name, _, code = self.state().partition(":")
    error = ""
    if code:
      error = (f', "failedData": {{"error": {{"code": {code}, "message": '
               '"why"}}')
    return f'{{"state": {{"state": "{name}"{error}}}}}'

  def delete(self, flags):
    self.fault("delete")
    self.need("NOT_FOUND", self.now["exists"])
    self.now["exists"] = False
    return ""

  def ssh(self, command, worker):
    if command.startswith("if [ -f worker.sh ]"):
      return self.states(worker)
    self.need("no such file: worker.sh", self.now["copied"])
    _, _, verb, *args = command.split()
    self.fault(verb)
    if verb == "stop":
      self.now["stopped"] = True
    elif verb == "install":
      self.now["installed"] = True
    elif verb == "start":
      self.need("nothing is installed", self.now["installed"])
      self.need("another run is active", self.now["stopped"])
      self.now |= {"run": args[0], "started": self.now["started"] + 1,
                   "polls": 0, "stopped": False}
    elif verb == "log":
      return "the last line of the log\n"
    return ""

  def states(self, worker):
    hosts = self.scenario.get("hosts", 1)
    if not self.now["copied"]:
      n = hosts if worker == "all" else 1
      return "worker - none none\n" * n
    if self.now["run"] is None:
      return "worker 0 none none\n"
    self.now["polls"] += worker == "0"
    found = at(self.scenario["runs"][self.now["started"]],
               self.now["polls"] - 1)
    codes = [found] * hosts if isinstance(found, str) else found
    lines = [f"worker {i} {self.now['run']} {code}" for i, code in
             enumerate(codes) if code is not None
             and worker in ("all", str(i))]
    out = "".join(f"{line}\n" for line in lines)
    if len(lines) < (hosts if worker == "all" else 1):
      sys.stdout.write(out)
      print("ssh: connect to host port 22: Connection timed out",
            file=sys.stderr)
      raise Fault("[/usr/bin/ssh] exited with return code [255].")
    return out


def main():
  """Returns the exit code."""
  name = os.path.basename(sys.argv[0])
  with open(f"{FOLDER}/calls", "a") as calls:
    calls.write(f"{[name, *sys.argv[1:]]!r}\n")
  if name == "git":
    return 0
  if read("calls").count("\n") > 200:
    print("ERROR: (gcloud) PERMISSION_DENIED: too many calls, an endless loop?",
          file=sys.stderr)
    return 1
  words = [a for a in sys.argv[1:] if not a.startswith("--")]
  flags = dict(a.partition("=")[::2] for a in sys.argv[1:]
               if a.startswith("--"))
  cloud = Cloud()
  try:
    sys.stdout.write(cloud.call(words, flags))
  except (Fault, fake_mig.Refused) as e:
    last = {"tpus": 4, "instance-groups": 4, "ssh": 2, "scp": 2}
    path = ".".join(words[:last.get(words[1], 3) if words[0] == "compute"
                          else 2])
    print(f"{getattr(e, 'log', '')}ERROR: (gcloud.{path}) {e}",
          file=sys.stderr)
    return 1
  finally:
    cloud.save()
  return 0
