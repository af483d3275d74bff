"""Where the processes of a run meet, before jax connects them.

If one is missing, or two have the same index, jax aborts the others with a
stack trace that does not say which. So they first meet here, at the same port:
process 0 waits for a line of each, and then answers all of them: go on, or what
is wrong. Nothing that is received is executed, and what does not follow the
protocol is closed.
"""

import json
import os
import selectors
import socket
import time
from typing import Any, NamedTuple

from metaformer_jax import errors

_GREETING = b"metaformer_jax processes 1\n"
_MAX_LINE = 4096  # Bytes.

# Seconds: for process 0 to answer after the time is over; between two attempts
# to reach it; for one of them.
_GRACE = 10.0
_PAUSE = 0.2
_ATTEMPT = 5.0

# Missing processes that are named.
_NAMED = 10


class _Hello(NamedTuple):
  """What a process says of itself."""

  index: int
  count: int
  who: str


def me() -> str:
  """This process, for people: host and process id."""
  return f"{socket.gethostname()}, pid {os.getpid()}"


def meet(coordinator: str, count: int, index: int, seconds: float) -> None:
  """Returns when all processes of the run are there.

  Args:
    coordinator: "HOST:PORT", at which process 0 listens.
    count: of processes.
    index: of this one.
    seconds: after which a process no longer waits for the others.

  Raises:
    WorkerLostError: on all processes that are there; names the processes that
      are missing, or that have the same index or another number of processes.
  """
  host, _, port = coordinator.rpartition(":")
  deadline = time.monotonic() + seconds
  if index:
    _join(host.strip("[]"), int(port), _Hello(index, count, me()), deadline,
          seconds)
    return
  with _listen(int(port)) as listener:
    came, problem = _gather(listener, count, deadline)
    missing = [i for i in range(1, count) if i not in came]
    if missing and not problem:
      named = ", ".join(map(str, missing[:_NAMED]))
      more = len(missing) - _NAMED
      problem = (
          f"{len(came) + 1} of {count} processes came within "
          f"config.mesh.connect_seconds = {seconds:g}; missing: {named}"
          f"{f' and {more} more' if more > 0 else ''}; see whether they have "
          f"started, and can reach {coordinator}")
    for connection, _ in came.values():
      _answer(connection, problem)
  if problem:
    raise errors.WorkerLostError(f"--coordinator: {problem}")


def _listen(port: int) -> socket.socket:
  """Listens at a port of all addresses."""
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
        ("", port), family=socket.AF_INET6 if both else socket.AF_INET,
        backlog=1024, dualstack_ipv6=both)
  except OSError as e:
    raise errors.WorkerLostError(
        f"--coordinator: process 0 cannot listen at port {port}: "
        f"{os.strerror(e.errno)}; is there another process 0?") from e


def _gather(listener: socket.socket, count: int, deadline: float,
            ) -> tuple[dict[int, tuple[socket.socket, _Hello]], str]:
  """Waits for the others: (those that came, what is wrong with one of them)."""
  came: dict[int, tuple[socket.socket, _Hello]] = {}
  problem = ""
  with selectors.DefaultSelector() as selector:
    selector.register(listener, selectors.EVENT_READ)
    while not problem and len(came) < count - 1 and (
        left := deadline - time.monotonic()) > 0:
      for key, _ in selector.select(left):
        if key.fileobj is listener:
          _accept(listener, selector)
        elif hello := _read(key, selector):
          problem = problem or _check(hello, count, came)
          came.setdefault(hello.index, (key.fileobj, hello))
        came = {i: (other, its) for i, (other, its) in came.items()
                if other.fileno() >= 0}  # One that has ended may come again.
    known = {listener, *(connection for connection, _ in came.values())}
    for key in selector.get_map().values():
      if key.fileobj not in known and problem:
        _answer(key.fileobj, problem)
      elif key.fileobj not in known:
        key.fileobj.close()
  return came, problem


