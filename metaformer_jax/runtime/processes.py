"""The processes of a run: one per host, or one per device.

Every process runs the same program on its part of each batch. A failure in only
one of them would leave the others waiting: failures at the start are shared
with all, and later a process that fails alone tells the others and ends at
once.
"""

import atexit
import collections
import contextlib
import itertools
import json
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from typing import Any

import jax
from jax._src import distributed  # Its client has no public name.

from metaformer_jax import errors
from metaformer_jax.config import comparison, schema
from metaformer_jax.runtime import launchers, rendezvous

log = logging.getLogger(__name__)

# Names in the store of jax's coordination service. Messages about a topic are
# numbered: all processes consult each other about it in the same order.
_STORE, _FAILURE = "metaformer_jax/messages", "metaformer_jax/failures"
_counters = collections.defaultdict(itertools.count)

# Taken by the thread that ends this process.
_ending = threading.Lock()

# Seconds between two looks for the failure of another process.
_POLL = 2

# Seconds that jax may take longer than the meeting before it.
_GRACE = 10


def start(coordinator: str | None, count: int | None, index: int | None,
          mesh: schema.Mesh) -> None:
  """Joins the other processes of the run, if there are any.

  Args:
    coordinator: "HOST:PORT" of process 0; None: from the environment (SLURM,
      Open MPI or a Cloud TPU).
    count: of processes; 1: there are no others, whatever the environment says;
      None: from the environment.
    index: of this process; None: from the environment.
    mesh: how long it waits for the others, and how long one may be silent.

  Raises:
    ConfigError: the arguments are wrong, or the environment is incomplete.
    WorkerLostError: a process did not start, or two have the same index.
  """
  found = launchers.arguments(os.environ, coordinator, count, index)
  if jax.distributed.is_initialized() or count == 1 or (
      found is None and not on_tpu()):
    return
  if found and coordinator:
    rendezvous.meet(coordinator, found["num_processes"], found["process_id"],
                    mesh.connect_seconds)
  # jax would handle SIGTERM itself; `signals` does that for the run.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    with _ending_after(mesh.connect_seconds + _GRACE, (
        "the processes of the run could not connect within "
        f"config.mesh.connect_seconds = {mesh.connect_seconds}; check that all "
        "have started and can reach process 0")):
      jax.distributed.initialize(
          **(found or {}),
          # Later than the end above: jax would abort.
          initialization_timeout=mesh.connect_seconds + 10 * _GRACE,
          heartbeat_timeout_seconds=mesh.heartbeat_seconds,
          shutdown_timeout_seconds=mesh.heartbeat_seconds)
  except RuntimeError as e:
    raise errors.WorkerLostError(
        f"the processes of the run could not connect: {e}; check that all have "
        "started and can reach process 0") from e
  except ValueError as e:
    if found:
      raise errors.ConfigError(f"--coordinator: {e}") from e
    log.info("this TPU has no other hosts (%s)", e)
    return
  _watch()
  if _place()[0]:  # Only the first one logs progress.
    logging.getLogger("metaformer_jax").setLevel(logging.WARNING)
  _consult(rendezvous.me(), _log_all)


def _log_all(said: list[str]) -> str:
  for i, who in enumerate(said):
    log.info("process %d of %d: %s", i, len(said), who)
  return ""


@contextlib.contextmanager
def _ending_after(seconds: float, reason: str) -> Iterator[None]:
  """Ends the process with a WorkerLostError if the block takes longer."""
  timer = threading.Timer(seconds, _end, (errors.WorkerLostError(reason),))
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def on_tpu() -> bool:
  """Whether jax will find a TPU, possibly a part of a larger slice."""
  if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return False
  chips = [*pathlib.Path("/dev").glob("accel*"),
           *pathlib.Path("/dev").glob("vfio/*")]
  return bool(chips) and util.find_spec("libtpu") is not None


