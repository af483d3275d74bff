"""Reads parts of batches ahead, in threads or in worker processes.

A reader is asked for parts by number, and answers in the same order. Worker
processes begin with nothing but a connection to this one. They

- ignore SIGINT and SIGTERM, which schedulers and Ctrl-C send to all processes
  of a run: this one still has to finish its step and save;
- end with this process, however it ends;
- answer in memory without a name, which the system frees with its last user: it
  does not depend on the size of /dev/shm, and nothing has to be cleaned up.
"""

import collections
import contextlib
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent import futures
from multiprocessing import reduction, resource_tracker, util
from typing import Any, Protocol

import numpy as np

from metaformer_jax import errors
from metaformer_jax.data import streams

Arrays = dict[str, np.ndarray]

_SPAWN = multiprocessing.get_context("spawn")
_TO_STOP = (signal.SIGINT, signal.SIGTERM)

# Where arrays begin in shared memory: multiples of it, as vector units need.
_ALIGNMENT = 64


class Reader(Protocol):
  """What reads ahead.

  Attributes:
    n_ahead: the parts that it can be asked for at a time.
  """

  n_ahead: int

  def ask(self, number: int) -> Callable[[], Arrays]:
    """Asks for a part; what is returned waits for it."""

  def close(self) -> None:
    """Stops; what was asked for is given up."""


def batches(reader: Reader, numbers: Iterable[int],
            n_parts: int) -> Generator[Arrays, None, None]:
  """Reads batches in order.

  Args:
    reader: is left with nothing to do if all batches are read, else closed.
    numbers: of the parts.
    n_parts: of each batch; the parts are joined along their first axis.
  """
  numbers = iter(numbers)
  waiting = collections.deque()
  done = False
  try:
    waiting.extend(map(reader.ask, itertools.islice(numbers, reader.n_ahead)))
    while waiting:
      parts = [waiting.popleft()() for _ in range(n_parts)]
      # Always a copy: workers use their memory again, and jax may keep a
      # reference to a batch.
      batch = {name: np.concatenate([part[name] for part in parts])
               for name in parts[0]}
      waiting.extend(map(reader.ask, itertools.islice(numbers, n_parts)))
      yield batch
    done = True
  finally:
    if not done:
      reader.close()


class Threads:
  """Calls a function in threads, which do not keep the process from ending."""

  def __init__(self, function: Callable[[int], Any], n: int, n_ahead: int = 0):
    """Takes what is called with a number, and how many threads to start."""
    self.n_ahead = n_ahead
    self._function, self._n, self._closed = function, n, False
    self._jobs: queue.SimpleQueue = queue.SimpleQueue()
    for _ in range(n):
      threading.Thread(target=self._work, daemon=True).start()

  def ask(self, number: int) -> Callable[[], Any]:
    future = futures.Future()
    self._jobs.put((future, number))
    return future.result

  def close(self) -> None:
    self._closed = True
    for _ in range(self._n):
      self._jobs.put(None)

  def _work(self) -> None:
    while (job := self._jobs.get()) and not self._closed:
      future, number = job
      try:
        future.set_result(self._function(number))
      except BaseException as e:
        future.set_exception(e)
      del job, future  # Their memory is not kept until the next job.


class InThreads:
  """Reads a part with several threads: what a worker process is given."""

  def __init__(self, parts: streams.Parts, n: int):
    """Takes the parts, and how many threads to start in the process."""
    self._parts, self._n = parts, n
    self._threads: Threads | None = None

  def __call__(self, number: int) -> Arrays:
    if self._threads is None:
      self._threads = Threads(self._parts.example, self._n)
    answers = [self._threads.ask(i) for i in self._parts.positions(number)]
    return streams.stacked([answer() for answer in answers])


