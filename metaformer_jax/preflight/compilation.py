"""What the compiler says of a training step: whether it fits, what it costs."""

import dataclasses
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from metaformer_jax.config.schema import Experiment
from metaformer_jax.models import cost
from metaformer_jax.preflight import hlo
from metaformer_jax.runtime import sharding
from metaformer_jax.tasks import base
from metaformer_jax.training import program as program_lib

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# As libtpu has it when a program is too large as a whole, and when it cannot be
# laid out.
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM "
               r"\(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"))


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A step as compiled for a device of a slice; sizes in bytes.

  Attributes:
    fits: whether the compiler could lay it out in memory.
    needed: memory that it needs at its peak, at most `available` where it
      fits.
    available: memory that programs can have.
    seconds: how long the compiler took.
    flops: of the matrix products and convolutions of a device in a step,
      counted on the traced program.
    state: what a device holds of the state between steps.
    checkpoint: the whole state, as it is saved.
    code: of the program; of one that does not fit, this and what follows is
      None.
    accessed: what a device reads and writes in a step, as the compiler counts:
      each operand of each operation once, wherever it lies.
    collectives: what a device exchanges in a step.
  """

  fits: bool
  needed: int
  available: int
  seconds: float
  flops: float
  state: int
  checkpoint: int
  code: int | None = None
  accessed: float | None = None
  collectives: tuple[hlo.Collective, ...] | None = None

  def to_json(self) -> dict[str, Any]:
    values = dataclasses.asdict(self)
    if self.collectives is not None:
      values["collectives"] = [c._asdict() for c in self.collectives]
    return values

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> "Compiled":
    collectives = values["collectives"]
    if collectives is not None:
      collectives = tuple(hlo.Collective(**c) for c in collectives)
    return cls(**values | {"collectives": collectives})


def compile_step(cfg: Experiment, task: base.Task, mesh: Mesh,
                 n_examples: int,
                 say: Callable[[str], None] = lambda line: None) -> Compiled:
  """Compiles the step that a run of the experiment would run on the mesh.

  Args:
    cfg: the experiment; its data is not opened.
    task: what it learns.
    mesh: of the devices to compile for.
    n_examples: of the training split; the learning rate depends on it.
    say: told what goes on, every half minute.

  Raises:
    ConfigError: the settings do not fit each other or the mesh.
  """
  program = program_lib.build(cfg, task, mesh, n_examples)
  arguments = program_lib.abstract_arguments(cfg, task, mesh, program)
  flops = 2 * cost.count_macs(program.step, *arguments) / mesh.size
  lowered = program.step.lower(*arguments)
  start = time.monotonic()
  with _Ticker(f"compiling a step of {cfg.train.batch_size} images for "
               f"{mesh.size} devices", say):
    compiled, needed = _compile(lowered)
  common = {
      "seconds": time.monotonic() - start, "available": available(mesh),
      "flops": flops, "state": state_on_device(program),
      "checkpoint": sharding.n_bytes(program.shapes)}
  if compiled is None:
    return Compiled(fits=False, needed=needed, **common)
  memory = compiled.memory_analysis()
  module = hlo.Module(compiled.as_text())
  counted = compiled.cost_analysis()["bytes accessed"]
  # Not the sum of arguments, results and temporaries, which may be more than a
  # device has: of these, some take the place of others.
  return Compiled(
      fits=True, needed=memory.peak_memory_in_bytes,
      code=memory.generated_code_size_in_bytes,
      accessed=counted * module.loop_factor(),
      collectives=tuple(module.collectives(mesh.size)), **common)


def state_on_device(program: program_lib.Program) -> int:
  """Bytes that a device holds of the state."""
  return sharding.n_bytes(jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
      program.shapes, program.shardings))


def available(mesh: Mesh) -> int:
  """Memory that the compiler lets a program have, by asking for too much."""
  everywhere = NamedSharding(mesh, sharding.REPLICATED)
  huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=everywhere)
  try:
    jax.jit(jnp.negative).lower(huge).compile()
  except jax.errors.JaxRuntimeError as e:
    return read_too_large(str(e))[1]
  raise AssertionError("no device has 8 TiB")


def read_too_large(message: str) -> tuple[int, int] | None:
  """(needed, available) bytes of the compiler's error; None: it is another."""
  for pattern in _TOO_LARGE:
    if match := pattern.search(message):
      return (int(float(match[1]) * _UNITS[match[2]]),
              int(float(match[3]) * _UNITS[match[4]]))
  return None


def _compile(lowered) -> tuple[Any, int]:
  """(the program, 0), or (None, bytes that it needs) where it does not fit."""
  try:
    return lowered.compile(), 0
  except jax.errors.JaxRuntimeError as e:
    found = read_too_large(str(e))
    if found is None:
      raise
    return None, found[0]


class _Ticker:
  """Says every half minute how long something has taken, while it does."""

  def __init__(self, what: str, say: Callable[[str], None],
               seconds: float = 30):
    self._what, self._say, self._seconds = what, say, seconds
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._tick, daemon=True)

  def _tick(self):
    start = time.monotonic()
    while not self._over.wait(self._seconds):
      self._say(f"{self._what}: {time.monotonic() - start:.0f} s so far")

  def __enter__(self):
    self._say(f"{self._what}; a large model takes minutes")
    self._thread.start()
    return self

  def __exit__(self, *exc):
    self._over.set()
    self._thread.join()
