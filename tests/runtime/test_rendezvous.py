"""The processes of a run meet, or each says in one line why they do not.

They are threads here; `test_pods.py` has processes.
"""

import json
import socket
import threading
import time

import numpy as np
import pytest

from metaformer_jax import errors
from metaformer_jax.runtime import rendezvous


@pytest.fixture
def port():
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def meet(port, processes, seconds=1.0, host="127.0.0.1", delays=None):
  """What each (index, count) gets: None, or the message of its error."""
  found = [None] * len(processes)

  def one(place, index, count):
    time.sleep((delays or {}).get(place, 0))
    try:
      rendezvous.meet(f"{host}:{port}", count, index, seconds)
    except errors.WorkerLostError as e:
      found[place] = str(e)

  threads = [threading.Thread(target=one, args=(place, *process))
             for place, process in enumerate(processes)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(30)
    assert not thread.is_alive()
  assert all(message is None or (
      message.startswith("--coordinator: ") and "\n" not in message)
      for message in found)
  return found


def test_processes_meet_in_any_order(port):
  rng = np.random.default_rng(0)
  for n in (1, 2, 3, 8, 40):
    delays = dict(enumerate(rng.uniform(0, 0.3, n)))
    delays[0] = 0.3 if n == 3 else delays[0]  # The first one is late.
    assert meet(port, [(i, n) for i in range(n)], 10, delays=delays) == (
        [None] * n)


def test_missing_processes_are_named_to_those_that_came(port):
  start = time.monotonic()
  found = meet(port, [(0, 5), (1, 5), (3, 5)], 1)
  assert time.monotonic() - start < 3
  assert len(set(found)) == 1
  assert "3 of 5 processes came within" in found[0]
  assert "connect_seconds = 1; missing: 2, 4;" in found[0]


def test_two_with_one_index_are_named_to_all(port):
  found = meet(port, [(0, 4), (1, 4), (2, 4), (2, 4)], 10,
               delays={2: 0.2, 3: 0.4})
  assert len(set(found)) == 1
  assert "two processes have --process_index=2: " in found[0]


def test_another_number_of_processes_is_named(port):
  found = meet(port, [(0, 4), (1, 4), (2, 3)], 10, delays={2: 0.3})
  assert len(set(found)) == 1
  assert "--process_count is 4 on process 0, but 3 on process 2" in found[0]


@pytest.mark.parametrize(("host", "reason"), [
    ("127.0.0.1", "Connection refused"),
    ("no-such-host.invalid", "at no-such-host.invalid:"),
    ("a..b", "at a..b:")])
def test_a_process_that_cannot_reach_the_first_one(port, host, reason):
  start = time.monotonic()
  found, = meet(port, [(1, 2)], 0.5, host)
  assert time.monotonic() - start < 15  # Of which names may take a part.
  assert "process 1 did not meet process 0" in found and reason in found
  assert "within config.mesh.connect_seconds = 0.5" in found


def test_what_listens_may_be_something_else():
  with socket.create_server(("127.0.0.1", 0)) as server:
    def serve():
      while True:
        try:
          connection, _ = server.accept()
        except OSError:
          return
        connection.sendall(b"SSH-2.0-OpenSSH_9.6 is not a process of a run\n")
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    found, = meet(server.getsockname()[1], [(1, 2)], 0.5)
    server.shutdown(socket.SHUT_RDWR)
  assert "what listens there is not process 0 of a new run" in found


RUBBISH = [b"", b"\n", b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 100, b"{" * 9000,
           b"[1, 2]\n", b'[0, 3, "x"]\n', b'[5, 3, "x"]\n', b'[true, 3, "x"]\n',
           b'["1", 3, "x"]\n', b"[" * 4000 + b"\n", b'{"index": 1}\n']


def test_strangers_change_nothing(port):
  """They connect before the others, between them, and some stay connected."""
  strangers = []

  def bother():
    for rubbish in RUBBISH:
      end = time.monotonic() + 5
      while time.monotonic() < end:
        try:
          one = socket.create_connection(("127.0.0.1", port), 5)
          one.sendall(rubbish)
          strangers.append(one)
          break
        except OSError:
          time.sleep(0.01)

  thread = threading.Thread(target=bother)
  thread.start()
  assert meet(port, [(0, 3), (1, 3), (2, 3)], 10,
              delays={1: 0.3, 2: 0.6}) == [None] * 3
  thread.join()
  for one in strangers:
    one.close()
  assert len(strangers) >= len(RUBBISH) - 1


def test_a_process_that_was_started_again_takes_its_place(port):
  def die():
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", port), 5) as dying:
      dying.recv(100)
      dying.sendall(json.dumps([1, 3, "dying"]).encode() + b"\n")
      time.sleep(0.2)

  thread = threading.Thread(target=die)
  thread.start()
  assert meet(port, [(0, 3), (1, 3), (2, 3)], 10,
              delays={1: 0.6, 2: 0.9}) == [None] * 3
  thread.join()
