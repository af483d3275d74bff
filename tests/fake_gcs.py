"""Object storage on the loopback, and a proxy before it that makes faults.

`gcp-storage-emulator` does not tell the generation of an object with its
content, and checks no preconditions, as no server on PyPI does. TensorStore
needs both when it reads an object again, so the proxy adds them. It also reads
the end of an object ("bytes=-N"), with which array_record begins.
"""

import contextlib
import http.client
import http.server
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request

import pytest

BUCKET = "bkt"

_OF_THE_CONNECTION = ("content-length", "connection", "date", "server",
                      "transfer-encoding")

# Faults of a proxy, each for one request; other numbers are status codes, too.
FAULTS = ("429", "503", "reset", "truncated")


def environment(port: int) -> dict[str, str]:
  """The variables by which all clients reach a server instead of Google's."""
  url = f"http://127.0.0.1:{port}"
  return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url,
          "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
          "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
          "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


def free_port() -> int:
  with socket.socket() as found:
    found.bind(("127.0.0.1", 0))
    return found.getsockname()[1]


class Server:
  """The emulator in a process of its own; objects survive if it has a folder.

  Attributes:
    port: at which it answers, also after a restart.
  """

  def __init__(self, folder: pathlib.Path | None = None):
    self.port, self._folder = free_port(), folder
    self.start()

  def start(self) -> None:
    where, memory = (([], ["--in-memory"]) if self._folder is None else
                     ([f"--data-dir={self._folder}"], []))
    self._process = subprocess.Popen(
        [sys.executable, "-m", "gcp_storage_emulator", *where, "start",
         "--host=127.0.0.1", f"--port={self.port}",
         f"--default-bucket={BUCKET}", "-q", *memory],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
      if self._process.poll() is not None:
        break
      with contextlib.suppress(OSError), urllib.request.urlopen(
          f"http://127.0.0.1:{self.port}/", timeout=1):
        return
      time.sleep(0.1)
    self.kill()
    raise RuntimeError("the fake server did not start")

  def kill(self) -> None:
    self._process.kill()
    self._process.wait()


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on, and makes faults.

  Attributes:
    faults: what happens to the next requests; None: nothing.
    is_away: whether no request is answered.
    n_faults: how many were made.
    requests: method, path and bytes of the body of each, when `counts`.
  """

  daemon_threads = True

  def __init__(self, target: int):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.target, self.port = target, self.server_address[1]
    self.faults, self.is_away, self.n_faults = iter(()), False, 0
    self.counts, self.requests = False, []
    self.one_at_a_time = threading.Lock()
    self._thread = threading.Thread(target=self.serve_forever, daemon=True)
    self._thread.start()

  def handle_error(self, request, address):
    """A client that has closed its connection is no error."""

  def close(self) -> None:
    self.shutdown()
    self.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):

  protocol_version = "HTTP/1.1"

  def _pass_on(self):
    server = self.server
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    fault = "reset" if server.is_away else next(server.faults, None)
    if fault:
      server.n_faults += not server.is_away
    if fault == "reset":
      self.close_connection = True
      self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                 b"\1\0\0\0\0\0\0\0")
      self.connection.close()
      return
    if fault and fault.isdigit():
      self._answer(int(fault), {}, b"{}")
      return
    if server.counts:
      server.requests.append((self.command, self.path, len(body)))
    try:
      with server.one_at_a_time:
        status, headers, content = self._conditional(body)
    except OSError:
      self.close_connection = True
      return
    self._answer(status, headers, content, fault == "truncated")

  def _conditional(self, body):
    """The answer to a request, with its generation and preconditions."""
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    generation = None
    if "alt=media" in url.query and self.command == "GET":
      path = url.path.removeprefix("/download")
      generation = self._generation(path)
    elif "ifGenerationMatch" in query:
      path = url.path.removeprefix("/upload")
      if "name" in query:
        path += f"/{urllib.parse.quote(query['name'], safe='')}"
      generation = self._generation(path)
    if generation and query.get("ifGenerationNotMatch") == generation:
      return 304, {}, b""
    if query.get("ifGenerationMatch", generation or "0") != (
        generation or "0"):
      return 412, {}, b"{}"
    sent = dict(self.headers)
    if sent.get("Range", "").startswith("bytes=-"):
      del sent["Range"]
    status, headers, content = self._ask(self.command, self.path, body, sent)
    if status == 200 and "Range" not in sent and "Range" in self.headers:
      size = len(content)
      content = content[-int(self.headers["Range"].removeprefix("bytes=-")):]
      status, headers["Content-Range"] = 206, (
          f"bytes {size - len(content)}-{size - 1}/{size}")
    if generation:
      headers["x-goog-generation"] = generation
    return status, headers, content

  def _generation(self, path):
    status, _, content = self._ask("GET", path, b"", {})
    return json.loads(content)["generation"] if status == 200 else None

  def _ask(self, method, path, body, headers):
    connection = http.client.HTTPConnection("127.0.0.1", self.server.target)
    try:
      connection.request(method, path, body, headers)
      found = connection.getresponse()
      content = found.read()
    finally:
      connection.close()
    return found.status, {k: v for k, v in found.getheaders() if k.lower()
                          not in _OF_THE_CONNECTION}, content

  def _answer(self, status, headers, content, is_cut=False):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(content)))
    self.end_headers()
    if is_cut and content:
      self.close_connection = True
      content = content[:len(content) // 2]
    self.wfile.write(content)

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _pass_on

  def log_message(self, *_):
    """Nothing."""


def every(n: int, faults=FAULTS):
  """One fault in n requests, of each kind in turn."""
  kinds = itertools.cycle(faults)
  return (next(kinds) if i % n == n - 1 else None for i in itertools.count())


@contextlib.contextmanager
def serving(folder: pathlib.Path | None = None):
  """A server and a proxy before it, which the clients of this process use."""
  server = Server(folder)
  proxy = Proxy(server.port)
  with pytest.MonkeyPatch.context() as change:
    for name, value in environment(proxy.port).items():
      change.setenv(name, value)
    forget_clients()
    try:
      yield server, proxy
    finally:
      proxy.close()
      server.kill()
  forget_clients()


def forget_clients() -> None:
  """The next client reads the environment again."""
  import fsspec  # noqa: PLC0415  Optional.
  import gcsfs  # noqa: PLC0415

  gcsfs.GCSFileSystem.clear_instance_cache()
  fsspec.asyn.reset_lock()


def variables() -> dict[str, str]:
  """The environment of another process that uses the same server."""
  return dict(os.environ)
