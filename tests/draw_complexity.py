"""Draws what a token mixer costs as images grow, compiled for a TPU:

    pip install -e '.[tpu]'
    python tests/draw_complexity.py docs/complexity.png --topology=v5e-1

A block of the third stage of PoolFormer-S12 (320 channels, a token for 16 x 16
pixels), forward and backward in bfloat16, with each of three mixers: GFLOP of
matrix products (`models.cost`), and MB by the TPU's compiler, of an image.
Nothing is run. The table that it prints has the slopes between sizes: 1 is
linear in the number of tokens.
"""

import argparse
import functools
import os

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)  # Before jax is imported.

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from matplotlib import figure

from metaformer_jax.models import cost, metaformer, mixers
from metaformer_jax.preflight import compilation, hlo

MIXERS = {"pooling": mixers.Pooling, "attention": mixers.Attention,
          "spatial FC": mixers.SpatialFc}
SIZES = (224, 320, 448, 640, 768, 1024)
STRIDE, DIM, N_IMAGES = 16, 320, 8


def compiled(name: str, size: int, device) -> tuple[float, float]:
  """(GFLOP, MB) of an image: a block with the mixer, forward and backward."""
  block = metaformer.MetaFormerBlock(
      dim=DIM, token_mixer=MIXERS[name], layer_scale_init=1e-5,
      dtype=jnp.bfloat16)
  side = size // STRIDE
  here = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())
  x = jax.ShapeDtypeStruct((N_IMAGES, side, side, DIM), jnp.bfloat16,
                           sharding=here)
  variables = jax.tree.map(
      lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here),
      jax.eval_shape(functools.partial(block.init, jax.random.key(0)), x))

  def gradients(variables, x, dy):
    return jax.vjp(functools.partial(block.apply, train=True),
                   variables, x)[1](dy)

  program = jax.jit(gradients).lower(variables, x, x).compile()
  n_bytes = compilation.bytes_accessed(program, hlo.Module(program.as_text()))
  macs = cost.count_macs(gradients, variables, x, x)
  return 2 * macs / N_IMAGES / 1e9, n_bytes / N_IMAGES / 1e6


def draw(path: str, costs: dict[str, np.ndarray], chip: str) -> None:
  """Two plots over the number of tokens, both axes logarithmic."""
  tokens = [(size // STRIDE) ** 2 for size in SIZES]
  page = figure.Figure(figsize=(9, 4), layout="constrained")
  for i, (axes, unit) in enumerate(zip(page.subplots(1, 2), ("GFLOP", "MB"))):
    for name, values in costs.items():
      axes.loglog(tokens, values[:, i], marker="o", label=name)
    axes.set(xlabel="tokens (side of the image in pixels)",
             ylabel=f"{unit} of an image")
    axes.set_xticks(tokens, [f"{n}\n({size})" for n, size in zip(
        tokens, SIZES)], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  page.suptitle("A block of 320 channels, forward and backward, "
                f"compiled for a {chip}")
  page.savefig(path, dpi=120)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("output")
  parser.add_argument("--topology", default="v5e-1")
  args = parser.parse_args()
  target = topologies.parse(args.topology)
  device, *_ = topologies.devices(target)
  costs, tokens = {}, np.log([(size // STRIDE) ** 2 for size in SIZES])
  for name in MIXERS:
    costs[name] = np.array([compiled(name, size, device) for size in SIZES])
    for size, (flops, moved) in zip(SIZES, costs[name]):
      print(f"| {name} | {size} | {flops:.2f} | {moved:.1f} |", flush=True)
    slopes = np.diff(np.log(costs[name]), axis=0) / np.diff(tokens)[:, None]
    print(name, "slopes of GFLOP and MB:", *slopes.round(2).tolist())
  draw(args.output, costs, target.generation)


if __name__ == "__main__":
  main()
