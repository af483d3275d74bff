"""Runs commands, and says which kind of error gcloud reports.

gcloud prints no error codes for programs. What it does print, by its source
(googlecloudsdk/calliope/exceptions.py, api_lib/util/exceptions.py) and by
messages that users have reported, follows "ERROR: (gcloud.THE.COMMAND) ":

  INVALID_ARGUMENT: MESSAGE        a status of google.rpc.Code
  {"code": 8, "message": MESSAGE}  the same by number: a failed operation
  HttpError accessing <URL>: response: <...>, content <{"error": {...}}>
  HTTPError 503: MESSAGE
  a sentence of gcloud itself

Only these places decide. Warnings before the error, and words within a message,
do not. Needs only Python, on Linux or macOS.
"""

import contextlib
import errno
import functools
import json
import os
import re
import selectors
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

# Commands that `Gcloud.each` runs at the same time.
AT_ONCE = 16
# Bytes that are kept: the first of stdout, the last of stderr.
_MAX_OUT, _MAX_ERR = 1 << 24, 1 << 16
# Seconds that output is awaited after a command has ended. A descendant may
# hold its pipes for ever, e.g. an ssh master connection (ControlPersist).
_LINGER = 2

# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto;
# a name's index is its number.
_STATUSES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
    "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED")
_HTTP = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED",
         403: "PERMISSION_DENIED", 404: "NOT_FOUND", 409: "ALREADY_EXISTS",
         429: "RESOURCE_EXHAUSTED"}

# RESOURCE_EXHAUSTED has several meanings: see _exhausted.
_KINDS = {
    "NOT_FOUND": "absent", "ALREADY_EXISTS": "exists",
    "INVALID_ARGUMENT": "refused", "OUT_OF_RANGE": "refused",
    "PERMISSION_DENIED": "refused", "UNIMPLEMENTED": "refused",
    "UNAUTHENTICATED": "auth", "CANCELLED": "failed", "UNKNOWN": "failed",
    "DEADLINE_EXCEEDED": "failed", "ABORTED": "failed", "INTERNAL": "failed",
    "UNAVAILABLE": "failed", "DATA_LOSS": "failed"}

# Errors that begin with a sentence of gcloud itself.
_SENTENCES = (
    # HttpErrorPayload._MakeDescription, for URLs with a short path.
    (r"\[[^\]]*\] does not have permission to access ", "refused"),
    (r"[\w ]+ \[[^\]]*\] not found\b", "absent"),
    (r"[\w ]+ \[[^\]]*\] is the subject of a conflict", "exists"),
    # command_lib/storage; the second is GcsNotFoundError.
    (r"One or more URLs matched no objects\.", "absent"),
    (r"gs://\S+ not found: 404\.", "absent"),
    # command_lib/compute/tpus/tpu_vm/exceptions.py
    (r"SSH Key is not present in the SSH agent\.", "refused"),
    # core/credentials/exceptions.py. What follows the colon is an error code
    # of OAuth, or the network's error: the token server was not reached.
    (r"There was a problem (refreshing|reauthenticating)[^:]*: "
     r"(\(')?(Reauthentication|invalid_|unauthorized_|access_denied)", "auth"),
    (r"There was a problem (refreshing|reauthenticating)[^:]*: ", "failed"),
    (r"You do not currently have an active account selected\.", "auth"),
    (r"Reauthentication (required|failed)", "auth"),
)

_ERROR = re.compile(r"^ERROR: (?:\((gcloud[\w.-]*)\)|gcloud crashed \((\w+)\):)"
                    r"\s*", re.MULTILINE)
# Exceptions of Python's network libraries that gcloud does not convert, e.g.
# "gcloud crashed (ConnectionError)" (googleapis' requests, httplib2).
_NETWORK = re.compile(r"\w*(Connection|Timeout|Proxy|SSL|Transport|Protocol|"
                      r"ServerNotFound|IncompleteRead|gaierror)\w*")
# NetworkIssueError appends this to every message.
_NETWORK_HELP = re.compile(r"^This may be due to network connectivity issues\.",
                           re.MULTILINE)

# "Quota limit 'TPUV6EPreemptiblePerProjectPerRegionForTPUAPI' has been
# exceeded. Limit: 0 in region us-east5." (marin-community/marin#1612), and
# "Quota 'TPUV2sPreemptiblePodPerProjectPerZoneForTPUAPI' exhausted. Limit 32
# in zone europe-west4-a" (skypilot-org/skypilot, cloud_vm_ray_backend.py).
_QUOTA = re.compile(r"Quota(?: limit)? '[^']*' (?:has been )?"
                    r"(?:exceeded|exhausted)\b(?:\.\s+Limit:? ([\d.]*\d))?")
_QUOTA_DETAIL = re.compile(
    r"\btype\.googleapis\.com/google\.rpc\.QuotaFailure\b")
# Too many requests per minute, not too many chips: "Quota exceeded for quota
# metric 'Read requests' and limit 'Read requests per minute' of service ..."
# (googleapis/repo-automation-bots#4469).
_RATE = "Quota exceeded for quota metric "


