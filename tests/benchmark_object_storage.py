"""Requests and bytes of checkpoints on gs://, and how long a save blocks.

    python tests/benchmark_object_storage.py [megabytes of the state]

The server is a fake one on the loopback, so that its seconds say nothing of a
real one; the requests are those that a real one gets.
"""

import collections
import contextlib
import pathlib
import re
import statistics
import sys
import tempfile
import time

import checkpoint_cases
import fake_gcs
import jax.numpy as jnp
import numpy as np

from metaformer_jax import storage
from metaformer_jax.runtime import accounting
from metaformer_jax.runtime import workdir as workdir_lib

SAVES = 5


def kind(method, path):
  """Of a request: what Google bills, and what it is for."""
  if "/upload/" in path or method in ("PUT", "PATCH"):
    return "write (class A)"
  if method == "DELETE":
    return "delete (free)"
  if "alt=media" in path or "/download/" in path:
    return "read (class B)"
  return ("list (class A)" if re.search(r"/o(\?|$)", path)
          else "metadata (class B)")


def report(what, proxy):
  """Prints and forgets the requests since the last report."""
  counts = collections.Counter(kind(m, p) for m, p, _ in proxy.requests)
  written = sum(size for _, _, size in proxy.requests)
  print(f"{what}: {written / 1e6:.2f} MB written; " + ", ".join(
      f"{n} x {name}" for name, n in sorted(counts.items())), flush=True)
  proxy.requests.clear()


def run(workdir, state, proxy):
  """Saves some steps; returns the median seconds for which one blocked."""
  seconds = []
  with workdir_lib.hold(workdir) as lock, contextlib.closing(
      checkpoint_cases.opened(workdir, lock=lock)) as checkpoints:
    checkpoints.latest_good()
    if proxy:
      report("start of a new run", proxy)
    for step in range(1, SAVES + 1):
      start = time.perf_counter()
      checkpoints.save(step, state.trees(), accounting.Record(),
                       needed=False)
      seconds.append(time.perf_counter() - start)
      checkpoints.wait()
      if proxy and step in (1, SAVES):
        report(f"save {step}", proxy)
      elif proxy:
        proxy.requests.clear()
  return statistics.median(seconds[1:])


def main(megabytes):
  rng = np.random.default_rng(0)
  params = {f"layer{i}": jnp.asarray(rng.normal(size=(2**18,)), jnp.float32)
            for i in range(megabytes)}
  state = checkpoint_cases.make_state(0, ema=False).replace(
      params=params, opt_state={"mu": params})
  # What Orbax and gcsfs do only once is not counted.
  with tempfile.TemporaryDirectory() as folder:
    run(pathlib.Path(folder, "warm"), state, None)
    disk = run(pathlib.Path(folder, "run"), state, None)
  with fake_gcs.serving() as (_, proxy):
    run(storage.path("gs://bkt/warm"), state, None)
    proxy.counts = True
    remote = run(storage.path("gs://bkt/run"), state, proxy)
    proxy.requests.clear()
    with contextlib.closing(checkpoint_cases.opened(
        storage.path("gs://bkt/run"))) as checkpoints:
      step = checkpoints.latest_good()
      report("start of a resumed run", proxy)
      checkpoint_cases.restore(checkpoints, step,
                               checkpoint_cases.abstract(state))
      report("its restore", proxy)
  print(f"a save blocks for {disk:.3f} s on disk, {remote:.3f} s on gs://")


if __name__ == "__main__":
  main(int(sys.argv[1]) if len(sys.argv) > 1 else 8)
