"""Notices of a Google Cloud machine that it will be taken away.

They stand in its metadata server, which answers a request when a value changes
(cloud.google.com/compute/docs/metadata/querying-metadata): seconds before the
SIGTERM of a preempted spot machine, up to an hour before a maintenance. On
other machines nothing is asked: neither a name is looked up nor a connection
made.
"""

import http.client
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

# Where the metadata server is, for Google's own libraries as well. Of a machine
# at Google, the firmware says so.
_VARIABLE, _HOST = "GCE_METADATA_HOST", "metadata.google.internal"
_FIRMWARE = pathlib.Path("/sys/class/dmi/id/product_name")

_HEADERS = {"Metadata-Flavor": "Google"}
_MAX_BYTES = 1 << 16

# Seconds that the server waits for a change; beyond that, for its answer; until
# the next request after one that failed.
_WAIT, _GRACE, _PAUSE = 60, 10, 60.0


def _preempted(value: str) -> bool:
  return value == "TRUE"


def _terminated(value: str) -> bool:
  return value == "TERMINATE_ON_HOST_MAINTENANCE"


def _maintained(value: str) -> bool:
  """Of a maintenance that has begun; it is announced days before."""
  try:
    found = json.loads(value)
  except (ValueError, RecursionError):
    return False
  return isinstance(found, dict) and "ONGOING" in (
      found.get("maintenance_status"), found.get("maintenanceStatus"))


# Key -> (whether a value means that the machine is about to be taken away,
# whether that also counts if it is so at the start). A run that a maintenance
# has ended may be started again on the same machine, before it begins.
_KEYS = {
    "preempted": (_preempted, True),
    "maintenance-event": (_terminated, False),
    "upcoming-maintenance": (_maintained, False),
}


def _server() -> str | None:
  """The metadata server's HOST or HOST:PORT; None outside Google Cloud."""
  if os.environ.get(_VARIABLE):
    return os.environ[_VARIABLE]
  try:
    firmware = _FIRMWARE.read_text().strip()
  except (OSError, ValueError):
    return None
  return _HOST if firmware.startswith("Google") else None


class Watch:
  """Calls a function, in a thread, when the machine is to be taken away."""

  def __init__(self, act: Callable[[str], None]):
    """
    Args:
      act: called with the notice, "preempted" or another key of the metadata.
    """
    self._act = act
    self._closed = threading.Event()

  def start(self) -> None:
    """Starts to wait for notices, if there is a metadata server."""
    server = _server()
    for key in _KEYS if server else ():
      threading.Thread(target=self._wait_for, args=(server, key), daemon=True,
                       name=f"notices of {key}").start()

  def close(self) -> None:
    """From now on, nothing is called; the threads end by themselves."""
    self._closed.set()

  def _wait_for(self, server: str, key: str) -> None:
    means_end, counts = _KEYS[key]
    etag = ""
    while not self._closed.is_set():
      try:
        value, etag = _ask(server, key, etag)
      except (OSError, http.client.HTTPException, ValueError) as e:
        # E.g. a container that may not ask, or no notice so far.
        log.debug("metadata %s: %s", key, e)
        self._closed.wait(_PAUSE)
        continue
      if self._closed.is_set():
        return
      if counts and means_end(value):
        self._act(key)
        return
      counts = counts or not means_end(value)


def _ask(server: str, key: str, etag: str) -> tuple[str, str]:
  """(value, its etag) of a key, once its etag is another one.

  Raises:
    OSError, HTTPException, ValueError: there is no value, or the answer is not
      a metadata server's.
  """
  path = f"/computeMetadata/v1/instance/{key}?recursive=true&alt=json"
  if key != "upcoming-maintenance":
    path = f"/computeMetadata/v1/instance/{key}?alt=text"
  if etag:
    path += f"&wait_for_change=true&timeout_sec={_WAIT}&last_etag={etag}"
  connection = http.client.HTTPConnection(server, timeout=_WAIT + _GRACE)
  try:
    connection.request("GET", path, headers=_HEADERS)
    answer = connection.getresponse()
    found = answer.getheader("ETag", "")
    if (answer.status != 200 or not found.isalnum()
        or answer.getheader("Metadata-Flavor") != "Google"):
      raise ValueError(f"HTTP {answer.status}")
    value = answer.read(_MAX_BYTES)
    if answer.length:
      raise ValueError("more or less than was announced")
    return value.decode().strip(), found
  finally:
    connection.close()
