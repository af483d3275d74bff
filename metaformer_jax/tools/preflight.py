r"""Compiles an experiment's training step for a TPU that is not here:

    python -m metaformer_jax.tools.preflight \
        --config=configs/poolformer_s24.py --topology=v5litepod-8

Tells whether it fits, what it costs, and what bounds its speed, as the TPU's
own compiler has it (libtpu, which the extra `tpu` brings). The data and the
weights that the config names need not be here. A large model takes minutes;
what was compiled before is remembered. Exit codes: 0 it fits, 1 it does not,
2 the configuration is wrong.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import sys
from importlib import metadata
from typing import Any

from absl import flags

from metaformer_jax import cli, errors
from metaformer_jax.config import checks
from metaformer_jax.config import resolve as config_lib
from metaformer_jax.config.schema import Experiment
from metaformer_jax.preflight import topologies

_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "The slice: v5litepod-8, v4-32, v5p-8, v6e-16, Colab's "
    "v5e-1; or its shape, v5p:4x4x12.")
_FIND_BATCH = flags.DEFINE_bool(
    "find_batch", False, "Also find the largest batch of a chip that fits.")
_JSON = flags.DEFINE_bool(
    "json", False, "Print JSON instead: sizes in bytes, times in seconds.")
_N_EXAMPLES = flags.DEFINE_integer(
    "n_examples", None, "Images of the training data, from which the length of "
    "the run follows. Default: the data's, if it is here; else by the number "
    "of classes, ImageNet's.", lower_bound=1)

# Training images by the number of classes; where neither fits, the first.
_IMAGENET = {1000: ("ImageNet-1K", 1_281_167),
             21_841: ("ImageNet-21K", 14_197_122)}


def main(cfg: Experiment, workdir: pathlib.Path) -> None:
  """Compiles, prints the report, and ends with the verdict."""
  del workdir
  if not _TOPOLOGY.value:
    raise errors.ConfigError(
        "--topology: is missing; give e.g. --topology=v5litepod-8")
  target = topologies.parse(_TOPOLOGY.value)
  os.environ.update(topologies.ENVIRONMENT)
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)  # The compiler does not look up.
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
  """The report of an experiment on a slice, as `report.to_json`.

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
  from metaformer_jax.runtime import sharding  # noqa: PLC0415
  from metaformer_jax.training import program  # noqa: PLC0415

  devices = topologies.devices(target)
  task = tasks.create(cfg)
  n_examples, examples_are = _examples(cfg, task, n_examples)
  versions = dict(sorted(
      (found.name, found.version) for found in metadata.distributions()
      if found.name in ("jax", "libtpu", "libtpu-nightly")))

  @functools.cache
  def compile_for(batch_size):
    changed = dataclasses.replace(cfg, train=dataclasses.replace(
        cfg.train, batch_size=batch_size))
    return _remembered(
        changed, target, versions, lambda: compilation.compile_step(
            changed, tasks.create(changed),
            sharding.make_mesh(changed, devices), n_examples, _say))

  mesh = sharding.make_mesh(cfg, devices)
  batch = sharding.n_bytes(task.train_batch(cfg.train.batch_size))
  built = program.build(cfg, task, mesh, n_examples)
  subject = report.Subject(
      cfg, target, sum(x.size for x in jax.tree.leaves(built.shapes.params)),
      mesh.size, len({d.process_index for d in mesh.devices.flat}),
      dict(mesh.shape), built.n_steps, n_examples, examples_are, batch,
      versions)
  compiled = compile_for(cfg.train.batch_size)
  tried = {}
  if find_batch:
    each = mesh.size * cfg.train.accumulate
    tried = search.largest_batch(
        lambda n: compile_for(n * each), subject.at_once)
  return report.to_json(subject, compiled, tried)


def _examples(cfg: Experiment, task, given: int | None) -> tuple[int, str]:
  """Images of the training data, and where that number is from."""
  if given:
    return given, "as given"
  if not list(checks.check(cfg)):
    return task.make_data("train").n_examples, "of the data"
  name, n = _IMAGENET.get(cfg.model.num_classes, _IMAGENET[1000])
  return n, f"{name}'s, as the data is not here"


def _say(line: str) -> None:
  print(f"preflight: {line}", file=sys.stderr, flush=True)


def _remembered(cfg: Experiment, target: topologies.Slice,
                versions: dict[str, str], compile_now):
  """What compiling gave before, for the same program and compiler; or gives."""
  from metaformer_jax.preflight import compilation  # noqa: PLC0415
  from metaformer_jax.runtime import workdir as workdir_lib  # noqa: PLC0415

  cache = cfg.log.compilation_cache
  if not cache or "://" in cache:
    return compile_now()
  path = pathlib.Path(cache, "preflight", f"{_key(cfg, target, versions)}.json")
  try:
    path = path.expanduser()
    found = compilation.Compiled.from_json(json.loads(path.read_text()))
    _say(f"remembered: {path}")
    return found
  except FileNotFoundError:
    pass
  except (OSError, RuntimeError, ValueError, TypeError, KeyError) as e:
    _say(f"{path} cannot be used: {e}")
  compiled = compile_now()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    workdir_lib.write(path, json.dumps(compiled.to_json()))
  except OSError as e:  # What took minutes is told all the same.
    _say(f"not remembered: {e}")
  return compiled


def _key(cfg: Experiment, target: topologies.Slice,
         versions: dict[str, str]) -> str:
  """Names what a program depends on: config, target, compiler, code."""
  config = json.loads(config_lib.to_json(cfg))
  for section in ("init", "log", "checkpoint", "eval"):
    del config[section]
  config["data"] = {key: config["data"][key]
                    for key in ("image_size", "mean", "std")}
  digest = hashlib.sha256(json.dumps(
      [config, target.topology, target.host_shape, versions,
       *map(os.environ.get, ("LIBTPU_INIT_ARGS", "XLA_FLAGS"))],
      sort_keys=True).encode())
  package = pathlib.Path(__file__).parents[1]
  code = [path for part in ("models", "tasks", "training")
          for path in sorted((package / part).glob("*.py"))]
  code += [package / "preflight" / f"{name}.py"
           for name in ("compilation", "hlo", "topologies")]
  for path in code:
    digest.update(path.read_bytes())
  return digest.hexdigest()[:24]


if __name__ == "__main__":
  cli.run(main, elsewhere=True)
