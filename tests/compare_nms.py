r"""Compiles forms of non-maximum suppression for a TPU, and prints their costs:

    python tests/compare_nms.py --topology=v5e-1

Of two images, as a chip has them in the published recipes:
- proposals: the best 1000 of five levels of 2000 boxes each;
- detections: the best 100 of 1000 boxes of each of 80 classes.

The package has the forms marked with *. How often a fixed point's loop runs
depends on the boxes: its bytes are counted for as many turns as `turns` finds.
FLOPs are the compiler's, with the body of a loop once. "turns": steps that
wait for each other. Needs libtpu, and no TPU. Not a part of the test suite.
"""

import argparse
import functools
import os
import time

import numpy as np

from metaformer_jax.preflight import topologies

os.environ.update(topologies.ENVIRONMENT)

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from metaformer_jax.ops import anchors, nms
from metaformer_jax.ops import boxes as box_ops
from metaformer_jax.preflight import hlo

N_IMAGES = 2
PROPOSALS, DETECTIONS = (5, 2000, 1000, 0.7), (80, 1000, 100, 0.5)


def covers(boxes, threshold):
  index = jnp.arange(len(boxes))
  overlap = box_ops.iou(boxes, boxes, min_union=nms._TINY)
  return (overlap > nms._at_most(threshold)) & (index[:, None] < index[None])


def until_nothing_changes(covered, is_valid):
  def again(state):
    new = is_valid & ~covered(state[0])
    return new, (new != state[0]).any()
  return lax.while_loop(lambda state: state[1], again,
                        (is_valid, jnp.array(True)))[0]


def computed_again(boxes, is_valid, threshold):
  return until_nothing_changes(
      lambda kept: (covers(boxes, threshold) & kept[:, None]).any(0), is_valid)


def product(boxes, is_valid, threshold):
  matrix = covers(boxes, threshold).astype(jnp.bfloat16)
  return until_nothing_changes(
      lambda kept: jnp.einsum("i,ij->j", kept.astype(jnp.bfloat16), matrix,
                              preferred_element_type=jnp.float32) > 0,
      is_valid)


def one_by_one(boxes, scores, is_valid, n_max, threshold):
  n_groups, n = scores.shape
  labels = jnp.repeat(jnp.arange(n_groups), n)
  return nms.nms(boxes.reshape(-1, 4), scores.reshape(-1), labels,
                 is_valid.reshape(-1), threshold, n_max)


def at_once(kept, is_sorted, boxes, scores, is_valid, n_max, threshold):
  """As `proposals.propose`; boxes that are not sorted are sorted first."""
  order = jnp.zeros(scores.shape, int)
  if not is_sorted:
    scores, order = lax.top_k(jnp.where(is_valid, scores, -1), scores.shape[1])
    boxes = jnp.take_along_axis(boxes, order[..., None], 1)
    is_valid = scores >= 0
  found = jax.vmap(functools.partial(kept, threshold=threshold))(boxes,
                                                                 is_valid)
  scores, index = lax.top_k(jnp.where(found, scores, -1).reshape(-1), n_max)
  return order.reshape(-1)[index], index, scores


FORMS = (
    ("proposals: one by one", PROPOSALS, one_by_one),
    ("proposals: fixed point *", PROPOSALS,
     functools.partial(at_once, nms.kept, True)),
    ("proposals: IoU again in each turn", PROPOSALS,
     functools.partial(at_once, computed_again, True)),
    ("proposals: matrix product", PROPOSALS,
     functools.partial(at_once, product, True)),
    ("detections: one by one *", DETECTIONS, one_by_one),
    ("detections: fixed point", DETECTIONS,
     functools.partial(at_once, nms.kept, False)),
)


def turns():
  """Turns of the fixed point on decoded boxes around objects."""
  rng = np.random.default_rng(0)
  grid = anchors.grid((100, 168), 8, anchors.base(8, 8.0, 1, (0.5, 1.0, 2.0)))
  objects = rng.uniform(0, 1, (30, 2)) * (1344, 800)
  near = np.argsort(np.abs(
      grid.reshape(-1, 2, 2).mean(1)[:, None] - objects).sum(-1).min(1))[:2000]
  deltas = rng.normal(0, 0.1, (2000, 4)).astype(np.float32)
  boxes = box_ops.decode(jnp.asarray(grid[near]), jnp.asarray(deltas))
  matrix = np.asarray(covers(boxes[rng.permutation(2000)], PROPOSALS[3]))
  old, n = None, 0
  new = np.ones(2000, bool)
  while old is None or (new != old).any():
    old, new, n = new, ~(matrix & new[:, None]).any(0), n + 1
  return n


class Module(hlo.Module):
  """Loops without a constant trip count run for as many turns as given."""

  n_turns = 1

  def _trip_count(self, loop):
    found = super()._trip_count(loop)
    return self.n_turns if found == 1 else found


def costs(form, sizes, device):
  """CPU seconds to compile, peak memory and bytes accessed, and FLOPs."""
  groups, n, n_max, threshold = sizes
  shapes = [jax.ShapeDtypeStruct(
      (N_IMAGES, groups, n, *shape), dtype,
      sharding=SingleDeviceSharding(device))
            for shape, dtype in (((4,), jnp.float32), ((), jnp.float32),
                                 ((), jnp.bool_))]
  lowered = jax.jit(jax.vmap(functools.partial(
      form, n_max=n_max, threshold=threshold))).lower(*shapes)
  start = time.process_time()
  compiled = lowered.compile()
  seconds = time.process_time() - start
  counted = compiled.cost_analysis()
  return (seconds, compiled.memory_analysis().peak_memory_in_bytes,
          counted["bytes accessed"] * Module(compiled.as_text()).loop_factor(),
          counted.get("flops", 0))


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument("--topology", default="v5e-1")
  device = topologies.devices(topologies.parse(parser.parse_args().topology))[0]
  Module.n_turns = turns()
  print(f"{Module.n_turns} turns of the fixed point\n")
  print("| form | CPU s to compile | MB peak | MB accessed | MFLOP | turns |")
  print("|---|---|---|---|---|---|")
  for name, sizes, form in FORMS:
    seconds, peak, accessed, flops = costs(form, sizes, device)
    steps = sizes[2] if form is one_by_one else Module.n_turns
    print(f"| {name} | {seconds:.0f} | {peak / 1e6:.0f} | "
          f"{accessed / 1e6:.0f} | {flops / 1e6:.0f} | {steps} |", flush=True)


if __name__ == "__main__":
  main()
