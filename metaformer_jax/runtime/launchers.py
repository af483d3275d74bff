"""How many processes a run has, and which this is: by flags or a launcher."""

from collections.abc import Mapping
from typing import Any

from metaformer_jax import errors


def arguments(env: Mapping[str, str], coordinator: str | None,
              count: int | None, index: int | None) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None: there are no others.

  Missing ones are taken from SLURM or Open MPI. The address of process 0 is
  then left to jax, which knows how to find it.

  Raises:
    ConfigError: as `processes.start`.
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
