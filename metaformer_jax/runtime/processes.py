"""The processes of a run: one per host, or one per device.

Every process runs the same program on its part of each batch. A failure in only
one of them would leave the others waiting: failures at the start are shared
with all, and later a process that fails alone ends at once.
"""

import contextlib
import json
import logging
import os
import pathlib
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from importlib import util
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from metaformer_jax import errors

log = logging.getLogger(__name__)

# Length of the messages between processes in bytes.
_MESSAGE = 4096


def start(coordinator: str | None, count: int | None, index: int | None,
          heartbeat_seconds: int) -> None:
  """Joins the other processes of the run, if there are any.

  Args:
    coordinator: "HOST:PORT" of process 0; None: from the environment (SLURM,
      Open MPI or a Cloud TPU).
    count: of processes; 1: there are no others, whatever the environment says;
      None: from the environment.
    index: of this process; None: from the environment.
    heartbeat_seconds: a process that is silent for longer is considered dead,
      and the others end.

  Raises:
    ConfigError: the arguments are wrong, or the environment is incomplete.
    WorkerLostError: a process did not start, or there is another process 0.
  """
  found = arguments(os.environ, coordinator, count, index)
  if jax.distributed.is_initialized() or count == 1 or (
      found is None and not on_tpu()):
    return
  if found and coordinator and not found["process_id"]:
    _check_free(coordinator)
  # jax would handle SIGTERM itself; `signals` does that for the run.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(
        **(found or {}), heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=heartbeat_seconds)
  except RuntimeError as e:
    raise errors.WorkerLostError(
        f"the processes of the run could not connect: {e}; check that all have "
        "started and can reach process 0") from e
  except ValueError as e:
    if found:
      raise errors.ConfigError(f"--coordinator: {e}") from e
    log.info("this TPU has no other hosts (%s)", e)
    return
  if jax.process_index():  # Only the first one logs progress.
    logging.getLogger("metaformer_jax").setLevel(logging.WARNING)
  me = f"{socket.gethostname()}, pid {os.getpid()}"
  for i, other in enumerate(_exchange(me)):
    log.info("process %d of %d: %s", i, jax.process_count(), other)


