"""A program compiled for a TPU elsewhere: what it costs, and where.

Nothing is run: bytes, memory and communication are the compiler's, and the
bound is what the chip's published rates allow.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from metaformer_jax import errors, tasks
from metaformer_jax.benchmark import batches, profiles
from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import cost
from metaformer_jax.preflight import compilation, hlo, topologies
from metaformer_jax.runtime import devices, sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import state as state_lib


class Traffic(NamedTuple):
  """The bytes that an instruction reads and writes.

  Attributes:
    name, kind, phase, part: as of `profiles.Operation`.
    MB: of an image, in 1e6 bytes: the instruction's operands and results, as
      often as it runs, wherever they are stored. The sum is scaled to the
      compiler's count, which knows what an instruction reads of a part of an
      operand.
    HBM: likewise, of the main memory only (`hlo.hbm_bytes`), not scaled.
  """

  name: str
  kind: str
  phase: str
  part: str
  MB: float
  HBM: float


def measure(cfg: Experiment, mode: str, target: topologies.Slice,
            warn: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
  """Compiles a training step, of the first shape of a batch, or a prediction.

  Args:
    cfg: the experiment.
    mode: "train" or "infer".
    target: the slice to compile for.
    warn: is called with what lowering a training step warned of.

  Returns:
    {"measured": [row], "operations": rows of `Traffic`, as dicts}. The row has
    GFLOP (`models.cost`), MB and HBM of an image; images, GiB, MB sent, and
    images/s at most of a chip; the resource that sets this bound; seconds to
    compile. The bound takes MB, as the preflight does.

  Raises:
    ConfigError: the experiment does not fit the slice, or its memory.
  """
  cfg, task = tasks.create(cfg, files=False)
  mesh = devices.make_mesh(cfg, topologies.devices(target))
  fn, arguments = (_train(cfg, task, mesh, warn) if mode == "train" else
                   _infer(cfg, task, mesh))
  lowered, start = fn.lower(*arguments), time.monotonic()
  program, needed = compilation.try_compile(lowered)
  seconds = time.monotonic() - start
  n = cfg.train.batch_size
  if program is None:
    raise errors.ConfigError(
        f"--batch_size: {n} images on {mesh.size} devices of {target.name} "
        f"need {needed / 2**30:.2f} GiB of each, which is too much; reduce it")
  text = program.as_text()
  module = hlo.Module(text)
  flops = 2 * cost.count_macs(fn, *arguments) / mesh.size
  accessed = compilation.bytes_accessed(program, module)
  sent = sum(c.sent_bytes for c in module.collectives(mesh.size))
  limits = topologies.GENERATIONS[target.generation].least_seconds(
      flops, accessed, sent)
  by = max(limits, key=limits.get)
  a_device = n / mesh.size
  moved = list(_traffic(module, profiles.is_training(text), accessed, a_device))
  row = {"a chip": n / target.n_chips, "GFLOP": flops / a_device / 1e9,
         "MB": accessed / a_device / 1e6, "HBM": sum(t.HBM for t in moved),
         "GiB": program.memory_analysis().peak_memory_in_bytes / 2**30,
         "MB sent": sent / 1e6, "images/s": n / limits[by] / target.n_chips,
         "limit": by, "compile s": seconds}
  return {"measured": [row], "operations": [t._asdict() for t in moved]}


def _train(cfg: Experiment, task: base.Task, mesh: Mesh,
           warn: Callable[[str], None]):
  """The step of a run, and the shapes of its arguments."""
  lowered, *_ = compilation.lower_steps(cfg, task, mesh, batches.N_EXAMPLES)
  for line in lowered.warnings:
    warn(line)
  return lowered.program.step, lowered.arguments


def _infer(cfg: Experiment, task: base.Task, mesh: Mesh):
  """What an evaluation computes of a batch, and the shapes of its arguments."""
  variables = jax.eval_shape(functools.partial(state_lib.init, task, cfg.seed))
  everywhere = sharding.replicated(mesh)
  split = NamedSharding(mesh, sharding.BATCH)
  one = batches.evaluation(task, 1)
  return jax.jit(task.predict), (
      jax.tree.map(lambda x: jax.ShapeDtypeStruct(
          x.shape, x.dtype, sharding=everywhere), variables),
      {name: jax.ShapeDtypeStruct((cfg.train.batch_size, *x.shape[1:]), x.dtype,
                                  sharding=split) for name, x in one.items()})


def _traffic(module: hlo.Module, training: bool, accessed: float,
             n_images: float) -> Iterator[Traffic]:
  """What each instruction moves of the bytes accessed; the largest first."""
  moved = [(turns * share * sum(map(hlo.type_bytes, (i.type, *operands))),
            turns * share * hlo.hbm_bytes(i, operands), i)
           for i, operands, turns, share in module.moves()]
  scale = accessed / sum(anywhere for anywhere, _, _ in moved)
  for anywhere, in_hbm, i in sorted(moved, key=lambda row: -row[0]):
    yield Traffic(i.name, *profiles.classify(module, i, training),
                  anywhere * scale / n_images / 1e6, in_hbm / n_images / 1e6)
