r"""Compiles a model's blocks for a TPU, with kernels and without:

    python tests/compare_kernels.py --model=convformer_s18 --plain

Prints, of the blocks of a stage, forward and backward, the bytes accessed, in
MB an image and in units of a read or write of the stage's activation; the part
that is in main memory; GFLOP an image, a kernel's as it says; and the largest
operations that are no kernel. Needs libtpu, and no TPU. Not a part of the test
suite.
"""

import argparse
import dataclasses
import functools
import os

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from metaformer_jax.models import metaformer, mixers, norms, parts, registry
from metaformer_jax.preflight import hlo


def shared(settings, cls):
  """The settings that a dataclass has too, by name."""
  return {f.name: getattr(settings, f.name) for f in dataclasses.fields(cls)
          if hasattr(settings, f.name)}


def block_of(settings, i, **changes):
  """A block of stage i, from 0."""
  mixer = mixers.MIXERS[settings.token_mixers[i]]
  return metaformer.MetaFormerBlock(
      dim=settings.dims[i],
      token_mixer=functools.partial(mixer, **shared(settings, mixer)),
      norm=functools.partial(norms.NORMS[settings.norm], eps=settings.norm_eps,
                             use_bias=settings.norm_bias),
      res_scale_init=(settings.res_scale_init or [0.0] * (i + 1))[i],
      **shared(settings, parts.MetaFormerBlock), **changes)


def compiled(block, n_blocks, shape, device):
  """Forward and backward of blocks in a row, with gradients of everything."""
  placed = SingleDeviceSharding(device)
  shapes = jax.eval_shape(block.init, jax.random.key(0),
                          jnp.zeros((1, *shape[1:]), block.dtype))["params"]

  def place(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)

  def both(params, x, dy):
    def run(params, x):
      for p in params:
        x = block.apply({"params": p}, x, train=True)
      return x

    y, pull = jax.vjp(run, params, x)
    return y, pull(dy)

  x = place(jax.ShapeDtypeStruct(shape, block.dtype))
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
  parser.add_argument("--model", default="poolformer_s12")
  parser.add_argument("--image_size", type=int, default=224)
  parser.add_argument("--batch", type=int, default=128)
  parser.add_argument("--stages", type=int, nargs="*", default=[1, 2, 3, 4])
  parser.add_argument("--blocks", type=int, default=1)
  parser.add_argument("--plain", action="store_true")
  parser.add_argument("--show", type=int, default=0)
  args = parser.parse_args()
  device = topologies.devices(topologies.parse(args.topology))[0]
  settings = registry.get_spec(args.model).settings
  for stage in args.stages:
    side = args.image_size // 2 >> stage
    shape = (args.batch, side, side, settings.dims[stage - 1])
    for kernels in ("pallas", "xla") if args.plain else ("pallas",):
      block = block_of(settings, stage - 1, kernels=kernels, dtype=jnp.bfloat16)
      program = compiled(block, args.blocks, shape, device)
      module, costs = hlo.Module(program.as_text()), program.cost_analysis()
      in_hbm = sum(turns * share * hlo.hbm_bytes(i, operands)
                   for i, operands, turns, share in module.moves())
      moved, in_hbm = (n / args.batch for n in (costs["bytes accessed"],
                                                in_hbm))
      unit = 2 * side * side * shape[-1]
      print(f"stage {stage} {kernels}: {moved / 1e6:.2f} MB, "
            f"{moved / unit:.1f} units; HBM {in_hbm / 1e6:.2f} MB, "
            f"{in_hbm / unit:.1f} units; "
            f"{costs['flops'] / args.batch / 1e9:.3f} GFLOP", flush=True)
      for n_bytes, opcode, kind in largest(module, args.show):
        print(f"  {n_bytes / args.batch / 1e6:.2f} MB {opcode} {kind[:90]}")


if __name__ == "__main__":
  main()
