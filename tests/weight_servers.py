"""A server of files on loopback that answers as a test says."""

import contextlib
import dataclasses
import http.server
import threading
import time
from collections.abc import Callable, Mapping

# Sends one answer.
Answer = Callable[[http.server.BaseHTTPRequestHandler], None]


@dataclasses.dataclass(frozen=True)
class File:
  """An answer with a file, or with the part of it that is asked for.

  Attributes:
    data: the file.
    headers: in addition; the first is the validator of If-Range.
    ranges: whether parts are sent at all.
    cut: the connection ends after so many bytes of the body.
    length: the Content-Length that is claimed; None: the true one.
    pause: seconds between the bytes of each quarter.
  """

  data: bytes
  headers: Mapping[str, str] = dataclasses.field(
      default_factory=lambda: {"ETag": '"1"'})
  ranges: bool = True
  cut: int | None = None
  length: int | None = None
  pause: float = 0.0

  def __call__(self, handler):
    start = self._start(handler.headers)
    body = self.data[start:]
    handler.send_response(206 if start else 200)
    if start:
      n = len(self.data)
      handler.send_header("Content-Range", f"bytes {start}-{n - 1}/{n}")
    handler.send_header("Content-Length", str(
        len(body) if self.length is None else self.length))
    for name, value in self.headers.items():
      handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "HEAD":
      return
    body = body[:self.cut]
    quarter = max(1, len(body) // 4) if self.pause else max(1, len(body))
    for i in range(0, len(body), quarter):
      handler.wfile.write(body[i:i + quarter])
      time.sleep(self.pause)

  def _start(self, asked) -> int:
    wanted = asked.get("Range")
    validator = next(iter(self.headers.values()), None)
    same = asked.get("If-Range", validator) == validator
    if not (wanted and self.ranges and same):
      return 0
    return int(wanted.removeprefix("bytes=").removesuffix("-"))


def status(code: int, **headers: str) -> Answer:
  """An answer without a file; "Retry_After" is the header Retry-After."""

  def answer(handler):
    handler.send_response(code)
    handler.send_header("Content-Length", "0")
    for name, value in headers.items():
      handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()

  return answer


class Server(http.server.ThreadingHTTPServer):
  """Answers the requests in turn; the last answer is repeated.

  Attributes:
    answers: for each path, or for all paths under "".
    asked: (method, path, headers) of each request.
  """

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.answers: dict[str, list[Answer]] = {}
    self.asked: list[tuple[str, str, Mapping[str, str]]] = []
    self.url = f"http://127.0.0.1:{self.server_port}"

  def give(self, *answers: Answer, path: str = "") -> None:
    self.answers[path] = list(answers)

  def ranges(self) -> list[str | None]:
    """The Range of each request."""
    return [headers.get("Range") for _, _, headers in self.asked]

  def handle_error(self, request, client_address):
    pass  # A client that has gone.


class _Handler(http.server.BaseHTTPRequestHandler):

  def do_GET(self):
    self.server.asked.append((self.command, self.path, self.headers))
    answers = self.server.answers.get(self.path) or self.server.answers[""]
    (answers.pop(0) if len(answers) > 1 else answers[0])(self)

  do_HEAD = do_GET

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serving():
  """A `Server` that runs in a thread."""
  server = Server()
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
