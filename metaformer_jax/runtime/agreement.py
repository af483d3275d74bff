"""What all processes of a run must have in common, as facts to compare.

Each function gives JSON values by what they are, for `processes.require_same`:
the experiment but for `saved.PER_HOST`, the code and the libraries, the options
of jax that change a program, and the devices.
"""

import hashlib
import os
import pathlib
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np

from metaformer_jax.config import comparison, own, saved
from metaformer_jax.config.schema import Experiment

_PACKAGE = pathlib.Path(__file__).parents[1]

# What the numbers, the order of the data and the files of a run come from.
_LIBRARIES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin",
              "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
              "pillow", "numba")

# They change what is compiled, or which devices are used.
_OPTIONS = ("jax_platforms", "jax_enable_x64", "jax_default_matmul_precision",
            "jax_default_prng_impl", "jax_threefry_partitionable",
            "jax_disable_jit", "jax_numpy_dtype_promotion")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def of_program() -> dict[str, Any]:
  """The code of this package, the libraries, and jax's options."""
  python = ".".join(platform.python_version_tuple()[:2])
  return {
      "version of Python": python,
      **{f"version of {name}": _version(name) for name in _LIBRARIES},
      **{f"option {name}": str(jax.config.values.get(name))
         for name in _OPTIONS},
      **{f"environment's {name}": os.environ.get(name) for name in _VARIABLES},
      **{f"code of {path.relative_to(_PACKAGE.parent).as_posix()}":
         _digest(path.read_bytes()) for path in sorted(_PACKAGE.rglob("*.py"))}}


def of_experiment(cfg: Experiment) -> dict[str, Any]:
  """The experiment, and the user's own modules as far as they are imported."""
  return {
      **{f"config.{key}": value
         for key, value in saved.of_all_hosts(cfg).items()},
      **{f"code of the module {name}": comparison.DIGEST + digest
         for name, digest in own.digests(cfg).items()}}


def of_devices(local: Sequence[jax.Device]) -> dict[str, Any]:
  """Number and kind of a process's devices."""
  return {"number of devices": len(local),
          "kind of the devices": sorted({d.device_kind for d in local})}


def of_arrays(tree: Any) -> str:
  """A digest of a tree of arrays on the host: names, types and values."""
  found = hashlib.sha256()
  for path, array in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(array)
    found.update(f"{path}{array.dtype}{array.shape}".encode())
    found.update(array.view(np.uint8))
  return comparison.DIGEST + found.hexdigest()


def _version(library: str) -> str | None:
  try:
    return metadata.version(library)
  except metadata.PackageNotFoundError:
    return None


def _digest(data: bytes) -> str:
  return f"{comparison.DIGEST}{hashlib.sha256(data).hexdigest()[:16]}"
