r"""Compiles the operations of augmentation for a TPU, and prints their costs:

    python tests/compare_augment.py --topology=v5e-1

Of one image of 224 x 224 pixels, by operation: bytes accessed, with the bodies
of loops as often as they run; the compiler's own FLOPs, with each body once;
and its estimate of cycles. Below, the means over RandAugment's draws, and the
sum of all operations, which is what each image would cost if a batch were
augmented at once. Gathers have no estimate. Needs libtpu, and no TPU. Not a
part of the test suite.
"""

import argparse
import os
import re

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from metaformer_jax.config import policies
from metaformer_jax.ops import augment
from metaformer_jax.preflight import hlo

SIDE, FILL = 224, (124, 116, 104)
POLICY = policies.parse("rand-m9-mstd0.5-inc1")


class Module(hlo.Module):
  """Also counts the estimated cycles of loops."""

  def cycles(self):
    found = 0
    for i, _, turns, share in self.moves():
      estimate = re.search(r'"estimated_cycles":"(\d+)"', i.line)
      found += share * turns * int(estimate[1]) if estimate else 0
    return found


def costs(name, device):
  """MB accessed, MFLOP and thousands of cycles of an operation."""
  placed = SingleDeviceSharding(device)
  image, argument, bicubic = (
      jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
      for shape, dtype in (((SIDE, SIDE, 3), jnp.uint8), ((), jnp.float32),
                           ((), jnp.bool_)))

  def apply(image, argument, bicubic):
    return augment.apply(image, augment.NAMES.index(name), argument, bicubic,
                         FILL)

  compiled = jax.jit(apply).lower(image, argument, bicubic).compile()
  module, counted = Module(compiled.as_text()), compiled.cost_analysis()
  return (counted["bytes accessed"] * module.loop_factor() / 1e6,
          counted.get("flops", 0) / 1e6, module.cycles() / 1e3)


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--topology", default="v5e-1")
  device = topologies.devices(topologies.parse(parser.parse_args().topology))[0]
  print("| operation | MB accessed | MFLOP | 1000 cycles |\n|---|---|---|---|")

  def show(name, values):
    print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + " |",
          flush=True)

  found = {}
  for name in augment.NAMES:
    found[name] = costs(name, device)
    show(name, found[name])
  drawn = [sum(found[name][i] for name in policies.RAND_OPS)
           for i in range(3)]
  n, p = POLICY.n_ops, POLICY.prob
  show("drawn, mean of an image", [
      n * (p * v / len(policies.RAND_OPS) + (1 - p) * none)
      for v, none in zip(drawn, found["none"])])
  show("all, for each image", [n * v for v in drawn])


if __name__ == "__main__":
  main()
