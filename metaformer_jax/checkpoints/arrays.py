"""Trees of arrays in the folder of a step; all calls of Orbax are here.

A step is saved as separate items, so that variables and their moving averages
can be read without the optimizer's state, which is larger.
"""

import collections
import glob
import json
import logging
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from metaformer_jax import errors, storage
from metaformer_jax.checkpoints import manifest
from metaformer_jax.runtime import sharding

# The items of a step: trees of arrays, those that are not empty.
_ITEMS = ("params", "model_state", "opt_state", "ema_params", "ema_state")
Trees = Mapping[str, Any]

# Weights take about the memory of their files; 256 MiB may be all zeros.
_MAX_EXPANSION, _ALWAYS_READ = 20, 2**28

# Orbax warns when single items are read, and about the handler below; its
# threads log tracebacks of failures that are raised here as well.
_EXPECTED = ("Metadata file does not exist", "_SignalingThread.run() raised",
             "Handler Commit operations or the Commit",
             "Failed to write metadata", "overriding jax.Array")
logging.getLogger("absl").addFilter(
    lambda record: not any(s in record.getMessage() for s in _EXPECTED))

# By default each copy of an array writes a part of it, for which Orbax compiles
# a program per part: for arrays as small as these, far slower than letting one
# copy write everything.
ocp.type_handlers.register_type_handler(
    jax.Array, ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**24), override=True)


class _Path(type(epath.Path())):
  """A path that is no pattern: Orbax looks for files by `glob`.

  With [ ] * ? in the path of a workdir it would find none, and leave out what
  the processes have written, without an error.
  """

  def glob(self, pattern: str) -> Iterator["_Path"]:
    return (self / name for name in glob.glob(pattern, root_dir=self))


def copied(trees: Trees) -> Trees:
  """The values of some trees in the memory of this host, for `Store.save`.

  An array of which other processes hold parts stays one, of this process's
  parts; of any other array there is one copy for all devices.
  """
  def start(x):
    if not (x.is_fully_addressable or x.is_fully_replicated):
      return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
    x.copy_to_host_async()
    return x

  def finish(x):
    return x if x.sharding.memory_kind == "pinned_host" else np.asarray(x)

  return jax.tree.map(
      finish, jax.block_until_ready(jax.tree.map(start, trees)))


class Store:
  """Writes steps in the background, and reads them."""

  def __init__(self):
    # No folder is renamed, on no file system.
    in_place = ocp.options.AtomicityOptions(
        mode=ocp.options.AtomicityMode.COMMIT_FILE)
    # With their names, the processes meet by jax's coordination service, which
    # any thread may use, and not by a program on their devices.
    processes = ocp.options.MultiprocessingOptions(
        active_processes=set(range(jax.process_count())))
    self._orbax = ocp.AsyncCheckpointer(
        ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(
                multiprocessing_options=processes, atomicity_options=in_place),
            **{name: ocp.StandardCheckpointHandler(
                multiprocessing_options=processes) for name in _ITEMS}),
        multiprocessing_options=processes, atomicity_options=in_place)

  def save(self, folder: pathlib.Path, trees: Trees) -> None:
    """Starts to save; returns once the arrays are copied off the devices."""
    folder = folder if storage.is_remote(folder) else _Path(folder)
    self._orbax.save(folder, force=True, args=ocp.args.Composite(
        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()}))

  def wait(self) -> None:
    """Waits until every process has written; raises what has failed."""
    self._orbax.wait_until_finished()

  def restore(self, folder: pathlib.Path,
              abstract_trees: Trees) -> dict[str, Any]:
    """Reads the items of a step that are wanted, onto their devices."""
    return dict(self._orbax.restore(folder, args=ocp.args.Composite(
        **{name: ocp.args.StandardRestore(tree)
           for name, tree in abstract_trees.items()})).items())

  def close(self) -> None:
    """Ends the threads."""
    self._orbax.close()


def read(folder: pathlib.Path, n_bytes: int) -> Any:
  """Reads one item of a step as numpy arrays.

  Args:
    folder: of the item.
    n_bytes: of the step's files.

  Raises:
    Exception: of many types; it cannot be read.
  """
  reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  tree = reader.metadata(folder).item_metadata.tree
  _require_plausible(tree, n_bytes)
  as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
  return reader.restore(folder, args=ocp.args.PyTreeRestore(
      restore_args=as_numpy))


