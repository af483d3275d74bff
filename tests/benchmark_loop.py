"""What a run costs beside its training step, and what a second start saves:

    python tests/benchmark_loop.py [--image_size=96] [--batch_size=8]

PoolFormer-S12 on scikit-learn's digits, which are in memory. Steps of the loop
(input, transfer, metrics, log) and calls of its compiled step alone are made in
turns. Unless the machine is quiet, their times differ by more than the loop
costs; the processor time of the thread that makes them does not. Before, the
same command runs twice with a new folder of compiled programs, a few times: the
seconds until its step is compiled, and of the whole. Prints JSON, with medians
of the ratios, the least and the most.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from metaformer_jax import cli
from metaformer_jax.runtime import sharding
from metaformer_jax.training import loop

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "poolformer_s12.py"


def command_line(args, folder, name, n_steps):
  return [f"--workdir={folder / name}", f"--config={CONFIG}",
          "--config.data.source=digits", "--config.data.path=None",
          "--config.task.num_classes=10",
          f"--config.task.image_size={args.image_size}",
          f"--config.train.batch_size={args.batch_size}",
          f"--config.train.steps={n_steps}",
          "--config.data.eval_split=test[:16]", "--config.eval.batch_size=16",
          f"--config.log.compilation_cache={folder / 'cache'}"]


def overhead(args, folder):
  """Seconds of steps of the loop, over those of its program alone.

  "own_seconds" is the processor time of the loop's thread in a step, less that
  of a call of the program.
  """
  sys.argv[1:] = command_line(args, folder, "loop", 10**6)
  cfg, workdir = cli.parse()
  cfg, task, mesh = cli.start(cfg, workdir=workdir)
  taken, own = ({"loop": [], "program": []} for _ in range(2))
  with contextlib.ExitStack() as stack:
    run = loop.Run.start(cfg, task, mesh, workdir, stack)
    batch = sharding.put_batch(next(run.batches), mesh)
    numbers = iter(run.remaining_steps())

    def of_loop():
      i = next(numbers)
      run.train(i)
      if run.should_log(i - 1):
        run.log(i - 1)

    def of_program():
      step = run._step_for(batch)
      run.state, _ = step(run.state, batch, flags)

    of_loop()
    flags = run.stop.flags(mesh)
    for _ in range(args.rounds + 1):
      for name, one_step in (("loop", of_loop), ("program", of_program)):
        jax.block_until_ready(run.state)
        start, of_thread = time.perf_counter(), time.thread_time()
        for _ in range(args.steps):
          one_step()
        own[name].append((time.thread_time() - of_thread) / args.steps)
        jax.block_until_ready(run.state)
        taken[name].append((time.perf_counter() - start) / args.steps)
  pairs = list(zip(taken["loop"], taken["program"]))[1:]
  more = [a - b for a, b in zip(own["loop"], own["program"])][1:]
  return {"step_seconds": statistics.median(b for _, b in pairs),
          "loop_over_program": spread([a / b for a, b in pairs]),
          "own_seconds": spread(more)}


def spread(values):
  """The median, the least and the most."""
  return [statistics.median(values), min(values), max(values)]


def started(args, folder, name):
  """Seconds until a run's training step is compiled, and of the whole run."""
  start = time.perf_counter()
  with subprocess.Popen(
      [sys.executable, "-m", "metaformer_jax.main",
       *command_line(args, folder, name, 1)],
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
    lines = []
    compiled = None
    for line in process.stdout:
      lines.append(line)
      if "compiled the training step in" in line:
        compiled = time.perf_counter() - start
  if process.returncode or compiled is None:
    sys.exit("".join(lines))
  return compiled, time.perf_counter() - start


def starts(args, folder):
  """Seconds of first and second starts, and how many times sooner."""
  pairs = []
  for i in range(args.starts):
    one = folder / str(i)
    pairs.append([started(args, one, name) for name in ("first", "second")])
  found = {}
  for i, what in enumerate(("compiled", "whole")):
    found[what] = {
        "seconds": [(first[i], second[i]) for first, second in pairs],
        "times_sooner": spread([first[i] / second[i]
                                for first, second in pairs])}
  return found


def main(args: argparse.Namespace) -> None:
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    found = {"starts": starts(args, folder)} if args.starts else {}
    if args.rounds:
      found |= overhead(args, folder)
  print(json.dumps(found, indent=2))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--image_size", type=int, default=96)
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--starts", type=int, default=3)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--steps", type=int, default=10)
  main(parser.parse_args())
