"""Simulates `gcloud compute`: a template, a policy and a group of machines.

The part of fake_gcloud.py for managed instance groups. States of the `queue`:

  RUNNING        all machines run
  CREATING       there are no machines yet; CREATING:CODE: because of an error
  ABSENT         someone has deleted the group
  anything else  the status of the last machine, or its action if it is one

An error in `faults` that begins with a status of HTTP, or with a code of
Compute Engine, is printed as gcloud prints it with --log-http: the code is only
in the logged answer.
"""

COMMON = {"--project", "--quiet"}
API = COMMON | {"--log-http"}
SHOWN = API | {"--format"}
# The flags in the documentation of each command, as far as they are used.
FLAGS = {
    "instance-templates create": API | {
        "--description", "--machine-type", "--image-family", "--image-project",
        "--boot-disk-size", "--maintenance-policy", "--scopes",
        "--provisioning-model", "--instance-termination-action",
        "--service-account"},
    "instance-templates describe": SHOWN,
    "instance-templates delete": API,
    "resource-policies create workload-policy": API | {
        "--description", "--region", "--type", "--accelerator-topology"},
    "resource-policies describe": SHOWN | {"--region"},
    "resource-policies delete": API | {"--region"},
    "instance-groups managed create": API | {
        "--zone", "--description", "--template", "--size",
        "--default-action-on-vm-failure", "--target-size-policy-mode",
        "--workload-policy"},
    "instance-groups managed describe": SHOWN | {"--zone"},
    "instance-groups managed list-instances": SHOWN | {"--zone"},
    "instance-groups managed delete": API | {"--zone"},
    "ssh": COMMON | {"--zone", "--command"},
    "scp": COMMON | {"--zone"},
}
ACTIONS = ("RECREATING", "DELETING")
NAMES = {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}


class Refused(Exception):
  """An error of the API; `log` is what --log-http prints of it."""

  def __init__(self, status, body, shown):
    super().__init__(shown)
    self.log = (
        "==== request start ====\nuri: https://compute.googleapis.com/x\n"
        "---- response start ----\nstatus: 200\n-- body start --\n{}\n"
        f"-- body end --\n---- response start ----\nstatus: {status}\n"
        f"-- headers start --\n-- headers end --\n-- body start --\n{body}\n"
        "-- body end --\n---- response end ----\n")


def refused(status, message, named=False):
  body = f'{{"error": {{"code": {status}, "message": "{message}"}}}}'
  return Refused(status, body, f"{NAMES[status]}: {message}" if named else
                 f"Could not fetch resource:\n - {message}\n")


def fault(cloud, kind):
  """Raises the next error of a kind of call, if there is one."""
  n = cloud.now["calls"].get(kind, 0)
  cloud.now["calls"][kind] = n + 1
  faults = cloud.scenario.get("faults", {}).get(kind, [])
  text = faults[n] if n < len(faults) else ""
  code, _, message = text.partition(" ")
  if code.isdecimal():
    raise refused(int(code), message, named=kind == "describe")
  if "_" in code and code.isupper():
    body = (f'{{"status": "DONE", "error": {{"errors": [{{"code": "{code}",'
            f' "message": "{message}"}}]}}, "httpErrorStatusCode": 403}}')
    raise Refused(200, body, f"Could not fetch resource:\n - {message}\n")
  if text:
    raise Refused(200, "{}", text)


def call(cloud, words, flags):
  """Returns what a command prints; words: without "compute"."""
  name = " ".join(words[:2 if words[0].endswith(("templates", "policies"))
                        else 3 if words[0] == "instance-groups" else 1])
  if name == "resource-policies create":
    name += " workload-policy"
  unknown = set(flags) - FLAGS[name]
  if unknown:
    raise Refused(200, "", f"unrecognized arguments: {sorted(unknown)}")
  if words[0] == "instance-groups":
    return group(cloud, words[2], flags)
  if words[0] in ("ssh", "scp"):
    fault(cloud, words[0])
    host = words[-1].partition(":")[0]
    if host not in machines(cloud) or state(cloud) != "RUNNING":
      raise refused(404, f"The resource {host} was not found")
    return scp(cloud, host) if words[0] == "scp" else ssh(
        cloud, host, flags["--command"])
  return part(cloud, words[0].split("-")[1][:-1].replace("policie", "policy"),
              words[1], flags)


def part(cloud, kind, verb, flags):
  """The template or the policy."""
  fault(cloud, f"{kind} {verb}")
  exists = cloud.now[kind] is not None
  if verb == "create":
    if exists:
      raise refused(409, f"The resource {kind} already exists")
    cloud.now[kind] = flags["--description"]
  elif not exists:
    raise refused(404, f"The resource {kind} was not found")
  elif verb == "describe":
    return f'{{"description": "{cloud.now[kind]}"}}'
  else:
    if cloud.now["exists"]:
      raise refused(400, f"The resource {kind} is already being used")
    cloud.now[kind] = None
  return ""


