"""What it costs a run that nothing is lost, beside a run without the checks:

    python tests/benchmark_faults.py [--image_size=64] [--batch_size=16]

PoolFormer-S12 with AdamW and a moving average. Three costs are measured apart
and added for a save every 500 steps: what a step does besides the update
(looking for what is not finite, leaving the state as it was), in turns with a
step without it; what the loop does on the host (flags, clock, watchdog); and
what a save does besides writing (finite or not, checksums, opening it again,
manifest), of which only the first is not done in the background. Prints JSON.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time

import jax
import numpy as np
import optax

from metaformer_jax.checkpoints import arrays, manifest
from metaformer_jax.checkpoints import manager as checkpoints_lib
from metaformer_jax.config import schema, tasks
from metaformer_jax.runtime import (
  accounting,
  devices,
  sharding,
  signals,
  watchdog,
)
from metaformer_jax.tasks import classification
from metaformer_jax.training import finite, optim, step
from metaformer_jax.training import rng as rng_lib
from metaformer_jax.training import state as state_lib

SAVE_EVERY = 500


def bare_step(state, batch, *, task, tx, schedule, seed, ema_decay, accumulate):
  """`step.train_step` without the checks."""
  del schedule
  rngs = rng_lib.for_step(seed, state.step, task.rng_names)
  grads, metrics, model_state = step.gradients(
      task, state, batch, rngs, accumulate)
  updates, opt_state = tx.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  ema_params, ema_state = state_lib.average(
      (params, state_lib.averaged(model_state)),
      (state.ema_params, state.ema_state), ema_decay)
  metrics |= {"grad_norm": optax.tree.norm(grads)}
  return state.replace(
      step=state.step + 1, params=params, opt_state=opt_state,
      model_state=model_state, ema_params=ema_params,
      ema_state=ema_state), metrics


def seconds(function, *args) -> float:
  start = time.perf_counter()
  function(*args)
  return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
  cfg = schema.Experiment(
      model=schema.Model(name="poolformer_s12"),
      task=tasks.Classification(num_classes=1000,
                                image_size=args.image_size),
      train=schema.Train(batch_size=args.batch_size, ema_decay=0.9999))
  cfg, task = classification.create(cfg)
  mesh = devices.make_mesh(cfg)
  tx, schedule = optim.create(cfg, 1000, 100.0)
  state = jax.jit(lambda: state_lib.create(task, tx, 0, 0.9999))()
  rng = np.random.default_rng(0)
  batch = sharding.put_batch({
      "image": rng.integers(0, 256, (args.batch_size, *2 * (args.image_size,),
                                     3), np.uint8),
      "label": rng.integers(0, 1000, args.batch_size).astype(np.int32)}, mesh)

  def compiled(function):
    return jax.jit(lambda state, batch: function(
        state, batch, task=task, tx=tx, schedule=schedule, seed=0,
        ema_decay=0.9999, accumulate=1), donate_argnums=0).lower(
            state, batch).compile()

  programs = {"bare": compiled(bare_step), "checked": compiled(step.train_step)}
  # Processor time: what other programs do to the machine changes it little.
  taken = {name: [] for name in programs}
  step_seconds = []
  for _ in range(args.rounds + 1):
    for name, program in programs.items():
      start = time.perf_counter(), time.process_time()
      state, metrics = program(state, batch)
      jax.block_until_ready((state, metrics))
      taken[name].append(time.process_time() - start[1])
      step_seconds.append(time.perf_counter() - start[0])
  ratios = [a / b for a, b in zip(taken["checked"][1:], taken["bare"][1:])]
  step_seconds = statistics.median(step_seconds[2:])

  record, stop = accounting.Record(), signals.StopSignal()
  clock = accounting.Clock(record)
  with watchdog.Watchdog(600) as dog:
    def host():
      for _ in range(1000):
        clock.switch_to("input")
        dog.beat("a batch")
        stop.flags(mesh)
        dog.beat("a step")
        clock.switch_to("step")
    host_seconds = seconds(host) / 1000

  finite.require(state)
  finite_seconds = seconds(finite.require, state)
  with tempfile.TemporaryDirectory() as folder:
    checkpoints = checkpoints_lib.Checkpoints(
        pathlib.Path(folder), cfg.checkpoint, cfg.best_measure)
    blocked = seconds(checkpoints.save, int(state.step), state.trees(), record)
    written = blocked + seconds(checkpoints.close)
    saved = checkpoints.directory / str(int(state.step))
    checksums = seconds(manifest.verify, saved)
    opening = seconds(arrays.require, saved, manifest.read(saved).tree)
  run = SAVE_EVERY * step_seconds
  added = SAVE_EVERY * (step_seconds * (statistics.median(ratios) - 1)
                        + host_seconds) + finite_seconds
  print(json.dumps({
      "step_seconds": step_seconds,
      "checked_over_bare": [statistics.median(ratios), min(ratios),
                            max(ratios)],
      "of_the_medians": statistics.median(taken["checked"][1:])
                        / statistics.median(taken["bare"][1:]),
      "of_the_least": min(taken["checked"]) / min(taken["bare"]),
      "host_seconds_a_step": host_seconds,
      "finite_seconds_a_save": finite_seconds,
      "checksum_seconds_a_save": checksums,
      "opening_seconds_a_save": opening,
      "save_blocks_seconds": blocked, "save_seconds": written,
      "state_mib": sharding.n_bytes(state) / 2**20,
      "added_to_a_run": added / run,
      "with_checksums_in_the_foreground": (added + checksums) / run,
  }, indent=2))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--image_size", type=int, default=64)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--rounds", type=int, default=15)
  main(parser.parse_args())