def arguments(env: Mapping[str, str], coordinator: str | None,
              count: int | None, index: int | None) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None: there are no others.

  Missing ones are taken from SLURM or Open MPI. The address of process 0 is
  then left to jax, which knows how to find it.

  Raises:
    ConfigError: as `start`.
  """
  if count == 1 and not index:
    return None
  launched = _launched(env)
  if coordinator is None and launched is None:
    if (count or 1) != 1 or index:
      raise errors.ConfigError(
          "--coordinator: is missing; give HOST:PORT of process 0 beside "
          "--process_count and --process_index")
    return None
  launched_count, launched_index, alone = launched or (None, None, True)
  count = launched_count if count is None else count
  index = launched_index if index is None else index
  if count is None or index is None:
    raise errors.ConfigError(
        "--coordinator: needs --process_count and --process_index beside it, "
        "as this process was started by neither SLURM nor Open MPI")
  if not 0 <= index < count:
    raise errors.ConfigError(
        f"--process_index: {index} is not one of {count} processes, counted "
        "from 0")
  found = {"num_processes": count, "process_id": index}
  if coordinator is not None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
      raise errors.ConfigError(
          f"--coordinator: {coordinator!r} is not HOST:PORT")
    found["coordinator_address"] = coordinator
    if alone:
      found["cluster_detection_method"] = "deactivate"
  elif "SLURM_PROCID" not in env and "OMPI_MCA_orte_hnp_uri" not in env:
    raise errors.ConfigError(
        "--coordinator: is missing; Open MPI 5 does not provide the address of "
        "process 0; give its HOST:PORT")
  elif alone and env.get("SLURM_GPUS_ON_NODE", "").isdecimal():
    # jax assigns one device to each process that SLURM starts.
    found["local_device_ids"] = list(range(int(env["SLURM_GPUS_ON_NODE"])))
  return found


def _launched(env: Mapping[str, str]) -> tuple[int, int, bool] | None:
  """(processes, index, alone on its host) if a launcher started several.

  A shell within a SLURM job has the job's variables, but is not a step of it.
  """
  if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
    count, index = _number(env, "SLURM_NTASKS"), _number(env, "SLURM_PROCID")
    alone = env.get("SLURM_STEP_NUM_NODES") == env["SLURM_NTASKS"]
  elif "OMPI_COMM_WORLD_SIZE" in env:
    count = _number(env, "OMPI_COMM_WORLD_SIZE")
    index = _number(env, "OMPI_COMM_WORLD_RANK")
    alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
  else:
    return None
  return (count, index, alone) if count > 1 else None


def _number(env: Mapping[str, str], name: str) -> int:
  if not env.get(name, "").isdecimal():
    raise errors.ConfigError(
        f"{name}: the environment's {env.get(name)!r} is not a number; give "
        "--process_count=1 to run alone")
  return int(env[name])


def _check_free(coordinator: str) -> None:
  """Raises WorkerLostError if another process 0 listens at the port."""
  port = int(coordinator.rpartition(":")[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError as e:
      raise errors.WorkerLostError(
          f"--coordinator: process 0 cannot listen at port {port}: "
          f"{e.strerror}; is there another process 0?") from e


def on_tpu() -> bool:
  """Whether jax will find a TPU, possibly a part of a larger slice."""
  if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
    return False
  chips = [*pathlib.Path("/dev").glob("accel*"),
           *pathlib.Path("/dev").glob("vfio/*")]
  return bool(chips) and util.find_spec("libtpu") is not None


def _exchange(message: str) -> list[str]:
  """Returns the messages of all processes in order; all must call it."""
  data = message.encode()[:_MESSAGE]
  padded = np.frombuffer(data.ljust(_MESSAGE, b"\0"), np.uint8)
  said = multihost_utils.process_allgather(padded).reshape(-1, _MESSAGE)
  return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in said]


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
  """An error in the block on one process is raised on all of them.

  All processes must enter it. An error that is not a `UserError` becomes a
  `WorkerLostError` on the others.
  """
  if jax.process_count() == 1:
    yield
    return
  failure = None
  try:
    yield
  except Exception as e:
    failure = e
  own = "" if failure is None else f"{type(failure).__name__}: {failure}"
  for i, said in enumerate(_exchange(own)):
    if not said:
      continue
    kind, _, message = said.partition(": ")
    kind = getattr(errors, kind, errors.WorkerLostError)
    if i == jax.process_index():
      raise failure
    raise kind(message if said == own else f"process {i}: {message}")


def require_same(values: Mapping[str, str]) -> None:
  """Checks that all processes have the same values; all must call it.

  Args:
    values: short texts, by what they are.

  Raises:
    ConfigError: on all processes, if any two differ; names what does.
  """
  if jax.process_count() == 1:
    return
  first, *others = map(json.loads, _exchange(json.dumps(values)))
  for i, theirs in enumerate(others, 1):
    different = [name for name in first if theirs.get(name) != first[name]]
    if different or theirs.keys() != first.keys():
      raise errors.ConfigError(
          f"process {i} differs from process 0 in "
          f"{', '.join(different or sorted(theirs.keys() ^ first.keys()))}; "
          "all hosts need the same configuration, data and modules")


@contextlib.contextmanager
def leaving(heartbeat_seconds: int) -> Iterator[None]:
  """Ends this process at once if it fails alone, so that the others notice.

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
    if shared or jax.process_count() == 1:
      raise
    code = errors.WorkerLostError.exit_code
    if isinstance(e, errors.UserError):
      code = e.exit_code
      print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
    elif isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(
        "INVALID_ARGUMENT"):
      reason = str(e).splitlines()[0]
      print(f"WorkerLostError: {reason}; if another process has died, jax "
            "names it below as an unhealthy task once its heartbeat is missed; "
            "the same command continues from the last checkpoint",
            file=sys.stderr, flush=True)
      time.sleep(heartbeat_seconds + 5)  # jax ends the process.
    else:
      traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)