def group(cloud, verb, flags):
  fault(cloud, verb)
  if verb == "create":
    if cloud.now["template"] is None or (
        "--workload-policy" in flags and cloud.now["policy"] is None):
      raise refused(404, "The template or the policy was not found")
    cloud.need("the wrong size", int(flags["--size"]) ==
               cloud.scenario.get("hosts", 1))
    if cloud.now["exists"]:
      raise refused(409, "The resource s24 already exists")
    cloud.now |= {"created": cloud.now["created"] + 1, "exists": True,
                  "looks": 0, "run": None, "did": {}}
    cloud.now["group"] = flags["--description"]
    return ""
  cloud.now["looks"] += verb == "describe"
  if not cloud.now["exists"] or state(cloud) == "ABSENT":
    cloud.now["exists"] = False
    raise refused(404, "The resource s24 was not found", verb == "describe")
  if verb == "delete":
    cloud.now["exists"] = False
    return ""
  return describe(cloud) if verb == "describe" else instances(cloud)


def state(cloud):
  queue = cloud.scenario["queue"][cloud.now["created"]]
  return queue[max(0, min(cloud.now["looks"] - 1, len(queue) - 1))]


def machines(cloud):
  """Names of the machines of this group, in no order."""
  n = cloud.scenario.get("hosts", 1)
  return [f"s24-{i:02}{cloud.now['created']}x" for i in reversed(range(n))]


def describe(cloud):
  _, _, code = state(cloud).partition(":")
  operation = "{}"
  if code:
    operation = ('{"inProgress": true, "lastProgressCheck": {"error": '
                 f'{{"errors": [{{"code": "{code}", "message": "why"}}]}}}}}}')
  description = cloud.now.get("group") or cloud.scenario.get("group", "")
  return (f'{{"description": "{description}", "targetSize": '
          f'{cloud.scenario.get("hosts", 1)}, "status": '
          f'{{"bulkInstanceOperation": {operation}}}}}')


def instances(cloud):
  now = state(cloud)
  names = machines(cloud)
  found = []
  for name in names:
    status, action = '"RUNNING"', "NONE"
    if now.startswith("CREATING"):
      status, action = "null", "CREATING"
    elif now in ACTIONS and name == names[0]:
      action = now
    elif now != "RUNNING" and name == names[0]:
      status = f'"{now}"'
    found.append(f'{{"name": "{name}", "instanceStatus": {status}, '
                 f'"currentAction": "{action}"}}')
  return f"[{', '.join(found)}]"


def scp(cloud, host):
  cloud.now["did"].setdefault("copied", []).append(host)
  return ""


def ssh(cloud, host, command):
  did = cloud.now["did"]
  index = sorted(machines(cloud)).index(host)
  if command.startswith("if [ -f worker.sh ]"):
    return states(cloud, host, index)
  cloud.need("no such file: worker.sh", host in did.get("copied", []))
  _, _, verb, *args = command.split()
  fault(cloud, verb)
  if verb == "stop":
    did["started"] = [h for h in did.get("started", []) if h != host]
  elif verb == "install":
    did.setdefault("installed", []).append(host)
  elif verb == "start":
    cloud.need("nothing is installed", host in did.get("installed", []))
    cloud.need("another run is active", host not in did.get("started", []))
    n = len(machines(cloud))
    flags = [f"--coordinator={min(machines(cloud))}:8476",
             f"--process_count={n}", f"--process_index={index}"]
    cloud.need("the processes do not find each other",
               n == 1 or args[-3:] == flags)
    if not did.get("started"):
      cloud.now |= {"run": args[0], "started": cloud.now["started"] + 1,
                    "polls": 0, "stopped": False}
    did.setdefault("started", []).append(host)
  elif verb == "log":
    return "the last line of the log\n"
  return ""


def states(cloud, host, index):
  did = cloud.now["did"]
  if "foreign" in cloud.scenario and not did:
    did |= {"copied": machines(cloud), "started": machines(cloud)}
  if cloud.now["run"] is None or host not in did.get("started", []):
    return ("worker h none none\n" if host in did.get("copied", [])
            else "worker - none none\n")
  cloud.now["polls"] += index == 0
  runs = cloud.scenario["runs"][cloud.now["started"]]
  found = runs[max(0, min(cloud.now["polls"] - 1, len(runs) - 1))]
  code = found if isinstance(found, str) else found[index]
  if code is None:
    raise Refused(200, "", "[/usr/bin/ssh] exited with return code [255].")
  return f"worker {host} {cloud.now['run']} {code}\n"
