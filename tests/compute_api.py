"""As much of the API of Compute Engine, on loopback, as the launcher uses.

For gcloud itself: templates, policies and groups are kept as they are sent, and
operations are done at once. The machines of a group run.
"""

import contextlib
import http.server
import json
import threading


class Server(http.server.ThreadingHTTPServer):
  """Attributes: kept, path -> what was sent; refusals, see `serving`."""

  daemon_threads = True

  def __init__(self, refusals):
    super().__init__(("127.0.0.1", 0), Handler)
    self.kept, self.refusals, self.operation = {}, refusals, {}

  @property
  def url(self):
    return f"http://127.0.0.1:{self.server_address[1]}/compute/v1/"


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers each request."""

  def do_GET(self):
    if "images/family" in self.path:
      self._send(200, {"selfLink": f"{self.server.url}projects/u/global/images/"
                       "image"})
    elif "operations" in self.path:
      self._send(200, self.server.operation)
    elif "autoscalers" in self.path:
      self._send(200, {"items": []})
    elif self._exists():
      self._send(200, self.server.kept[self._key()])

  def do_DELETE(self):
    if self._exists():
      del self.server.kept[self._key()]
      self._operate(self._key())

  def do_POST(self):
    size = int(self.headers["Content-Length"] or 0)
    sent = json.loads(self.rfile.read(size) or "{}")
    kind = self._key().rpartition("/")[2]
    if kind == "listManagedInstances":
      self._send(200, {"managedInstances": [{
          "name": "s24-b1", "instance": "zones/z/instances/s24-b1",
          "instanceStatus": "RUNNING", "currentAction": "NONE"}]})
    elif kind in self.server.refusals:
      refusal = self.server.refusals[kind]
      if isinstance(refusal, dict):
        self._operate(self._key(), refusal)
      else:
        self._refuse(*refusal)
    elif (key := f"{self._key()}/{sent['name']}") in self.server.kept:
      self._refuse(409, "alreadyExists")
    else:
      self.server.kept[key] = sent
      self._operate(key)

  def _key(self):
    return self.path.partition("?")[0].removeprefix("/compute/v1/")

  def _exists(self):
    if self._key() not in self.server.kept:
      self._refuse(404, "notFound")
    return self._key() in self.server.kept

  def _operate(self, target, error=None):
    words = target.removeprefix("projects/p/").split("/")
    scope = "/".join(words[:1 if words[0] == "global" else 2])
    kind, _, place = scope.partition("/")
    self.server.operation = {
        "name": "op", "status": "DONE", "operationType": "insert",
        "targetLink": self.server.url + target,
        "selfLink": f"{self.server.url}projects/p/{scope}/operations/op"}
    if place:
      self.server.operation[kind[:-1]] = (
          f"{self.server.url}projects/p/{scope}")
    if error:
      self.server.operation |= {
          "error": {"errors": [error]}, "httpErrorStatusCode": 403,
          "httpErrorMessage": "FORBIDDEN"}
    self._send(200, self.server.operation)

  def _refuse(self, status, reason):
    self._send(status, {"error": {
        "code": status, "message": "A sentence.", "errors": [
            {"message": "A sentence.", "domain": "global",
             "reason": reason}]}})

  def _send(self, status, document):
    body = json.dumps(document).encode()
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving(refusals):
  """Yields a server in a thread.

  Args:
    refusals: for a kind of what is made, e.g. "instanceTemplates", the (status,
      reason) of the request's refusal, or the error of its operation.
  """
  server = Server(refusals)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
