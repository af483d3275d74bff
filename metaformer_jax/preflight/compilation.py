"""Lowers and compiles a training step: does it fit, and what does it cost?"""

import dataclasses
import hashlib
import pathlib
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
from metaformer_jax.training import step as step_lib

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# libtpu's messages for a program that is too large as a whole, and for one
# whose buffers cannot be placed in memory.
_TOO_LARGE = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM "
               r"\(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"))


@dataclasses.dataclass(frozen=True)
class Lowered:
  """A step as it is handed to the compiler.

  Attributes:
    name: of the step, for messages.
    program: the run's program, of which this is the step.
    mesh: the devices to compile for.
    arguments: shapes, dtypes and shardings of the step's arguments.
    step: the lowered step.
    warnings: of `step.lower`, for all shapes of a batch.
  """

  name: str
  program: step_lib.Program
  mesh: Mesh
  arguments: tuple[Any, ...]
  step: jax.stages.Lowered
  warnings: tuple[str, ...] = ()

  def fingerprint(self) -> str:
    """A digest of the program's text, and of the code that reads the result.

    Debug locations are left out: where the source lies changes nothing.
    """
    digest = hashlib.sha256(self.step.as_text(debug_info=False).encode())
    for path in (__file__, hlo.__file__):
      digest.update(pathlib.Path(path).read_bytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What is known of a compiled step, per device; sizes in bytes.

  Attributes:
    fits: whether the compiler could place it in memory.
    needed: peak memory; at most `available` if it fits.
    available: memory that a program can use.
    seconds: compile time.
    flops: of the matrix products and convolutions in a step, counted on the
      traced program.
    state: the device's part of the training state.
    checkpoint: the whole state, as saved.
    code: size of the program. This and the following are None if it does not
      fit.
    accessed: bytes read and written in a step, as the compiler counts: each
      operand of each operation once, wherever it is stored.
    collectives: communication with other devices in a step.
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


def lower_steps(cfg: Experiment, task: base.Task, mesh: Mesh,
                n_examples: int) -> list[Lowered]:
  """Lowers the step that a run would compile: one for each shape of a batch.

  Takes seconds; the data is not opened.

  Args:
    cfg: the experiment.
    task: of the experiment.
    mesh: the devices to compile for.
    n_examples: size of the training split; the learning rate depends on it.

  Raises:
    ConfigError: the settings do not fit together, or do not fit the mesh, or
      no branch has the kernels that they ask for.
  """
  program = step_lib.build(cfg, task, mesh, n_examples)
  name = f"a step of {cfg.train.batch_size} images on {mesh.size} devices"
  warnings: list[str] = []
  steps = list(step_lib.lower(cfg, task, mesh, program, warnings.append))
  return [Lowered(name, program, mesh, arguments, step, tuple(warnings))
          for arguments, step in steps]


def compile_step(lowered: Lowered,
                 say: Callable[[str], None] = lambda line: None) -> Compiled:
  """Compiles a step, which may take minutes.

  Args:
    lowered: the step.
    say: is called with a progress message every half minute.
  """
  mesh, program = lowered.mesh, lowered.program
  start = time.monotonic()
  with _Ticker(f"compiling {lowered.name}", say):
    compiled, needed = try_compile(lowered.step)
  common = {
      "seconds": time.monotonic() - start, "available": available(mesh),
      "flops":
          2 * cost.count_macs(program.step, *lowered.arguments) / mesh.size,
      "state": state_on_device(program),
      "checkpoint": sharding.n_bytes(program.shapes)}
  if compiled is None:
    return Compiled(fits=False, needed=needed, **common)
  memory = compiled.memory_analysis()
  module = hlo.Module(compiled.as_text())
  # The sum of arguments, results and temporaries would be too large: some of
  # them share memory.
  return Compiled(
      fits=True, needed=memory.peak_memory_in_bytes,
      code=memory.generated_code_size_in_bytes,
      accessed=bytes_accessed(compiled, module),
      collectives=tuple(module.collectives(mesh.size)), **common)


def bytes_accessed(compiled: jax.stages.Compiled, module: hlo.Module) -> float:
  """Bytes that a program reads and writes, as the compiler counts them.

  The compiler counts the body of a loop once; here it is as often as it runs.
  """
  return compiled.cost_analysis()["bytes accessed"] * module.loop_factor()


def state_on_device(program: step_lib.Program) -> int:
  """Bytes of the training state on one device."""
  return sharding.n_bytes(jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
      program.shapes, program.shardings))


def available(mesh: Mesh) -> int:
  """Memory that the compiler allows a program, found by asking for too much."""
  everywhere = NamedSharding(mesh, sharding.REPLICATED)
  huge = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=everywhere)
  try:
    jax.jit(jnp.negative).lower(huge).compile()
  except jax.errors.JaxRuntimeError as e:
    return read_too_large(str(e))[1]
  raise AssertionError("no device has 8 TiB")


def read_too_large(message: str) -> tuple[int, int] | None:
  """(needed, available) bytes from libtpu's error; None for other errors."""
  for pattern in _TOO_LARGE:
    if match := pattern.search(message):
      return (int(float(match[1]) * _UNITS[match[2]]),
              int(float(match[3]) * _UNITS[match[4]]))
  return None


def try_compile(lowered: jax.stages.Lowered) -> tuple[Any, int]:
  """(compiled program, 0), or (None, bytes needed) if it does not fit."""
  try:
    return lowered.compile(), 0
  except jax.errors.JaxRuntimeError as e:
    found = read_too_large(str(e))
    if found is None:
      raise
    return None, found[0]


class _Ticker:
  """Reports every half minute how long the block has been running."""

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
