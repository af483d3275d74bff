"""The client that downloads files, against servers that misbehave."""

import base64
import hashlib
import io
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import weight_servers
from weight_servers import File, status

from metaformer_jax import errors
from metaformer_jax.checkpoints import download

DATA = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(DATA)
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
  monkeypatch.setattr(download, "_WAITS", (0.0, 0.0, 0.0))
  monkeypatch.setattr(download, "_TIMEOUT", 0.3)
  monkeypatch.setattr(download, "_POLL", 0.01)


@pytest.fixture
def server():
  with weight_servers.serving() as found:
    yield found


@pytest.fixture
def target(tmp_path):
  return tmp_path / "cache" / "weights.bin"


def is_data(path):
  if path.read_bytes() != DATA:
    raise errors.WeightsError(f"{path}: is something else")


def get(server, target, path="/weights.bin", **kwargs):
  download.download(server.url + path, target, is_data, **kwargs)
  assert target.read_bytes() == DATA
  assert [p.name for p in target.parent.iterdir()] == [target.name]


def refused(server, target, path="/weights.bin"):
  """The reason why nothing is downloaded; nothing is left."""
  with pytest.raises(download.DownloadError) as e:
    download.download(server.url + path, target, is_data)
  assert "\n" not in errors.one_line(e.value)
  assert not list(target.parent.iterdir())
  return str(e.value)


def test_a_file_arrives(server, target):
  server.give(File(DATA))
  beats = []
  get(server, target, beat=lambda: beats.append(1))
  assert beats
  get(server, target)  # It is there.
  assert len(server.asked) == 1
  assert server.asked[0][2]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("headers", [
    {"ETag": '"1"'}, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}],
    ids=["etag", "date", "neither"])
def test_a_broken_connection_is_resumed(server, target, headers):
  broken = File(DATA, headers, cut=100_000)
  server.give(broken, broken, File(DATA, headers))
  get(server, target)
  assert server.ranges() == [None, "bytes=100000-", "bytes=200000-"]
  wanted = next(iter(headers.values()), None)
  assert server.asked[1][2].get("If-Range") == wanted


def test_a_later_process_resumes(server, target):
  """Unless nothing shows that the file is still the same."""
  for headers, wanted in (({"ETag": '"1"'}, "bytes=9-"),
                          ({"ETag": 'W/"1"'}, None), ({}, None)):
    server.give(File(DATA, headers, cut=9), status(404))
    with pytest.raises(download.DownloadError, match="HTTP 404"):
      download.download(f"{server.url}/x", target, is_data)
    assert target.with_name("weights.bin.partial").read_bytes() == DATA[:9]
    assert not target.exists()
    server.asked.clear()
    server.give(File(DATA, headers))
    get(server, target)
    assert server.ranges() == [wanted]
    target.unlink()


@pytest.mark.parametrize("other", [
    File(DATA, {"ETag": '"2"'}),  # The server compares.
    File(DATA, ranges=False),
    File(DATA, {"ETag": '"2"'}, cut=200_000)])
def test_another_file_begins_again(server, target, other):
  before = bytes(len(DATA))
  server.give(File(before, cut=150_000), other, File(DATA, other.headers))
  get(server, target)
  assert server.ranges()[1] == "bytes=150000-"


def test_a_part_of_another_file_is_not_used(server, target):
  """If the server does not compare."""
  def part(handler):
    handler.send_response(206)
    handler.send_header("ETag", '"2"')
    handler.send_header("Content-Range", f"bytes 9-{len(DATA) - 1}/{len(DATA)}")
    handler.send_header("Content-Length", str(len(DATA) - 9))
    handler.end_headers()
    handler.wfile.write(DATA[9:])

  server.give(File(bytes(len(DATA)), cut=9), part, File(DATA))
  get(server, target)
  assert server.ranges() == [None, "bytes=9-", None]


def test_a_complete_file_that_was_not_moved_is_not_asked_for(server, target):
  server.give(File(DATA), status(500))

  def interrupt(path):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    download.download(f"{server.url}/x", target, interrupt)
  get(server, target)
  assert len(server.asked) == 1


def test_an_interrupted_download_is_kept(server, target):
  server.give(File(DATA, pause=0.05))

  def interrupt():
    if target.with_name("weights.bin.partial").stat().st_size:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    download.download(f"{server.url}/x", target, is_data, interrupt)
  get(server, target)
  n = int(server.ranges()[1].removeprefix("bytes=").removesuffix("-"))
  assert 0 < n < len(DATA)


