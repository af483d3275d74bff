"""The metadata server of a machine of Compute Engine, on loopback.

Values change by `put`; a request with `wait_for_change` is answered then, or
after its `timeout_sec`, as cloud.google.com/compute/docs/metadata says.
"""

import contextlib
import http.server
import threading
import urllib.parse

QUIET = {"preempted": "FALSE", "maintenance-event": "NONE",
         "upcoming-maintenance": '{"maintenance_status": "PENDING"}'}


class Server(http.server.ThreadingHTTPServer):
  """Attributes: requests, the paths that were asked for."""

  daemon_threads = True

  def __init__(self, values, answer=None):
    """answer: replaces (status, headers, body) of each answer."""
    super().__init__(("127.0.0.1", 0), Handler)
    self.values = {key: (value, 1) for key, value in values.items()}
    self.changed = threading.Condition()
    self.answer, self.requests = answer, []

  @property
  def host(self):
    return f"127.0.0.1:{self.server_address[1]}"

  def put(self, key, value):
    with self.changed:
      self.values[key] = value, self.values[key][1] + 1
      self.changed.notify_all()

  def get(self, key, query):
    """(value, etag), perhaps after a change."""
    with self.changed:
      if "wait_for_change" in query:
        self.changed.wait_for(
            lambda: query["last_etag"] != [self._etag(key)],
            timeout=float(query["timeout_sec"][0]))
      return self.values[key][0], self._etag(key)

  def _etag(self, key):
    return f"e{self.values[key][1]:08x}"


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers GET /computeMetadata/v1/instance/KEY."""

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    key = url.path.removeprefix("/computeMetadata/v1/instance/")
    self.server.requests.append(key)
    if self.headers["Metadata-Flavor"] != "Google":
      status, headers, body = 403, {}, b""
    elif self.server.answer:
      status, headers, body = self.server.answer(key)
    elif key not in self.server.values:
      status, headers, body = 404, {"Metadata-Flavor": "Google"}, b""
    else:
      value, etag = self.server.get(key, urllib.parse.parse_qs(url.query))
      status, body = 200, value.encode()
      headers = {"Metadata-Flavor": "Google", "ETag": etag}
    self.send_response(status)
    for name, text in headers.items():
      self.send_header(name, text)
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(values=QUIET, answer=None):
  """Yields a server that runs in a thread."""
  server = Server(values, answer)
  threading.Thread(target=server.serve_forever, args=(0.01,),
                   daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