class Workers:
  """Processes that read parts; started by `start`, or for the first part.

  The parts go to the processes in turn. Each process has some places in shared
  memory, which take parts in turn as well: a part is valid until its place is
  to take another one.

  `ask` raises ConfigError if what reads a part cannot be sent to a process,
  and WorkerLostError if a process has ended.

  Attributes:
    read: what reads a part; is sent to the processes with the first question.
    n_ahead: the parts that can be asked for at a time.
  """

  def __init__(self, read: Callable[[int], Arrays], n: int, n_places: int):
    """Takes what reads a part, the number of processes, and places of each."""
    self.read = read
    self._n, self._n_places = n, n_places
    self.n_ahead = n * n_places
    self._workers: list[_Worker] = []
    self._prepared = False
    self._asked = itertools.count()
    # Also when this process exits, before multiprocessing waits for them.
    util.Finalize(self, _end, args=(self._workers,), exitpriority=100)

  def ask(self, number: int) -> Callable[[], Arrays]:
    if not self._prepared:
      self._prepare()
    turn = next(self._asked)
    return self._workers[turn % self._n].ask(
        number, turn // self._n % self._n_places)

  def close(self) -> None:
    _end(self._workers)
    self._prepared = False

  def start(self) -> None:
    """Starts the processes, which takes them seconds, if they are not."""
    if not self._workers:
      with _signals_blocked():
        for i in range(self._n):
          self._workers.append(_Worker(f"{i + 1} of {self._n}"))

  def _prepare(self) -> None:
    try:
      read = pickle.dumps(self.read, pickle.HIGHEST_PROTOCOL)
    except Exception as e:
      raise errors.ConfigError(
          f"config.data.workers: the data set cannot be sent to processes: {e}"
          "; define its classes in a module, or use 0 workers") from e
    self.start()
    # When all are starting, as each takes it only once it has started.
    for worker in self._workers:
      worker.prepare(read, self._n_places)
    self._prepared = True


def _end(workers: list["_Worker"]) -> None:
  while workers:
    workers.pop().end()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
  """Within it, processes that are started do not receive signals to stop.

  They inherit this from the thread that starts them: a signal that arrives
  before a new process can ignore it waits until then.
  """
  # Started before, as it unblocks these signals when it starts.
  resource_tracker.ensure_running()
  before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_STOP)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
  """A worker process, as its parent sees it."""

  def __init__(self, name: str):
    self._name = name
    self._connection, theirs = _SPAWN.Pipe()
    self._process = _SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
    self._process.start()
    theirs.close()  # So that the connection ends with the process.
    self._places: list[_Place] = []

  def prepare(self, read: bytes, n_places: int) -> None:
    """Sends what reads a part, and the memory for answers."""
    self._places = [_Place() for _ in range(n_places)]
    try:
      self._connection.send(n_places)
      for place in self._places:
        reduction.send_handle(self._connection, place.file,
                              self._process.pid)
      self._connection.send_bytes(read)
    except OSError as e:
      raise self._lost() from e

  def ask(self, number: int, place: int) -> Callable[[], Arrays]:
    """Asks for a part, to be written to a place."""
    try:
      self._connection.send((number, place))
    except OSError as e:
      raise self._lost() from e
    return lambda: self._take(self._places[place])

  def _take(self, place: "_Place") -> Arrays:
    """Waits for the next answer, which is in a place.

    Raises:
      DataError: as in the process.
      RuntimeError: another error, with its traceback.
      WorkerLostError: the process has ended.
    """
    try:
      layout, error, trace = self._connection.recv()
    except (EOFError, OSError) as e:
      raise self._lost() from e
    if error:
      raise errors.DataError(error)
    if trace:
      raise RuntimeError(f"a worker process failed:\n{trace}")
    return place.arrays(layout)

  def _lost(self) -> errors.WorkerLostError:
    self._process.join(5)
    code = self._process.exitcode
    how = (f"was ended by {signal.Signals(-code).name}"
           if code and code < 0 else f"has ended with code {code}")
    return errors.WorkerLostError(
        f"config.data.workers: worker process {self._name} (pid "
        f"{self._process.pid}) {how}, as when memory runs out; use fewer "
        "workers or threads, or give the machine more memory")

  def end(self) -> None:
    """Ends the process at once: it only reads."""
    self._process.kill()
    self._process.join()
    self._connection.close()
    for place in self._places:
      os.close(place.file)
    self._places = []


class _Place:
  """Memory of two processes for one part, which grows as needed."""

  def __init__(self, file: int | None = None):
    """Takes the descriptor of the other process's, or makes the memory."""
    self.file = _unnamed_file() if file is None else file
    self._memory: mmap.mmap | None = None

  def put(self, arrays: Arrays) -> list[tuple]:
    """Writes arrays; returns where they are, for `arrays`."""
    layout, end = [], 0
    for name, array in arrays.items():
      layout.append((name, array.dtype, array.shape, end))
      end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    if end > os.fstat(self.file).st_size:
      os.ftruncate(self.file, end)
    for array, there in zip(arrays.values(), self.arrays(layout).values(),
                            strict=True):
      np.copyto(there, array, casting="no")
    return layout

  def arrays(self, layout: list[tuple]) -> Arrays:
    """The arrays that were written, without a copy."""
    size = os.fstat(self.file).st_size
    if size and (self._memory is None or len(self._memory) < size):
      self._memory = mmap.mmap(self.file, size)
    return {name: np.ndarray(shape, dtype, self._memory or b"", start)
            for name, dtype, shape, start in layout}


def _unnamed_file() -> int:
  """The descriptor of an empty file without a name, in memory on Linux."""
  if hasattr(os, "memfd_create"):
    return os.memfd_create("metaformer_jax")
  with tempfile.TemporaryFile() as f:
    return os.dup(f.fileno())


def _serve(connection) -> None:
  """A worker process: answers questions until its parent ends or closes."""
  for number in _TO_STOP:
    signal.signal(number, signal.SIG_IGN)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
  threading.Thread(target=_follow_parent, daemon=True).start()
  try:
    n_places = connection.recv()
    places = [_Place(reduction.recv_handle(connection))
              for _ in range(n_places)]
    received = connection.recv_bytes()
    read = None
    while True:
      number, place = connection.recv()
      try:
        if read is None:
          read, received = pickle.loads(received), b""
        answer = places[place].put(read(number)), "", ""
      except errors.DataError as e:
        answer = [], str(e), ""
      except BaseException:
        answer = [], "", traceback.format_exc()
      connection.send(answer)
  except (EOFError, OSError):  # The parent has ended or closed.
    return


def _follow_parent() -> None:
  """Ends this process when its parent ends, whatever else it is doing."""
  multiprocessing.parent_process().join()
  os._exit(1)
