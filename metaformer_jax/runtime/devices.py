"""The devices of a run: how jax starts, and the mesh that it computes on."""

import os
import re
from collections.abc import Sequence
from importlib import util

import jax
from jax.sharding import AxisType, Mesh

from metaformer_jax import errors
from metaformer_jax.config import checks, schema
from metaformer_jax.runtime import agreement, processes

# Of XLA's pool, for each virtual device of a CPU.
_THREADS_PER_DEVICE = 16


def start_jax(cfg: schema.Experiment, coordinator: str | None = None,
              process_count: int | None = None,
              process_index: int | None = None) -> Mesh:
  """Sets up jax, joins the other processes of the run; returns the mesh.

  Args:
    cfg: the experiment.
    coordinator, process_count, process_index: as for `processes.start`; 1
      process runs alone.

  Raises:
    ConfigError: the mesh does not fit the devices, an argument is wrong, or
      the processes differ in what they are to run.
    WorkerLostError: a process did not start.
  """
  configure(cfg.log.compilation_cache)
  processes.start(coordinator, process_count, process_index, cfg.mesh)
  # Before the devices, which wait for those of all processes, are started.
  processes.require_same(
      lambda: agreement.of_program() | agreement.of_experiment(cfg))
  with processes.leaving(cfg.mesh.heartbeat_seconds):
    devices = jax.local_devices()
  processes.require_same(lambda: agreement.of_devices(devices))
  return make_mesh(cfg)


def configure(cache: str) -> None:
  """Sets jax's options, before its first use.

  Args:
    cache: folder of the compiled programs; empty for none.
  """
  if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
  if not (jax.config.jax_platforms or processes.on_tpu()
          or util.find_spec("jax_plugins")):
    # With libtpu but no TPU, jax would look for one and log five lines.
    jax.config.update("jax_platforms", "cpu")
  _prevent_deadlock()


def _prevent_deadlock() -> None:
  """Gives XLA enough threads for several virtual devices on one CPU.

  A device holds a thread while it waits in a collective. By default all devices
  share as many threads as there are devices. Two collectives that do not depend
  on each other can take all of them, in an order in which neither completes:
  with mesh.fsdp=2 on a busy machine, jax 0.10.2 waits for its time-out and
  aborts.
  """
  flag = re.findall(r"xla_force_host_platform_device_count=(\d+)",
                    os.environ.get("XLA_FLAGS", ""))
  n = max(jax.config.jax_num_cpu_devices, *map(int, flag[-1:]), 1)
  if n > 1:  # Read by XLA when the devices are started.
    os.environ.setdefault("PJRT_NPROC", str(_THREADS_PER_DEVICE * n))


def make_mesh(cfg: schema.Experiment,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that the config asks for.

  Args:
    cfg: the experiment.
    devices: to use; by default all of jax's.

  Raises:
    ConfigError: the axes do not fit the devices, or the batch size the axes.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  n_processes = len({device.process_index for device in devices})
  data, fsdp = cfg.mesh.data, cfg.mesh.fsdp
  if data == -1:
    data = max(1, n // fsdp)
  if fsdp == -1:
    fsdp = max(1, n // data)
  if data * fsdp > n or (data * fsdp < n and (
      -1 in (cfg.mesh.data, cfg.mesh.fsdp) or n_processes > 1)):
    raise errors.ConfigError(
        f"config.mesh: data x fsdp = {cfg.mesh.data} x {cfg.mesh.fsdp} does "
        f"not fit {n} devices; choose sizes with that product")
  problems = list(checks.check_batch(cfg, data * fsdp))
  if problems:
    raise errors.ConfigError("; also ".join(problems))
  return jax.make_mesh((data, fsdp), ("data", "fsdp"),
                       axis_types=(AxisType.Auto,) * 2,
                       devices=devices[:data * fsdp])
