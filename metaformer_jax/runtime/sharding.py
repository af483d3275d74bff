"""Where arrays live: a mesh of devices with axes `data` and `fsdp`.

The batch is split over both axes. Parameters, and what has their shapes, are
copied along `data` and, where large enough, split along `fsdp` (fully sharded
data parallelism). Models know nothing of it.
"""

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from metaformer_jax import errors
from metaformer_jax.config import checks, schema

BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()


def make_mesh(cfg: schema.Experiment,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh that the config asks for.

  Args:
    cfg: the experiment.
    devices: of which it is made; by default those there are.

  Raises:
    ConfigError: the axes do not fit the devices, or the batch not the axes.
  """
  devices = jax.devices() if devices is None else devices
  n = len(devices)
  n_processes = len({device.process_index for device in devices})
  data, fsdp = cfg.mesh.data, cfg.mesh.fsdp
  if data == -1:
    data = max(1, n // fsdp)
  if fsdp == -1:
    fsdp = max(1, n // data)
  if data * fsdp > n or (data * fsdp < n and (
      -1 in (cfg.mesh.data, cfg.mesh.fsdp) or n_processes > 1)):
    raise errors.ConfigError(
        f"config.mesh: data x fsdp = {cfg.mesh.data} x {cfg.mesh.fsdp} does "
        f"not fit {n} devices; choose sizes with that product")
  problems = list(checks.check_batch(cfg, data * fsdp))
  if problems:
    raise errors.ConfigError("; also ".join(problems))
  return jax.make_mesh((data, fsdp), ("data", "fsdp"),
                       axis_types=(AxisType.Auto,) * 2,
                       devices=devices[:data * fsdp])


def put_batch(batch, mesh: Mesh):
  """This process's part of a batch -> arrays of the global batch."""
  sharding = NamedSharding(mesh, BATCH)
  with jax.transfer_guard_host_to_device("allow"):  # With others, it is needed.
    return {name: jax.make_array_from_process_local_data(sharding, value)
            for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, REPLICATED)


def path_name(path) -> str:
  """A leaf's path as "stage1/block1/mlp/fc1/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def state_shardings(mesh: Mesh, abstract_state, cfg: schema.Mesh):
  """A NamedSharding for each array of the state.

  An array is split along its largest axis that `fsdp` divides, unless it has
  fewer than `cfg.min_size` values, or one of `cfg.rules` names another axis
  (-1: none) for the parameters whose path its regular expression finds.

  Raises:
    ConfigError: a rule finds no parameter, or an axis that cannot be split.
  """
  names = {path_name(path) for path, _ in
           jax.tree_util.tree_leaves_with_path(abstract_state.params)}
  for pattern, _ in cfg.rules:
    if not any(re.search(pattern, name) for name in names):
      raise errors.ConfigError(
          f"config.mesh.rules: {pattern!r} finds no parameter"
          f"{errors.did_you_mean(pattern, names)}")
  fsdp = mesh.shape["fsdp"]

  def spec(path, array):
    # The optimizer's arrays go where their parameter goes, whose path ends
    # theirs.
    parts = path_name(path).split("/")
    tails = ("/".join(parts[i:]) for i in range(len(parts)))
    name = next((tail for tail in tails if tail in names), "")
    rule = name and next((r for r in cfg.rules if re.search(r[0], name)), None)
    if rule and array.ndim:
      axis = rule[1]
      if axis == -1:
        return REPLICATED
      if axis >= array.ndim or array.shape[axis] % fsdp:
        raise errors.ConfigError(
            f"config.mesh.rules: {rule[0]!r} splits axis {axis} of {name}, "
            f"whose shape is {array.shape}, among {fsdp} devices")
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
  """Shapes, dtypes and places of a tree: what a restore fills."""
  return jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      tree, shardings)


def n_bytes(tree) -> int:
  """Size of a tree of arrays, or of their shapes."""
  return sum(int(np.prod(x.shape)) * x.dtype.itemsize
             for x in jax.tree.leaves(tree))
