"""Compares forms of RoIAlign by the TPU's compiler:

    pip install -e '.[tpu]'
    python tests/compare_roi_align.py --topology=v5e-1 --forms chunks gather

compiles each for one chip, without a TPU, and prints a table. The sizes are
those of Mask R-CNN on COCO: canvases of 800 x 1344 pixels, four levels of 256
channels in bfloat16, two images. A row takes a minute or two, and the gradient
of the gather six.

The package has the form "chunks". The others are:
- "at once": the same products, of all boxes together;
- "levels apart": the same, with the weights of each level computed for itself;
- "gather": the four neighbours of 2 x 2 samples of each bin, as with
  sampling_ratio=2; with more samples, it is as many times larger.
"""

import argparse
import functools
import os
import re
import time

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)  # Before jax is imported.

import jax
import jax.numpy as jnp
import numpy as np

from metaformer_jax.models import cost
from metaformer_jax.ops import roi_align
from metaformer_jax.preflight import hlo

HEIGHT, WIDTH, DIM, N_IMAGES = 800, 1344, 256, 2
STRIDES = (4, 8, 16, 32)
# Boxes, bins along an axis, and whether the gradient is needed.
SIZES = {"training, boxes": (512, 7, True), "training, masks": (128, 14, True),
         "evaluation, boxes": (1000, 7, False)}
# An array in the chip's own memory, with its layout.
_ON_CHIP = re.compile(r"\w+\[[\d,]*\]\{[^{}]*S\(1\)[^{}]*\}")


def at_once(maps, sizes, strides, boxes, is_box, out):
  boxes = jnp.where(is_box[:, None], boxes, 0)
  return roi_align._align(maps, sizes, strides, boxes, out)


def levels_apart(maps, sizes, strides, boxes, is_box, out):
  level = roi_align.levels(boxes, len(maps))
  total = jnp.zeros((), jnp.float32)
  for i, (x, size, stride) in enumerate(zip(maps, sizes, strides)):
    own = jnp.where((is_box & (level == i))[:, None], boxes, 0) / stride
    rows, columns = (
        roi_align.bin_weights(own[:, a] - 0.5, own[:, a + 2] - own[:, a],
                              size[1 - a], out, x.shape[1 - a]) for a in (1, 0))
    total += roi_align._average(x, rows, columns)
  return total.astype(maps[0].dtype)


def gather(maps, sizes, strides, boxes, is_box, out, n_samples=2):
  """All maps as one table of pixels, of which each sample takes four."""
  level = roi_align.levels(boxes, len(maps))
  widths = jnp.array([x.shape[1] for x in maps])[level]
  first = np.cumsum([0, *(x.shape[0] * x.shape[1] for x in maps[:-1])])
  boxes = boxes / jnp.array(strides, jnp.float32)[level][:, None] - 0.5
  n = out * n_samples

  def neighbours(axis):
    low, side = boxes[:, axis], boxes[:, axis + 2] - boxes[:, axis]
    size = sizes[level, 1 - axis][:, None]
    position = low[:, None] + side[:, None] * (jnp.arange(n) + 0.5)[None] / n
    exists = (position >= -1) & (position <= size) & is_box[:, None]
    position = jnp.clip(position, 0, size - 1)
    pixel = jnp.floor(position).astype(jnp.int32)
    part = position - pixel
    weights = jnp.stack([1 - part, part], -1) * exists[..., None] / n_samples
    pixels = jnp.stack([pixel, jnp.minimum(pixel + 1, size - 1)], -1)
    return (pixels.reshape(-1, 2 * n),
            weights.reshape(-1, out, 2 * n_samples).astype(maps[0].dtype))

  (y, rows), (x, columns) = neighbours(1), neighbours(0)
  pixel = (jnp.array(first)[level][:, None, None]
           + y[:, :, None] * widths[:, None, None] + x[:, None])
  values = jnp.concatenate([m.reshape(-1, DIM) for m in maps])[pixel]
  values = values.reshape(-1, *rows.shape[1:], *columns.shape[1:], DIM)
  return jnp.einsum("rpi,rqj,rpiqjc->rpqc", rows, columns, values,
                    preferred_element_type=jnp.float32).astype(values.dtype)


