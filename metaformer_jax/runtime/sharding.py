"""Placement of arrays on a mesh of devices with the axes `data` and `fsdp`.

The batch is split over both axes. Parameters, and arrays of their shapes, are
copied along `data` and, if large enough, split along `fsdp` (fully sharded data
parallelism). Models do not depend on it.
"""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metaformer_jax import errors
from metaformer_jax.config import globs, schema

BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()


def put_batch(batch, mesh: Mesh):
  """Turns this process's part of a batch into arrays of the global batch."""
  sharding = NamedSharding(mesh, BATCH)
  # Needed with several processes.
  with jax.transfer_guard_host_to_device("allow"):
    return {name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, REPLICATED)


def path_name(path) -> str:
  """A leaf's path as "stage1/block1/mlp/fc1/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(mesh: Mesh, abstract_state, cfg: schema.Mesh):
  """A NamedSharding for each array of the state.

  An array with at least `cfg.min_size` values is split along its largest axis
  that is divisible by `fsdp`. A rule of `cfg.rules` selects another axis (-1:
  none) for the parameters that its pattern matches (`config.globs`).

  Raises:
    ConfigError: a rule matches no parameter, or its axis cannot be split.
  """
  names = {path_name(path) for path, _ in
           jax.tree_util.tree_leaves_with_path(abstract_state.params)}
  rules = [(rule, {*globs.matching(rule[0], sorted(names),
                                   "config.mesh.rules")})
           for rule in cfg.rules]
  fsdp = mesh.shape["fsdp"]

  def spec(path, array):
    # Arrays of the optimizer are placed like their parameter; its path is the
    # end of theirs.
    parts = path_name(path).split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    name = next((tail for tail in tails if tail in names), "")
    rule = next((rule for rule, found in rules if name in found), None)
    if rule and array.ndim:
      axis = rule[1]
      if axis == -1:
        return REPLICATED
      if axis >= array.ndim or array.shape[axis] % fsdp:
        raise errors.ConfigError(
            f"config.mesh.rules: {rule[0]!r} splits axis {axis} of {name}, "
            f"shape {array.shape}, among {fsdp} devices")
    elif fsdp == 1 or array.size < cfg.min_size:
      return REPLICATED
    else:
      axes = [i for i, size in enumerate(array.shape) if size % fsdp == 0]
      if not axes:
        return REPLICATED
      axis = max(axes, key=lambda i: array.shape[i])
    return PartitionSpec(*(None,) * axis, "fsdp")

  return jax.tree_util.tree_map_with_path(
      lambda path, array: NamedSharding(mesh, spec(path, array)),
      abstract_state)


def abstract(tree, shardings):
  """A tree's shapes, dtypes and placement, as a restore needs them."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree, shardings)


def n_bytes(tree) -> int:
  """Size of a tree of arrays, or of their shapes."""
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))