class CloudError(Exception):
  """A command failed; the message is one line.

  Attributes:
    kind: what can be done about it.
      absent    what the command is about does not exist
      exists    it exists already
      capacity  the zone has no free chips: wait
      quota     the project's other slices use its quota: wait
      refused   it would fail again: an argument, a permission, a quota of 0
      auth      the login has expired; tokens are refreshed, so it may pass
      failed    the network or the service failed: try again
      timeout   the command did not end in time, and was killed
      unknown   anything else
    out, err: what it printed before it failed.
  """

  def __init__(self, kind: str, message: str, out: str = "", err: str = ""):
    super().__init__(one_line(message))
    self.kind = kind
    self.out, self.err = out, err


class Gcloud:
  """Runs commands."""

  def __init__(self, execute: Callable[
      [list[str], float], tuple[int | None, bytes, bytes]] | None = None):
    """
    Args:
      execute: replaced by tests.
    """
    self._stop = threading.Event()
    self._execute = execute or functools.partial(_execute, stop=self._stop)

  def __call__(self, args: list[str], timeout: float = 300) -> str:
    """Returns what a command prints; raises CloudError if it fails."""
    try:
      code, out, err = self._execute(args, timeout)
    except OSError as e:
      lasting = isinstance(e, (FileNotFoundError, PermissionError,
                               NotADirectoryError)) or e.errno == errno.ENOEXEC
      raise CloudError(
          "refused" if lasting else "unknown", f"{args[0]} cannot be started: "
          f"{e.strerror}; it must be installed and on PATH") from e
    printed = out.decode(errors="replace")
    if code == 0:
      return printed
    if code is None:
      raise CloudError("timeout", f"{shlex.join(args[:6])} ... did not finish "
                       f"within {timeout:g} seconds", printed)
    said = err.decode(errors="replace")
    kind, message = _reason(args, code, said)
    raise CloudError(kind, message, printed, said)

  def each(self, commands: list[list[str]],
           timeout: float = 300) -> list["str | CloudError"]:
    """Runs several commands at the same time.

    Returns:
      What each prints, or its error, in the order of the commands.
    """
    def run(args):
      try:
        return self(args, timeout)
      except CloudError as e:
        return e

    with futures.ThreadPoolExecutor(min(AT_ONCE, len(commands))) as pool:
      started = [pool.submit(run, args) for args in commands]
      try:
        return [future.result() for future in started]
      except BaseException:  # Ctrl-C: nothing that was started goes on.
        pool.shutdown(wait=False, cancel_futures=True)
        self._stop.set()
        raise

  def show(self, args: list[str]) -> int:
    """Runs a command on this terminal; returns its exit code."""
    return subprocess.run(args, check=False).returncode