def _place() -> tuple[int, int]:
  """The index of this process, and how many there are.

  jax.process_index() would start the devices, and with them a first exchange
  between the processes, which must not hang because they differ.
  """
  found = distributed.global_state
  return (0, 1) if found.client is None else (
      found.process_id, found.num_processes)


def _consult(message: str, decide: Callable[[list[str]], str],
             topic: str = "") -> str:
  """What process 0 makes of the messages of all; all must call it.

  Messages pass through the store of jax's coordination service: no device, and
  no program that would have to be the same everywhere, takes part.

  Args:
    message: of this process.
    decide: called on process 0 with all messages, in order.
    topic: what it is about; threads need different ones.
  """
  index, count = _place()
  name = f"{_STORE}/{topic}/{next(_counters[topic])}"
  store = distributed.global_state.client
  if index:
    store.key_value_set(f"{name}/{index}", message)
    return _wait_for(f"{name}/decided")
  decided = decide([message, *(_wait_for(f"{name}/{i}")
                               for i in range(1, count))])
  store.key_value_set(f"{name}/decided", decided)
  return decided


def _wait_for(key: str) -> str:
  """A value of the store, once it is there.

  There is no limit: some process may download weights meanwhile. If one dies,
  jax ends the others.
  """
  while True:
    try:
      return distributed.global_state.client.blocking_key_value_get(
          key, 1000 * _POLL)
    except jax.errors.JaxRuntimeError as e:
      if not str(e).startswith("DEADLINE_EXCEEDED"):
        raise errors.WorkerLostError(
            f"the first process cannot be reached: {errors.one_line(e)}") from e


@contextlib.contextmanager
def agreeing(topic: str = "") -> Iterator[None]:
  """An error in the block on one process is raised on all of them.

  All processes must enter it, with the same topic in other threads than the
  main one. An error that is not a `UserError` becomes a `WorkerLostError` on
  the others.
  """
  if _place()[1] == 1:
    yield
    return
  failure = None
  try:
    yield
  except Exception as e:
    failure = e
  decided = _consult(
      "" if failure is None else f"{type(failure).__name__}: {failure}",
      lambda said: json.dumps({i: e for i, e in enumerate(said) if e}),
      topic)
  failed = json.loads(decided)
  if failure is not None:
    raise failure
  for i, said in failed.items():
    raise _as_error(int(i), said)


def on_first(decide: Callable[[], int | None], topic: str = "") -> int | None:
  """Returns on every process what the first one decides, or raises.

  All must call it, with the same topic in other threads than the main one;
  devices take no part.
  """
  found, (index, count) = None, _place()
  with agreeing(topic):
    if index == 0:
      found = decide()
  if count == 1:
    return found
  return json.loads(_consult(json.dumps(found), lambda said: said[0], topic))


def _as_error(i: int, said: str) -> errors.UserError:
  """The error of another process, "Type: message", as one of this process."""
  kind, _, message = said.partition(": ")
  known = getattr(errors, kind, None)
  if isinstance(known, type) and issubclass(known, errors.UserError):
    return known(f"process {i}: {message}")
  return errors.WorkerLostError(f"process {i}: {said}")


def require_same(facts: Callable[[], Mapping[str, Any]]) -> None:
  """Checks that all processes have the same facts; all must call it.

  Args:
    facts: gives JSON values by what they are, as `comparison.between` takes
      them; not called if there is one process only.

  Raises:
    ConfigError: on all processes, if any two differ; names what does.
  """
  if _place()[1] == 1:
    return
  problem = _consult(json.dumps(facts()),
                     lambda said: _disagreement(list(map(json.loads, said))))
  if problem:
    raise errors.ConfigError(problem)