FORMS = {"chunks": roi_align.roi_align, "at once": at_once,
         "levels apart": levels_apart, "gather": gather}


def program(form, n_boxes, out, with_gradient, device):
  """The function, or its gradient, and its abstract arguments."""
  on = functools.partial(jax.ShapeDtypeStruct,
                         sharding=jax.sharding.SingleDeviceSharding(device))
  maps = [on((N_IMAGES, HEIGHT // s, WIDTH // s, DIM), jnp.bfloat16)
          for s in STRIDES]
  arguments = (on((N_IMAGES, len(maps), 2), jnp.int32),
               on((N_IMAGES, n_boxes, 4), jnp.float32),
               on((N_IMAGES, n_boxes), jnp.bool_))
  cotangent = on((N_IMAGES, n_boxes, out, out, DIM), jnp.bfloat16)

  def forward(maps, sizes, boxes, is_box):
    return jax.vmap(lambda maps, sizes, boxes, is_box: form(
        maps, sizes, STRIDES, boxes, is_box, out))(maps, sizes, boxes, is_box)

  def gradient(maps, cotangent, *others):
    return jax.vjp(lambda maps: forward(maps, *others), maps)[1](cotangent)

  if with_gradient:
    return gradient, (maps, cotangent, *arguments)
  return forward, (maps, *arguments)


def main_memory(module):
  """Bytes moved to and from the main memory, counting slices as the whole."""
  total = 0
  for i, operands, turns, _ in module.moves():
    # The type of what is started names the operand as well.
    types = [i.type] if i.opcode.endswith("-start") else [i.type, *operands]
    total += turns * sum(hlo.type_bytes(_ON_CHIP.sub("", t)) for t in types)
  return total


def row(name, n_boxes, out, with_gradient, device):
  """Compiles a form; the values of the table's columns."""
  function, arguments = program(FORMS[name], n_boxes, out, False, device)
  macs = cost.count_macs(function, *arguments)
  if with_gradient:  # As traced, it computes the features as well.
    function, arguments = program(FORMS[name], n_boxes, out, True, device)
    macs = cost.count_macs(function, *arguments) - macs
  start = time.monotonic()
  compiled = jax.jit(function).lower(*arguments).compile()
  seconds = time.monotonic() - start
  memory, module = compiled.memory_analysis(), hlo.Module(compiled.as_text())
  accessed = compiled.cost_analysis()["bytes accessed"] * module.loop_factor()
  return (f"{2e-9 * macs:.1f}", f"{1e-9 * accessed:.1f}",
          f"{1e-9 * main_memory(module):.1f}",
          f"{memory.peak_memory_in_bytes / 2**20:.0f}",
          f"{memory.generated_code_size_in_bytes / 2**20:.1f}",
          f"{seconds:.0f}")


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--topology", default="v5e-1")
  parser.add_argument("--forms", nargs="*", default=FORMS, choices=FORMS)
  parser.add_argument("--sizes", nargs="*", default=SIZES, choices=SIZES)
  flags = parser.parse_args()
  device = topologies.devices(topologies.parse(flags.topology))[0]
  print("| of | form | GFLOP | GB accessed | in main memory | peak MiB | "
        "program MiB | compiled in s |\n|---|---|" + 6 * "--:|")
  for size in flags.sizes:
    n_boxes, out, is_trained = SIZES[size]
    for with_gradient in (False, True)[:1 + is_trained]:
      what = size + ", gradient" * with_gradient
      for name in flags.forms:
        values = row(name, n_boxes, out, with_gradient, device)
        print("|", " | ".join((what, name, *values)), "|", flush=True)


if __name__ == "__main__":
  main()