def _require_plausible(tree: Any, n_bytes: int) -> None:
  """Raises ValueError if arrays take far more memory than the step's files.

  Zeros are compressed well, so that forged arrays could have any size.
  """
  needed = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize
               for x in jax.tree.leaves(tree))
  if needed > max(_MAX_EXPANSION * n_bytes, _ALWAYS_READ):
    raise ValueError(f"its arrays have {needed:,} bytes, more than "
                     f"{_MAX_EXPANSION} times its files")


def described(tree: Any) -> dict[str, str]:
  """Name -> "dtype[shape]" for every array of a tree, or its metadata."""
  return {
      sharding.path_name(path): f"{x.dtype}{list(x.shape)}"
      for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def require_same(folder: pathlib.Path, have: Mapping[str, str],
                 abstract_trees: Trees) -> None:
  """Raises ConfigError that lists every array that differs."""
  items = {name.partition("/")[0] for name in have}
  problems = [f"{item} is missing" for item in abstract_trees.keys() - items]
  shared = items & abstract_trees.keys()
  want = described({item: abstract_trees[item] for item in shared})
  have = {name: array for name, array in have.items()
          if name.partition("/")[0] in shared}
  problems += [f"{name} is missing" for name in want.keys() - have]
  problems += [f"{name} is not in the model"
               for name in have.keys() - want]
  problems += [f"{name} is {have[name]}, not {want[name]}"
               for name in have.keys() & want if have[name] != want[name]]
  if problems:
    raise errors.ConfigError(
        f"{folder}: cannot be restored into this experiment: "
        f"{'; '.join(sorted(problems))}")


def require(folder: pathlib.Path, tree: Mapping[str, str]) -> None:
  """Opens a step as a restore does, but reads no values.

  Orbax's own `metadata` takes longer than the checksums of all files.

  Args:
    folder: of the step.
    tree: what it must have, as `described` gives it.

  Raises:
    DamagedError: a restore would not find an array, or a part of it.
  """
  found = {}
  try:
    for item in sorted({name.partition("/")[0] for name in tree}):
      found |= {f"{item}/{name}": array
                for name, array in _stored(folder / item).items()}
  except Exception as e:  # TensorStore and JSON raise many types.
    if storage.is_unavailable(e):
      raise
    raise manifest.DamagedError(
        f"{item} cannot be opened again: {errors.one_line(e)}") from e
  for name, array in tree.items():
    if found.get(name) != array:
      raise manifest.DamagedError(
          f"{name} was saved as {array}, and is {found.get(name, 'missing')}")


def _key_values(folder: pathlib.Path) -> dict[str, Any]:
  """A folder as TensorStore names it."""
  if not storage.is_remote(folder):
    return {"driver": "file", "path": f"{folder}/"}
  bucket, _, name = str(folder).removeprefix(storage.SCHEME).partition("/")
  return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


def _stored(item: pathlib.Path) -> dict[str, str]:
  """What `described` gives for the arrays that a restore finds in an item.

  Their names are in a file; their metadata and their chunks are in a database
  that the first process merges from what each one has written.
  """
  entries = json.loads((item / "_METADATA").read_bytes())["tree_metadata"]
  now = time.time()  # What is read from then on is not asked for again.
  database = tensorstore.KvStore.open({
      "driver": "ocdbt", "cache_pool": {"total_bytes_limit": 2**24},
      "base": _key_values(item)}).result()
  n_keys = collections.Counter(
      key.rpartition(b"/")[0].decode() for key in database.list().result())
  found = {}
  for entry in entries.values():
    names = [str(part["key"]) for part in entry["key_metadata"]]
    stored = ".".join(names)
    if not n_keys[stored]:  # Or there is nothing to store, as for {}.
      continue
    array = json.loads(database.read(
        f"{stored}/.zarray", staleness_bound=now).result().value)
    n_chunks = math.prod(
        -(-size // chunk) for size, chunk
        in zip(array["shape"], array["chunks"], strict=True))
    found["/".join(names)] = (
        f"{np.dtype(array['dtype'])}{array['shape']}"
        if n_keys[stored] == 1 + n_chunks else
        f"only {n_keys[stored] - 1} of {n_chunks} chunks")
  return found