def _execute(args: list[str], timeout: float,
             stop: threading.Event) -> tuple[int | None, bytes, bytes]:
  """(exit code, or None if it was killed after `timeout` seconds; out; err).

  The command gets its own process group and no terminal, so it cannot ask
  anything, and nothing of the group is left when this returns or raises. It is
  also killed once `stop` is set.
  """
  process = subprocess.Popen(
      args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, start_new_session=True,
      env=os.environ | {"CLOUDSDK_CORE_DISABLE_PROMPTS": "1"})
  try:
    deadline = time.monotonic() + timeout
    out, err = _read(process, deadline, stop)
    if stop.is_set():
      deadline = 0
    try:
      code = process.wait(max(0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      code = None
    return code, out, err
  finally:
    # PermissionError: macOS, when the group is only a zombie.
    with contextlib.suppress(ProcessLookupError, PermissionError):
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    process.stderr.close()


def _read(process: subprocess.Popen, deadline: float,
          stop: threading.Event) -> tuple[bytes, bytes]:
  """What a process prints until it closes its output, ends, or is late."""
  out, err = bytearray(), bytearray()
  ended = False
  with selectors.DefaultSelector() as waiting:
    waiting.register(process.stdout, selectors.EVENT_READ)
    waiting.register(process.stderr, selectors.EVENT_READ)
    while (waiting.get_map() and not stop.is_set()
           and (now := time.monotonic()) < deadline):
      for key, _ in waiting.select(min(deadline - now, 0.5)):
        data = os.read(key.fd, 1 << 16)
        if not data:
          waiting.unregister(key.fileobj)
        elif key.fileobj is process.stdout:
          out += data[:_MAX_OUT - len(out)]
        else:
          err += data
          del err[:-_MAX_ERR]
      if not ended and process.poll() is not None:
        ended, deadline = True, min(deadline, now + _LINGER)
  return bytes(out), bytes(err)


def _reason(args: list[str], code: int, printed: str) -> tuple[str, str]:
  """(kind, message) of a command that printed this to stderr and failed."""
  # Of this command, or of a group that it belongs to; the last one counts.
  *_, found = None, *(error for error in _ERROR.finditer(printed)
                      if _is_part(error[1], args))
  if found is None:
    # Not gcloud's own error: git's, or of a command on a host.
    lines = [line for line in printed.splitlines() if line.strip()]
    return "unknown", (lines[-1] if lines else
                       f"{args[0]} ended with exit code {code}")
  text = printed[found.end():]
  first = text.partition("\n")[0]
  command, crash = found.groups()
  if crash:
    return ("failed" if _NETWORK.fullmatch(crash) else "unknown",
            f"gcloud crashed ({crash}): {first}")
  status, message = _status(text)
  if status:
    return kind_of(status, message, text), f"{command}: {status}: {message}"
  kind = next((kind for sentence, kind in _SENTENCES
               if re.match(sentence, text)), "unknown")
  if kind == "unknown" and _NETWORK_HELP.search(text):
    kind = "failed"
  if kind == "unknown" and code == 2:  # argparse's: the command line is wrong.
    kind = "refused"
  return kind, f"{command}: {first}"


def _is_part(command: str | None, args: list[str]) -> bool:
  """Whether an error of `command`, gcloud's own if None, is about `args`."""
  words = (command or "gcloud").split(".")
  return words == args[:len(words)]


def _status(text: str) -> tuple[str | None, str]:
  """(status, message) of the text of an error; (None, "") if it has none."""
  named = re.match(r"([A-Z_]+): ", text)
  if named and named[1] in _STATUSES:
    return named[1], text[named.end():].partition("\n")[0]
  numbered = re.match(r"HTTPError (\d{3})\b:?\s*([^\n]*)"
                      r"|ResponseError: code=(\d{3}), message=([^\n]*)", text)
  if numbered:
    number, message = (g for g in numbered.groups() if g is not None)
    return status_name(int(number)), message
  response, body = "", text
  if text.startswith("HttpError accessing <"):
    response, _, body = text.partition(">, content <")
  error = _leading_object(body)
  if response:
    error = value(error, "error", dict) or {}
  status = (value(error, "status", str) or
            status_name(value(error, "code", int)))
  if status not in _STATUSES:
    number = re.search(r"'status': '?(\d{3})\b", response)
    status = status_name(int(number[1])) if number else None
  if status not in _STATUSES:
    return None, ""
  return status, value(error, "message", str) or ""


def status_name(number: int | None) -> str | None:
  """The status with a number of google.rpc.Code, or for a status of HTTP."""
  if number is None:
    return None
  if 0 <= number < len(_STATUSES):
    return _STATUSES[number]
  return "UNAVAILABLE" if 500 <= number < 600 else _HTTP.get(number)


def kind_of(status: str | None, message: str, details: str = "") -> str:
  """The kind of an error (CloudError.kind).

  Args:
    status: a name of google.rpc.Code.
    message: its message.
    details: the types of its details, in any text.
  """
  if status == "RESOURCE_EXHAUSTED":
    return _exhausted(message, details)
  return _KINDS.get(status, "unknown")


def _exhausted(message: str, details: str) -> str:
  if message.startswith(_RATE):
    return "failed"
  quota = _QUOTA.match(message)
  if quota and quota[1] and not quota[1].strip("0."):
    return "refused"
  if quota or _QUOTA_DETAIL.search(details):
    return "quota"
  # 'There is no more capacity in the zone "us-central1-c"; ...' (code 8,
  # hashicorp/terraform-provider-google#21243), "Insufficient reserved
  # capacity. ..." (code 8, skypilot-org/skypilot#4579).
  return "capacity"


def _leading_object(text: str) -> dict[str, Any]:
  """The JSON object at the start of a text; {} if there is none."""
  try:
    found, _ = json.JSONDecoder().raw_decode(text)
  except (ValueError, RecursionError):
    return {}
  return found if isinstance(found, dict) else {}


def read_object(printed: str) -> dict[str, Any]:
  """The JSON object that a command printed; CloudError if it is not one."""
  return _read_json(printed, dict, "object")


def read_list(printed: str) -> list[Any]:
  """The JSON list that a command printed; CloudError if it is not one."""
  return _read_json(printed, list, "list")


def _read_json(printed: str, kind: type, name: str) -> Any:
  try:
    found = json.loads(printed)
  except (ValueError, RecursionError) as e:
    raise CloudError("unknown", f"gcloud did not print JSON: {e}") from e
  if not isinstance(found, kind):
    raise CloudError("unknown", f"gcloud did not print a JSON {name} but "
                     f"{type(found).__name__}")
  return found


def value(found: Any, key: str, kind: type) -> Any:
  """`found[key]` if `found` is a dict and the value of this type, or None."""
  got = found.get(key) if isinstance(found, dict) else None
  return got if type(got) is kind else None  # A bool is not an int here.


def one_line(text: str, limit: int = 600) -> str:
  """A text as one printable line; a long one is cut."""
  line = " ".join("".join(c if c.isprintable() else " "
                          for c in text[:4 * limit]).split())
  return line if len(line) <= limit else line[:limit - 4] + " ..."
