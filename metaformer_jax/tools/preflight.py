r"""Compiles an experiment's training step for a TPU that is not here:

    python -m metaformer_jax.tools.preflight \
        --config=configs/poolformer_s24.py --topology=v5litepod-8

Reports whether the step fits in memory, what it costs and what limits its
speed, according to the TPU's own compiler (libtpu; `pip install
'metaformer-jax[tpu]'`). The data and weights that the config names need not be
on this machine. A large model takes minutes; results are cached. Exit codes:
0 it fits, 1 it does not fit, 2 the configuration is wrong.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import sys
from importlib import metadata
from typing import Any

from absl import flags

from metaformer_jax import cli, errors, storage
from metaformer_jax.config import checks, json_data
from metaformer_jax.config.schema import Experiment
from metaformer_jax.data import sources
from metaformer_jax.preflight import topologies

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "TPU slice by name: v5litepod-8, v4-32, v5p-8, v6e-16, "
    "v5e-1 (Colab); or by shape: v5p:4x4x12.")
_FIND_BATCH = flags.DEFINE_bool(
    "find_batch", False, "Also find the largest batch per chip that fits.")
_JSON = flags.DEFINE_bool(
    "json", False, "Print JSON instead; sizes in bytes, times in seconds.")
_N_EXAMPLES = flags.DEFINE_integer(
    "n_examples", None, "Number of training images, which sets the length of "
    "the run. Default: counted if the data is here; otherwise that of "
    "ADE20K, COCO, ImageNet-21K or -1K, by task and classes.", lower_bound=1)

# Training images by task and number of classes, of COCO those with objects;
# ImageNet-1K's for any others.
_IMAGENET = "ImageNet-1K", 1_281_167
_KNOWN = {("segmentation", 150): ("ADE20K", 20_210),
          ("detection", 80): ("COCO", 117_266),
          ("classification", 21_841): ("ImageNet-21K", 14_197_122)}


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Compiles, prints the report and exits with the verdict."""
  del workdir
  if not _TOPOLOGY.value:
    raise errors.ConfigError(
        "--topology: is missing; give e.g. --topology=v5litepod-8")
  target = topologies.parse(_TOPOLOGY.value)
  os.environ.update(topologies.ENVIRONMENT)
  from metaformer_jax.preflight import report as report_lib  # noqa: PLC0415

  report = preflight(cfg, target, find_batch=_FIND_BATCH.value,
                     n_examples=_N_EXAMPLES.value)
  if _JSON.value:
    print(json.dumps(report, indent=2))
  else:
    print("\n".join(report_lib.lines(report)))
  sys.exit(0 if report["fits"] else 1)


def preflight(cfg: Experiment, target: topologies.Slice, *,
              find_batch: bool = False, n_examples: int | None = None,
              ) -> dict[str, Any]:
  """The report of an experiment on a slice, as `report.to_json` returns it.

  Raises:
    ConfigError: the experiment does not fit the slice's devices, or libtpu is
      not installed.
  """
  import jax  # noqa: PLC0415  After the config is checked.

  from metaformer_jax import tasks  # noqa: PLC0415
  from metaformer_jax.preflight import (  # noqa: PLC0415
    compilation,
    report,
    search,
  )
  from metaformer_jax.runtime import devices, sharding  # noqa: PLC0415

  chips = topologies.devices(target)
  cfg, task = tasks.create(cfg, files=False)
  n_examples, examples_are = _examples(cfg, task, n_examples)
  versions = dict(sorted(
      (found.name, found.version) for found in metadata.distributions()
      if found.name in ("jax", "libtpu", "libtpu-nightly")))

  @functools.cache
  def lower_for(batch_size):
    changed, task = tasks.create(dataclasses.replace(
        cfg, train=dataclasses.replace(cfg.train, batch_size=batch_size)),
                                 files=False)
    return compilation.lower_steps(
        changed, task, devices.make_mesh(changed, chips),
        n_examples)

  @functools.cache
  def compile_for(batch_size):
    """The result for the batch shape that needs most memory."""
    return max(
        (_cached(cfg.log.compilation_cache, _key(lowered, target, versions),
                 lambda lowered=lowered: compilation.compile_step(
                     lowered, _say))
         for lowered in lower_for(batch_size)),
        key=lambda compiled: (not compiled.fits, compiled.needed))

  first, *_ = lower_for(cfg.train.batch_size)
  mesh, program = first.mesh, first.program
  subject = report.Subject(
      cfg, target, sum(x.size for x in jax.tree.leaves(program.shapes.params)),
      mesh.size, len({d.process_index for d in mesh.devices.flat}),
      dict(mesh.shape), program.n_steps, n_examples, examples_are,
      max(map(sharding.n_bytes, task.train_batches(cfg.train.batch_size))),
      versions, first.warnings)
  compiled = compile_for(cfg.train.batch_size)
  tried = {}
  if find_batch:
    each = mesh.size * cfg.train.accumulate
    tried = search.largest_batch(
        lambda n: compile_for(n * each), subject.at_once)
  return report.to_json(subject, compiled, tried)


def _examples(cfg: Experiment, task, given: int | None) -> tuple[int, str]:
  """Number of training images, and where that number comes from."""
  if given:
    return given, "as given"
  if not [*checks.check(cfg), *sources.check(cfg, files=True)]:
    return task.make_data("train").n_examples, "counted in the data"
  name, n = _KNOWN.get((cfg.task.name, cfg.task.num_classes), _IMAGENET)
  return n, f"{name}'s, as the data is not here"


def _say(line: str) -> None:
  print(f"preflight: {line}", file=sys.stderr, flush=True)


def _cached(folder: str, key: str, compile_now):
  """The cached result under this key; without one, compiles and stores it."""
  from metaformer_jax.preflight import compilation  # noqa: PLC0415

  if not folder or "://" in folder:
    return compile_now()
  path = pathlib.Path(folder, "preflight", f"{key}.json")
  try:
    path = path.expanduser()
    if path.exists():
      found = compilation.Compiled.from_json(json_data.read(path))
      _say(f"read from the cache: {path}")
      return found
  except (OSError, RuntimeError, ValueError, TypeError, KeyError) as e:
    _say(f"the cached result {path} cannot be used, compiling again: {e}")
  compiled = compile_now()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write(path, json.dumps(compiled.to_json()))
  except OSError as e:  # The result is still reported.
    _say(f"the result cannot be cached: {e}")
  return compiled


def _key(lowered, target: topologies.Slice, versions: dict[str, str]) -> str:
  """Digest of all that the result depends on: program, target, compiler."""
  return hashlib.sha256(json.dumps([
      lowered.fingerprint(), target.topology, target.host_shape, versions,
      *map(os.environ.get, ("LIBTPU_INIT_ARGS", "XLA_FLAGS")),
  ]).encode()).hexdigest()[:24]


def console() -> None:
  """The command metaformer-preflight."""
  cli.run(main, elsewhere=True)


if __name__ == "__main__":
  console()