def _check(hello: _Hello, count: int,
           came: dict[int, tuple[socket.socket, _Hello]]) -> str:
  """What is wrong with a process; makes room for one that is started again."""
  if hello.count != count:
    return (f"--process_count is {count} on process 0, but {hello.count} on "
            f"process {hello.index} ({hello.who})")
  if hello.index in came:
    connection, other = came.pop(hello.index)
    if _is_open(connection):  # Else it will be closed when it is read.
      came[hello.index] = connection, other
      return (f"two processes have --process_index={hello.index}: {other.who}; "
              f"and {hello.who}")
  return ""


def _accept(listener: socket.socket,
            selector: selectors.BaseSelector) -> None:
  connection, _ = listener.accept()
  try:
    connection.sendall(_GREETING)  # A few bytes, which the system buffers.
    connection.setblocking(False)
    selector.register(connection, selectors.EVENT_READ, bytearray())
  except OSError:
    connection.close()


def _read(key: selectors.SelectorKey,
          selector: selectors.BaseSelector) -> _Hello | None:
  """What a process says; None if it is not complete, or closes instead."""
  connection, received = key.fileobj, key.data
  try:
    part = connection.recv(_MAX_LINE)
  except OSError:
    part = b""
  received += part
  if part and len(received) <= _MAX_LINE:
    if not received.endswith(b"\n"):
      return None
    hello = _parse(bytes(received))
    received.clear()
    if hello:
      return hello
  selector.unregister(connection)
  connection.close()
  return None


def _is_open(connection: socket.socket) -> bool:
  try:
    return bool(connection.recv(1, socket.MSG_PEEK))
  except BlockingIOError:
    return True
  except OSError:
    return False


def _parse(line: bytes) -> _Hello | None:
  try:
    index, count, who = json.loads(line)
    if type(index) is int and type(count) is int and 0 < index < count:
      return _Hello(index, count, errors.one_line(str(who)[:200]))
  except (ValueError, TypeError, RecursionError):
    pass
  return None


def _answer(connection: socket.socket, problem: str) -> None:
  """Tells a process to go on, or what is wrong, and closes the connection."""
  with connection:
    try:
      connection.setblocking(True)
      connection.settimeout(_ATTEMPT)
      connection.sendall(json.dumps(problem).encode() + b"\n")
    except OSError:  # It has ended.
      pass


def _join(host: str, port: int, hello: _Hello, deadline: float,
          seconds: float) -> None:
  """Tells process 0 of this one, and waits for its answer."""
  while True:
    try:
      answer = _ask(host, port, hello, deadline)
      break
    except (OSError, ValueError) as e:
      reason = getattr(e, "strerror", None) or str(e)
    if time.monotonic() > deadline:
      raise errors.WorkerLostError(
          f"--coordinator: process {hello.index} did not meet process 0 at "
          f"{host}:{port} within config.mesh.connect_seconds = {seconds:g}: "
          f"{reason}; see whether it has started, and whether host and port "
          "are right")
    time.sleep(_PAUSE)
  if answer:
    raise errors.WorkerLostError(f"--coordinator: {answer}")


def _ask(host: str, port: int, hello: _Hello, deadline: float) -> Any:
  """Process 0's answer; OSError or ValueError if there is none (yet)."""
  left = max(_PAUSE, min(_ATTEMPT, deadline - time.monotonic()))
  with socket.create_connection((host, port), left) as connection:
    if connection.getsockname() == connection.getpeername():
      # Linux connects a port to itself if nothing listens at it.
      raise ConnectionRefusedError("nothing listens there")
    with connection.makefile("rb") as lines:
      if lines.readline(len(_GREETING)) != _GREETING:
        raise ValueError("what listens there is not process 0 of a new run")
      connection.sendall(json.dumps(hello).encode() + b"\n")
      connection.settimeout(max(0, deadline - time.monotonic()) + _GRACE)
      try:
        line = lines.readline(_MAX_LINE)
      except TimeoutError as e:
        raise TimeoutError("it is there, but waits for others") from e
  if not line:
    raise ConnectionError("process 0 has ended")
  return json.loads(line)
