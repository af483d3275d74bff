r"""Compiles PoolFormer's blocks for a TPU, with kernels and without:

    python tests/compare_kernels.py --topology=v5e-1

Prints the bytes accessed of the blocks of a stage, forward and backward, in MB
an image, and the largest operations that are no kernel. Needs libtpu, and no
TPU. Not a part of the test suite.
"""

import argparse
import os

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from metaformer_jax.kernels import mlp, pooling
from metaformer_jax.models import metaformer, mixers, poolformer
from metaformer_jax.preflight import hlo


def plain_block(params, x, dtype):
  dim = x.shape[-1]
  block = metaformer.MetaFormerBlock(dim, mixers.Pooling, dtype=dtype)
  return block.apply({"params": params}, x)


def kernel_block(params, x, dtype):
  del dtype
  p = params
  x = pooling.pooling_branch(
      x, None, p["norm1"]["scale"], p["norm1"]["bias"],
      p["layer_scale1"]["scale"], size=3)
  return mlp.mlp_branch(
      x, None, p["norm2"]["scale"], p["norm2"]["bias"],
      p["mlp"]["fc1"]["kernel"], p["mlp"]["fc1"]["bias"],
      p["mlp"]["fc2"]["kernel"], p["mlp"]["fc2"]["bias"],
      p["layer_scale2"]["scale"])


def compiled(block, n_blocks, shape, device, dtype=jnp.bfloat16):
  """Forward and backward of blocks in a row, with gradients of everything."""
  placed = SingleDeviceSharding(device)
  module = metaformer.MetaFormerBlock(shape[-1], mixers.Pooling, dtype=dtype)
  shapes = jax.eval_shape(module.init, jax.random.key(0),
                          jnp.zeros((1, *shape[1:]), dtype))["params"]

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

  def both(params, x, dy):
    def run(params, x):
      for p in params:
        x = block(p, x, dtype)
      return x

    y, pull = jax.vjp(run, params, x)
    return y, pull(dy)

  x = place(jax.ShapeDtypeStruct(shape, dtype))
  params = jax.tree.map(place, [shapes] * n_blocks)
  return jax.jit(both).lower(params, x, x).compile()


def largest(module, n):
  """The operations that move most, of those outside the kernels."""
  found = sorted(
      ((sum(map(hlo.type_bytes, (i.type, *operands))), i.opcode, i.type)
       for i, operands, *_ in module.moves() if i.opcode != "custom-call"),
      reverse=True)
  return found[:n]


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--topology", default="v5e-1")
  parser.add_argument("--size", default="s12", choices=sorted(poolformer.SIZES))
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3, 4])
  parser.add_argument("--blocks", type=int, default=1)
  parser.add_argument("--plain", action="store_true")
  parser.add_argument("--show", type=int, default=0)
  args = parser.parse_args()
  device = topologies.devices(topologies.parse(args.topology))[0]
  for stage in args.stages:
    dim = poolformer.SIZES[args.size]["dims"][stage - 1]
    side = 112 >> stage
    shape = (args.batch, side, side, dim)
    blocks = {"kernels": kernel_block} | (
        {"plain": plain_block} if args.plain else {})
    for name, block in blocks.items():
      program = compiled(block, args.blocks, shape, device)
      counted = program.cost_analysis()["bytes accessed"]
      unit = 2 * side * side * dim
      print(f"stage {stage} {name}: {counted / args.batch / 1e6:.2f} MB, "
            f"{counted / args.batch / unit:.1f} units", flush=True)
      for n_bytes, opcode, kind in largest(hlo.Module(program.as_text()),
                                           args.show):
        print(f"  {n_bytes / args.batch / 1e6:.2f} MB {opcode} {kind[:90]}")


if __name__ == "__main__":
  main()
