"""Runs of several processes on one machine, as on a pod.

Each process has its own fake CPU devices; their collectives use sockets of
127.0.0.1.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import fast_compilation
import small_runs

from metaformer_jax.config import schema, tasks, typed

ROOT = pathlib.Path(__file__).parents[1]


def small(**sections) -> schema.Experiment:
  """A short run with everything that is random, averaged or saved."""
  return schema.Experiment(**({
      "model": schema.Model(name="poolformer_s12", depths=(1,), dims=(16,),
                            token_mixers=("pooling",),
                            drop_path_rate=0.5),
      "task": tasks.Classification(num_classes=10, image_size=16, mixup=0.8,
                                   cutmix=1.0, erasing=0.25),
      "data": schema.Data(source="digits"),
      "train": schema.Train(batch_size=16, steps=40, ema_decay=0.9),
      "eval": schema.Eval(every_epochs=0.2),
      "checkpoint": schema.Checkpoint(every_steps=5),
      "mesh": schema.Mesh(heartbeat_seconds=5),
      "log": schema.Log(every_steps=1, tensorboard=False),
  } | sections))


def start(cfg: schema.Experiment, workdir: pathlib.Path, n_processes: int,
          n_devices: int, folder: pathlib.Path, flags=(), env=None,
          last=(), last_env=None) -> list[subprocess.Popen]:
  """Starts the processes, each with n_devices; stderr goes to files.

  The last process has more flags and variables than the others.
  """
  path = folder / f"{workdir.name}.json"
  path.write_text(typed.to_json(cfg))
  started = []
  for i, others in enumerate(flags_of(n_processes)):
    variables = environment(n_devices) | (env or {})
    if i == n_processes - 1:
      others, variables = [*others, *last], variables | (last_env or {})
    with (folder / f"{workdir.name}.{i}").open("w") as stderr:
      started.append(subprocess.Popen(
          [sys.executable, "-m", "metaformer_jax.main",
           f"--config_json={path}", f"--workdir={workdir}", *flags, *others],
          cwd=ROOT, stderr=stderr, env=variables))
  return started


def flags_of(n_processes: int) -> list[list[str]]:
  """By which each process of a run finds the others."""
  if n_processes == 1:
    return [[]]
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  return [[f"--coordinator=127.0.0.1:{port}", f"--process_index={i}",
           f"--process_count={n_processes}"] for i in range(n_processes)]


def environment(n_devices: int) -> dict[str, str]:
  """Of a process with that many fake devices."""
  return {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS":
          f"--xla_force_host_platform_device_count={n_devices} "
          f"{fast_compilation.XLA_FLAGS}"}


def said(folder: pathlib.Path, workdir: pathlib.Path, i: int = 0) -> str:
  """What process i has written to stderr."""
  return (folder / f"{workdir.name}.{i}").read_text()


def finish(processes, timeout: float = 240) -> list[int]:
  """Waits for all; their exit codes."""
  end = time.monotonic() + timeout
  try:
    return [p.wait(max(0.1, end - time.monotonic())) for p in processes]
  finally:
    for p in processes:
      p.kill()


def wait_for_step(processes, workdir: pathlib.Path, step: int) -> None:
  """Waits until the running processes have recorded a step."""
  end = time.monotonic() + 240
  while time.monotonic() < end and all(p.poll() is None for p in processes):
    if any(r["step"] >= step for r in small_runs.records(workdir)):
      return
    time.sleep(0.01)
  raise AssertionError([p.poll() for p in processes])


def losses(workdir: pathlib.Path) -> dict[int, float]:
  """Step -> training loss, where each step is logged."""
  return {r["step"]: r["loss"] for r in small_runs.records(workdir)}


def summary(workdir: pathlib.Path):
  return json.loads((workdir / "summary.json").read_text())
