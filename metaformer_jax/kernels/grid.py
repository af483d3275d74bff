"""What a kernel's grid costs: HBM traffic, VMEM, and the call itself.

A grid has one axis. At each step an array is a block that moves along one of
the array's axes, or the whole array, which stays.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

# A tile, as XLA lays it out for float32 and bfloat16.
ROWS, LANES = 8, 128
# A TPU v5e and a v6e have 128 MiB of VMEM; XLA keeps some for itself.
VMEM = 96 * 2**20


def padded_bytes(shape: Sequence[int], dtype: DTypeLike) -> int:
  """Bytes of [..., rows, lanes] in tiles, as HBM and VMEM hold it."""
  *planes, rows, lanes = shape
  return (math.prod(planes) * -(-rows // ROWS) * ROWS
          * -(-lanes // LANES) * LANES * jnp.dtype(dtype).itemsize)


class Array(NamedTuple):
  """An array of a call, or of its scratch memory.

  Attributes:
    shape: [..., rows, lanes].
    dtype: of its values.
    rows: of the block that moves with the step; None for the whole array at
      every step.
    scalars: whether it lies in the memory of scalars, SMEM.
    axis: along which the block moves, and of which `rows` are.
  """

  shape: tuple[int, ...]
  dtype: DTypeLike = jnp.float32
  rows: int | None = None
  scalars: bool = False
  axis: int = -2

  @property
  def block(self) -> tuple[int, ...]:
    shape = list(self.shape)
    shape[self.axis] = self.rows or shape[self.axis]
    return tuple(shape)

  @property
  def block_bytes(self) -> int:
    return padded_bytes(self.block, self.dtype)

  @property
  def n_buffers(self) -> int:
    """Blocks in memory at once: the next one comes while one is in use."""
    return 1 if self.rows is None else 2

  def result(self, interpret: bool) -> Any:
    """What stands for the array as an output; blocks are written to HBM."""
    if interpret or self.rows is None:
      return jax.ShapeDtypeStruct(self.shape, self.dtype)
    return pltpu.HBM(self.shape, self.dtype)

  def index(self, step: Any) -> tuple[Any, ...]:
    """Which block the array is at a step."""
    place = [0] * len(self.shape)
    place[self.axis] = 0 if self.rows is None else step
    return tuple(place)

  def spec(self) -> pl.BlockSpec:
    if self.scalars:
      return pl.BlockSpec(memory_space=pltpu.SMEM)
    return pl.BlockSpec(self.block, self.index,
                        pipeline_mode=pl.Buffered(self.n_buffers))


@dataclasses.dataclass(frozen=True)
class Call:
  """A kernel's grid and arrays.

  Attributes:
    n_steps: of the grid.
    inputs, outputs: arrays in HBM. An output that does not move is written
      after the last step.
    scratch: arrays in VMEM.
    values: bytes of VMEM for the kernel's own values.
    flops: of the matrix products of all steps.
    transcendentals: exp and erf of all steps.
  """

  n_steps: int
  inputs: tuple[Array, ...]
  outputs: tuple[Array, ...]
  scratch: tuple[Array, ...] = ()
  values: int = 0
  flops: int = 0
  transcendentals: int = 0

  def hbm_bytes(self) -> int:
    """Bytes between HBM and VMEM: a block that stays is moved once."""
    return sum(array.block_bytes * (1 if array.rows is None else self.n_steps)
               for array in (*self.inputs, *self.outputs))

  def vmem_bytes(self) -> int:
    """Bytes of VMEM: every buffer, scratch and the kernel's own values."""
    held = [array.block_bytes * array.n_buffers
            for array in (*self.inputs, *self.outputs) if not array.scalars]
    return sum(held) + self.values + sum(
        array.block_bytes for array in self.scratch)

  def cost(self) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=self.flops, transcendentals=self.transcendentals,
        bytes_accessed=self.hbm_bytes())

  def __call__(self, kernel: Callable[..., None], *args: jax.Array,
               interpret: bool) -> list[jax.Array]:
    """Runs a kernel over the grid.

    Args:
      kernel: takes a reference for each input, output and scratch array.
      *args: the inputs.
      interpret: whether to interpret it, on any platform.
    """
    if not interpret:
      args = [_in_hbm(array, x) for array, x in zip(self.inputs, args)]
    return pl.pallas_call(
        kernel, grid=(self.n_steps,),
        out_shape=[array.result(interpret) for array in self.outputs],
        in_specs=[array.spec() for array in self.inputs],
        out_specs=[array.spec() for array in self.outputs],
        scratch_shapes=[pltpu.VMEM(a.shape, a.dtype) for a in self.scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",),
            vmem_limit_bytes=self.vmem_bytes()),
        cost_estimate=self.cost(), interpret=interpret)(*args)


def _in_hbm(array: Array, x: jax.Array) -> jax.Array:
  """An input that is read block by block, where the blocks come from.

  XLA would move it to VMEM before, as a whole, though it is read once.
  """
  if array.rows is None:
    return x
  return pltpu.with_memory_space_constraint(x, pltpu.HBM)


def too_large(*calls: Call) -> str | None:
  """Says which memory calls need, if it is more than a TPU has."""
  needed = max(call.vmem_bytes() for call in calls)
  return (f"{needed / 2**20:.0f} MiB of VMEM are more than "
          f"{VMEM / 2**20:.0f}" if needed > VMEM else None)