@pytest.mark.parametrize("answers", [
    [status(429, Retry_After="0"), status(503)],
    [status(500), status(502), status(504)],
    [status(429, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")],
    [File(DATA, cut=0)],
    [lambda handler: time.sleep(0.5)],
    [lambda handler: handler.wfile.write(b"no HTTP\r\n\r\n")],
    [File(DATA, pause=0.5)],
    [File(DATA, cut=100)] * 9,
    [status(416)]])
def test_what_may_pass_is_tried_again(server, target, answers):
  server.give(*answers, File(DATA))
  get(server, target)


def test_a_server_that_is_slow_but_sends_is_awaited(server, target):
  server.give(File(DATA, pause=0.15))
  get(server, target)
  assert len(server.asked) == 1


@pytest.mark.parametrize("answer, reason, n", [
    (status(404), "HTTP 404 Not Found", 1),
    (status(403), "HTTP 403 Forbidden", 1),
    (status(401), "HTTP 401 Unauthorized", 1),
    (status(204), "HTTP 204", 1),
    (status(300), "HTTP 300", 1),
    (status(500), "HTTP 500 Internal Server Error, 4 times", 4),
    (status(429), "HTTP 429 Too Many Requests, 4 times", 4),
    (status(429, Retry_After="3600"), "asks to wait for 3600 s", 1),
    (File(b"<html>Log in</html>", {"Content-Type": "text/html; charset=x"}),
     "it sends a web page", 1),
    (File(b"<html>Log in</html>"), "refused: is something else", 1),
    (File(b""), "refused: is something else", 1),
    (File(DATA, {"Content-Encoding": "gzip"}, cut=99), "encoded as gzip", 1),
    (File(DATA, length=len(DATA) - 5), "refused: is something else", 1),
    (File(DATA, {"X-Linked-Size": "7"}), "several sizes, 7, 300000 bytes", 1),
    (File(DATA, {"X-Linked-Etag": f'"{"0" * 64}"'}),
     f"sha256 is {SHA256.hexdigest()}, but {'0' * 64} is published", 1),
    (File(DATA, {"Content-MD5": base64.b64encode(bytes(16)).decode()}),
     f"its md5 is .*, but {'0' * 32} is published", 1),
    (File(DATA, {"Repr-Digest": "sha-512=:"
                 f"{base64.b64encode(bytes(64)).decode()}:"}),
     f"its sha512 is .*, but {'0' * 128} is published", 1)])
def test_what_is_not_the_file_is_one_line(server, target, answer, reason, n):
  server.give(answer)
  assert re.search(reason, refused(server, target))
  assert len(server.asked) == n


def test_a_body_shorter_than_its_length_is_not_taken(server, target):
  """Each answer ends early, and none has the rest."""
  server.give(File(DATA, length=len(DATA) + 5))
  with pytest.raises(download.DownloadError, match=r"HTTP 416|ended after"):
    download.download(f"{server.url}/x", target, is_data)
  assert not target.exists()


def chunked(*parts, end=b"0\r\n\r\n"):
  def answer(handler):
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("X-Linked-Size", str(len(DATA)))
    handler.send_header("ETag", '"1"')
    handler.end_headers()
    for part in parts:
      handler.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
    handler.wfile.write(end)
    handler.close_connection = True

  return answer


def test_a_body_in_chunks(server, target):
  server.give(chunked(DATA[:9], DATA[9:]))
  get(server, target)
  target.unlink()
  server.give(chunked(DATA[:9], end=b"fff\r\n" + DATA[9:12]), File(DATA))
  get(server, target)
  target.unlink()
  server.give(chunked(DATA, b"and more"))
  assert "more than the 300000 bytes" in refused(server, target)


@pytest.mark.parametrize("headers, path", [
    ({"X-Linked-Etag": f'"{SHA256.hexdigest()}"'}, "/x"),
    ({"Content-MD5": base64.b64encode(hashlib.md5(DATA).digest()).decode()},
     "/x"),
    ({"Repr-Digest":
      f"sha-256=:{base64.b64encode(SHA256.digest()).decode()}:"}, "/x"),
    ({}, f"/resnet18-{SHA256.hexdigest()[:8]}.pth")])
def test_published_digests_are_compared(server, target, headers, path):
  """Also if the file arrives in parts, with other digests."""
  headers = {"ETag": '"1"'} | headers
  server.give(File(DATA, headers, cut=9), File(
      DATA, {"ETag": '"1"', "Content-MD5": "AAAA"}))
  get(server, target, path)
  target.unlink()
  wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
  server.give(File(wrong, headers))
  assert "is published" in refused(server, target, path)


def test_redirects(server, target):
  """The first response is the hub's, of a file that is elsewhere."""
  with weight_servers.serving() as other:
    other.give(File(DATA))
    server.give(status(302, Location="/b?c=d", X_Linked_Size="300000"),
                path="/a")
    server.give(status(307, Location=f"{other.url}/file",
                       X_Linked_Etag=f'"{SHA256.hexdigest()}"'), path="/b?c=d")
    get(server, target, "/a")
    target.unlink()
    server.answers["/b?c=d"] = [status(302, Location=f"{other.url}/file",
                                       X_Linked_Etag="0" * 64)]
    assert "sha256" in refused(server, target, "/a")


@pytest.mark.parametrize("where, reason", [
    ("/a", "HTTP 302 .* loop"), ("ftp://localhost/x", "not https"),
    ("file:///etc/passwd", "HTTP 302 .*not allowed"), ("", "HTTP 302")],
    ids=["loop", "ftp", "file", "nowhere"])
def test_redirects_that_lead_nowhere(server, target, where, reason):
  server.give(status(302, **({"Location": where} if where else {})))
  assert re.search(reason, refused(server, target, "/a"))


def test_a_redirect_may_not_leave_https():
  ask = download.urllib.request.Request("https://example.org/x")
  redirects = download._Redirects()

  def follow(url):
    return redirects.redirect_request(ask, io.BytesIO(), 302, "", {}, url)

  with pytest.raises(download.DownloadError, match="not https"):
    follow("http://example.org/y")
  assert follow("https://example.net/y").full_url == "https://example.net/y"


@pytest.mark.parametrize("url, reason", [
    ("http://127.0.0.1:1/x", "Connection refused"),
    ("http://no-such-host.invalid/x", "[Nn]ame"),
    ("ftp://localhost/x", "does not begin with http"),
    ("nonsense", "does not begin with http"),
    ("http://[/x", "Invalid IPv6")])
def test_who_is_offline_learns_it_at_once(target, monkeypatch, url, reason):
  monkeypatch.setattr(download, "_WAITS", (60.0,))
  with pytest.raises(download.DownloadError, match=reason):
    download.download(url, target, is_data)
  assert not list(target.parent.iterdir())


def test_a_network_that_is_lost_in_between_is_awaited(target):
  """Refused connections, after something has arrived."""
  with weight_servers.serving() as server:
    server.give(File(DATA, cut=9))

    def close():
      server.shutdown()
      server.server_close()

    with pytest.raises(download.DownloadError, match="refused, 4 times"):
      download.download(f"{server.url}/x", target, is_data, close)
  assert target.with_name("weights.bin.partial").stat().st_size == 9


def test_places_that_cannot_be_written(server, tmp_path):
  server.give(File(DATA))
  (tmp_path / "file").touch()
  for where in ("file/weights.bin", "x" * 300):
    with pytest.raises(OSError):
      download.download(f"{server.url}/x", tmp_path / where, is_data)
  for make in (os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/full", p)):
    partial = tmp_path / "weights.bin.partial"
    make(partial)
    with pytest.raises(OSError, match="is not a file; remove it"):
      download.download(f"{server.url}/x", tmp_path / "weights.bin", is_data)
    os.rename(partial, tmp_path / f"{make}")
  assert not server.asked


SCRIPT = """
import pathlib, sys
from metaformer_jax.checkpoints import download
download.download(sys.argv[1], pathlib.Path(sys.argv[2]), lambda path: None)
print("done")
"""


def start(server, target):
  return subprocess.Popen(
      [sys.executable, "-c", SCRIPT, f"{server.url}/x", str(target)],
      cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_one_of_two_processes_downloads(server, target):
  """The other one waits, and goes on if the first one is killed."""
  server.give(File(DATA, pause=0.4), File(DATA))
  processes = [start(server, target) for _ in range(2)]
  partial = target.with_name("weights.bin.partial")
  while not (partial.exists() and partial.stat().st_size):
    time.sleep(0.01)
  assert all(p.poll() is None for p in processes)
  get(server, target)
  assert [p.communicate()[0] for p in processes] == ["done\n"] * 2
  assert len(server.asked) == 1

  target.unlink()
  server.give(File(DATA, pause=1.0), File(DATA))
  first = start(server, target)
  while not (partial.exists() and partial.stat().st_size):
    time.sleep(0.01)
  threading.Timer(0.2, first.kill).start()
  get(server, target)
  assert first.wait() == -9
  first.stdout.close()
  assert server.ranges()[1:] == [None, f"bytes={len(DATA) // 4}-"]
