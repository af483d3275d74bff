"""A run's training step, or a task's prediction, as a program to measure.

    python -m metaformer_jax.benchmark.ours

It speaks the protocol of `serving`. The first line has "config", the experiment
as nested dicts; "mode", "train" or "infer"; and "n_devices", how many of the
devices are used, or null for all.
"""

import functools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from metaformer_jax import errors, tasks
from metaformer_jax.benchmark import batches, chips, profiles, serving
from metaformer_jax.config import typed
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import cost
from metaformer_jax.runtime import devices, sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import state as state_lib
from metaformer_jax.training import step as step_lib

# Calls that are profiled.
_TRACED = 3


class Program:
  """What is compiled and called, as `serving.serve` needs it.

  Attributes:
    facts: "device", "platform", "n_devices", "dtype", "compile_seconds",
      "flops_per_image" (`models.cost`, two for a multiply-accumulate),
      "peak_flops" of all devices that are used (None if not known), "versions".
  """

  facts: dict[str, Any]

  def __init__(self, cfg: Experiment, mode: str, n_devices: int | None = None):
    """Compiles it.

    Raises:
      ConfigError: the experiment does not fit the devices.
    """
    cfg, task = tasks.create(cfg, files=False)
    mesh = devices.make_mesh(cfg, jax.devices()[:n_devices])
    self._mode = mode
    build = _train if mode == "train" else _infer
    fn, self._state, self._arguments = build(cfg, task, mesh)
    macs = cost.count_macs(fn, self._state, *self._arguments)
    start = time.perf_counter()
    self._compiled = fn.lower(self._state, *self._arguments).compile()
    seconds = time.perf_counter() - start
    self._device = mesh.devices.flat[0]
    peak = chips.peak_flops(self._device.device_kind)
    self.facts = {
        "device": self._device.device_kind,
        "platform": self._device.platform, "n_devices": mesh.size,
        "dtype": cfg.model.dtype, "compile_seconds": seconds,
        "flops_per_image": 2 * macs / cfg.train.batch_size,
        "peak_flops": peak and peak * mesh.size,
        "versions": {"jax": jax.__version__}}
    self.call()
    self.wait()
    serving.reset_peak_memory()

  def call(self) -> None:
    """Starts a step, which replaces the state, or a prediction."""
    if self._mode == "train":
      self._state, self._outputs = self._compiled(self._state,
                                                  *self._arguments)
    else:
      self._outputs = self._compiled(self._state, *self._arguments)

  def wait(self) -> None:
    """Waits for all that was started."""
    jax.block_until_ready(self._outputs)

  def memory(self) -> dict[str, Any]:
    """{"memory": bytes of a device at most, "memory_of": how it is known}."""
    stats = self._device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
      return {"memory": stats["peak_bytes_in_use"], "memory_of": "device"}
    if self._device.platform == "cpu":
      return {"memory": serving.peak_memory(), "memory_of": "process"}
    return {"memory": self._compiled.memory_analysis().peak_memory_in_bytes,
            "memory_of": "compiler"}

  def rest(self) -> None:
    """Memory is kept: jax has no way of giving it back."""

  def trace(self, folder: str) -> dict[str, Any]:
    """Profiles a few calls; returns where their time goes.

    Returns:
      {"operations": rows of `profiles.Operation`, as dicts, in ms of a call}.
    """
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with jax.profiler.trace(folder):
      for _ in range(_TRACED):
        self.call()
        self.wait()
    found = profiles.read(pathlib.Path(folder), self._compiled.as_text(),
                          _TRACED)
    return {"operations": [operation._asdict() for operation in found]}


def _train(cfg: Experiment, task: base.Task, mesh: Mesh):
  """The step of a run, its state, and its other arguments."""
  program = step_lib.build(cfg, task, mesh, batches.N_EXAMPLES)
  state = jax.jit(program.create, out_shardings=program.shardings)()
  batch = batches.training(task, cfg.train.batch_size,
                           getattr(cfg.task, "num_classes", None))
  flags = jax.device_put(np.zeros(mesh.size, np.int32),
                         NamedSharding(mesh, sharding.BATCH))
  return program.step, state, (sharding.put_batch(batch, mesh), flags)


def _infer(cfg: Experiment, task: base.Task, mesh: Mesh):
  """What an evaluation and `inference.Loaded.predict` compute of a batch."""
  init = jax.jit(functools.partial(state_lib.init, task, cfg.seed),
                 out_shardings=sharding.replicated(mesh))
  batch = batches.evaluation(task, cfg.train.batch_size)
  return jax.jit(task.predict), init(), (sharding.put_batch(batch, mesh),)


def prepare(spec: Mapping[str, Any]) -> Program:
  """The program that the first line of the protocol asks for."""
  devices.configure(cache="")  # The time to compile is measured.
  with errors.fitting_memory(
      f"--batch_size: {spec['batch_size']} images do not fit in memory; reduce "
      "it"):
    return Program(typed.typed(spec["config"]), spec["mode"], spec["n_devices"])


if __name__ == "__main__":
  serving.serve(prepare)