def _disagreement(said: list[dict[str, Any]]) -> str:
  """A line about the processes that differ from the first; "" if none does."""
  different = [i for i, facts in enumerate(said) if facts != said[0]]
  if not different:
    return ""
  i = different[0]
  found = comparison.between(
      said[0], said[i], f"{{}}: {{}} on process 0, {{}} on process {i}")
  others = len(different) - 1
  who = (f"process {i} and {others} more of {len(said)} differ" if others else
         f"process {i} differs")
  return (f"{who} from process 0: {comparison.listed(found)}; all processes of "
          "a run need the same experiment, code, libraries and data")


def _watch() -> None:
  """Ends this process, with its reason, soon after another fails alone."""
  over = threading.Event()

  def watch():
    while not over.wait(_POLL):
      if (failure := _failure()) is not None:
        _end(failure)

  # Before jax disconnects.
  atexit.register(over.set)
  threading.Thread(target=watch, daemon=True).start()


def _failure() -> errors.UserError | None:
  """The error of another process that has failed alone, if there is one."""
  index, _ = _place()
  try:
    found = distributed.global_state.client.key_value_dir_get(_FAILURE)
  except (AttributeError, jax.errors.JaxRuntimeError):
    return None  # The first process is gone; jax ends this one.
  for key, said in found:
    i = int(key.rpartition("/")[2])
    if i != index:
      return _as_error(i, said)
  return None
@contextlib.contextmanager
def leaving(heartbeat_seconds: int) -> Iterator[None]:
  """Ends this process at once if it fails alone, and tells the others why.

  Errors that all processes raise at the same step pass through. With any other
  one, an orderly exit would wait for the other processes, which wait for this
  one.
  """
  try:
    yield
  except Exception as e:
    # All devices run out of memory together, but each host has its own.
    host_memory = isinstance(e, errors.OutOfMemoryError) and not isinstance(
        e.__cause__, jax.errors.JaxRuntimeError)
    shared = not host_memory and isinstance(e, (
        errors.ConfigError, errors.DataError, errors.DivergedError,
        errors.Preempted))
    if shared or _place()[1] == 1:
      raise
    if isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(
        "INVALID_ARGUMENT"):
      _end_without_a_peer(e, heartbeat_seconds)
    _fail(e)


def _end_without_a_peer(e: Exception, heartbeat_seconds: int) -> None:
  """Ends this process because the devices have lost another one."""
  if (failure := _failure()) is not None:
    _end(failure)
  reason = str(e).splitlines()[0]
  print(f"WorkerLostError: {reason}; if another process has died, jax "
        "names it below as an unhealthy task once its heartbeat is missed; "
        "the same command continues from the last checkpoint",
        file=sys.stderr, flush=True)
  time.sleep(heartbeat_seconds + 5)  # jax ends the process.
  os._exit(errors.WorkerLostError.exit_code)


def reading(batches: Iterator[Any]) -> Iterator[Any]:
  """The batches of this process; if it cannot read one, it fails alone.

  The others wait in a step for its part, which would not come.
  """
  try:
    yield from batches
  except Exception as e:
    if _place()[1] == 1:
      raise
    _fail(e)


def _fail(e: Exception) -> None:
  """Tells the other processes why this one fails alone, and ends it."""
  if not isinstance(e, errors.UserError):
    traceback.print_exception(e)
  said = f"{type(e).__name__}: {errors.one_line(e)}"
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.global_state.client.key_value_set(
        f"{_FAILURE}/{_place()[0]}", said)
  _end(e)


def _end(e: Exception) -> None:
  """Ends this process, whatever its main thread waits for."""
  if not _ending.acquire(blocking=False):
    threading.Event().wait()  # For another thread to end it.
  index, count = _place()
  if count > 1 and not index:
    # Without the first process, jax would abort the others at once.
    time.sleep(2 * _POLL + 1)
  code = errors.WorkerLostError.exit_code
  if isinstance(e, errors.UserError):
    code = e.exit_code
    print(f"{type(e).__name__}: {errors.one_line(e)}", file=sys.stderr)
  sys.stderr.flush()
  os._exit(code)
