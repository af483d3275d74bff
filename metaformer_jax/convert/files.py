"""Reads files of weights in any format, and writes safetensors."""

import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from metaformer_jax import errors
from metaformer_jax.config import tensor_files
from metaformer_jax.convert import pickles
from metaformer_jax.convert.pickles import one_line

_LOG = logging.getLogger(__name__)

# Keys under which training scripts save the weights. The first that has tensors
# is read: the moving average comes before the last step's weights, as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# Prefixes that DistributedDataParallel and torch.compile add to every name.
_PREFIXES = ("module.", "_orig_mod.")

# Files that are mistaken for weights, by their first bytes.
_MISTAKEN = {
    b"<": "is a web page, not weights: the download failed; open the address "
          "in a browser",
    b"version https://git-lfs": "is a pointer of git-LFS: run git lfs pull",
    b"\x1f\x8b": "is compressed: unpack it with gunzip",
    b"BZh": "is compressed: unpack it with bunzip2",
    b"\xfd7zXZ": "is compressed: unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it with unzstd",
    b"\x89HDF": "is of the HDF5 format: save the weights as safetensors",
    b"\x93NUMPY": "is a NumPy array: save the weights as safetensors",
}

# Dtypes of safetensors that stand for numbers only together with scales.
_UNREAD = ("F8_", "F6_", "F4")


class _Unread(NamedTuple):
  """A tensor of a dtype of `_UNREAD`."""

  dtype: str


def read_tensors(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Returns the named tensors of a safetensors file or PyTorch checkpoint.

  The content decides the format, not the suffix. From a checkpoint that holds
  more than weights, the weights are taken, preferably the moving average.
  Prefixes that module wrappers add to all names are removed. Floating-point
  values become float32; others keep their dtype.

  Raises:
    WeightsError: one line that says what to do, or lists what is wrong with the
      tensors: unsupported dtypes, NaN or infinite values, overflow of float32.
  """
  path = pathlib.Path(path)
  return _usable(path, _unwrap(path, _read(path)))


def read_shards(where: Mapping[str, pathlib.Path]) -> dict[str, np.ndarray]:
  """Returns the tensors of several files, as `read_tensors` one's.

  Args:
    where: the file of each tensor, as an index tells. It must name all that the
      files have.

  Raises:
    WeightsError: as `read_tensors`; or a tensor is not in the file that the
      index says, or in another one, too.
  """
  tensors, problems = {}, []
  for path in dict.fromkeys(where.values()):
    found = _unwrap(path, _read(path))
    named = {name for name, place in where.items() if place == path}
    problems += [f"{path.name} has no {name}" for name in
                 sorted(named - found.keys())]
    problems += [f"{path.name} has {_shown(name)}, which the index does not say"
                 for name in found if name not in named]
    tensors |= {name: found[name] for name in named & found.keys()}
  folder = next(iter(where.values())).parent
  if problems:
    raise errors.WeightsError(one_line(
        folder, f"its files are not those of its index: {'; '.join(problems)}"))
  return _usable(folder, tensors)


def _usable(path: pathlib.Path,
            content: dict[Any, Any]) -> dict[str, np.ndarray]:
  """The tensors of a state dict for the conversion; see `read_tensors`."""
  tensors = _strip(content)
  problems, result = [], {}
  for name, value in tensors.items():
    try:
      result[name] = _checked(name, value)
    except ValueError as error:
      problems.append(f"{_shown(name)} {error}")
  if problems:
    raise errors.WeightsError(one_line(
        path, f"cannot be used: {', '.join(problems)}"))
  return result


def write_safetensors(path: str | pathlib.Path,
                      tensors: Mapping[str, np.ndarray],
                      metadata: Mapping[str, str]) -> None:
  """Writes a file atomically: it is complete or absent.

  The same tensors and metadata, in any order, give the same bytes.

  Raises:
    WeightsError: the file cannot be written; an existing one is unchanged.
  """
  path = pathlib.Path(path)
  encoded = memoryview(safetensors.numpy.save(
      {name: np.array(value, order="C") for name, value in tensors.items()},
      dict(metadata)))
  # The library writes metadata in an order that varies between runs.
  size = int.from_bytes(encoded[:8], "little")
  fields = json.loads(bytes(encoded[8:8 + size]))
  fields["__metadata__"] = dict(sorted(metadata.items()))
  header = json.dumps(fields).encode()
  header += b" " * (-len(header) % 8)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    try:
      with open(partial, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(encoded[8 + size:])
        file.flush()
        os.fsync(file.fileno())
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)
  except OSError as error:
    raise errors.WeightsError(one_line(
        path, f"cannot be written: {error.strerror or error}")) from error


def check_new(path: pathlib.Path) -> None:
  """Raises WeightsError if something is in the way of a new folder."""
  try:
    is_used = path.exists() and (not path.is_dir() or any(path.iterdir()))
  except OSError as error:
    raise errors.WeightsError(one_line(path, error.strerror)) from error
  if is_used:
    raise errors.WeightsError(one_line(
        path, "exists and is not an empty folder; name a new one"))


def write_folder(path: str | pathlib.Path, name: str,
                 tensors: Mapping[str, np.ndarray],
                 metadata: Mapping[str, str], texts: Mapping[str, str]) -> None:
  """Writes a folder atomically: it has all its files or does not exist.

  Args:
    path: of the folder; it must not exist, or be empty.
    name: of the safetensors file in it.
    tensors, metadata: of that file.
    texts: the other files, by their names.

  Raises:
    WeightsError: as `check_new`; or the folder cannot be written.
  """
  path = pathlib.Path(path).absolute()
  check_new(path)
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    try:
      partial.mkdir()
      write_safetensors(partial / name, tensors, metadata)
      for file, text in texts.items():
        with open(partial / file, "w", encoding="utf-8") as f:
          f.write(text)
          f.flush()
          os.fsync(f.fileno())
      os.replace(partial, path)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
  except OSError as error:
    raise errors.WeightsError(one_line(
        path, f"cannot be written: {error.strerror or error}")) from error


def _read(path: pathlib.Path) -> Any:
  """Returns the file's content, by the format of its first bytes."""
  try:
    if path.is_dir():
      raise errors.WeightsError(one_line(
          path, "is a folder; name a file of weights"
          + errors.did_you_mean(path.name, _names(path))))
    if path.exists() and not path.is_file():  # Reading a pipe would block.
      raise errors.WeightsError(one_line(path, "is a pipe or a device"))
    with open(path, "rb") as file:
      head = file.read(512)
  except FileNotFoundError as error:
    raise errors.WeightsError(one_line(
        path, "does not exist"
        + errors.did_you_mean(path.name, _names(path.parent)))) from error
  except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
    raise errors.WeightsError(one_line(
        path, "cannot be read: "
        f"{getattr(error, 'strerror', None) or error}")) from error
  if not head:
    raise errors.WeightsError(one_line(
        path, "is empty; download or save it again"))
  # Checked first, as the first bytes are the header's length: any value up to
  # 100 MB.
  if head[4:9] == b"\0\0\0\0{":
    return _read_safetensors(path)
  for start, message in _MISTAKEN.items():
    if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start):
      raise errors.WeightsError(one_line(path, message))
  if head[257:262] == b"ustar":
    raise errors.WeightsError(one_line(
        path, "is a tar archive: unpack it, and name the file of weights in it"
    ))
  if head.startswith((b"PK", b"\x80")):
    return pickles.read(path)
  raise errors.WeightsError(one_line(
      path, "is neither a safetensors file nor a PyTorch checkpoint"))


def _names(folder: pathlib.Path) -> list[str]:
  try:
    return [path.name for path in folder.iterdir()]
  except OSError:
    return []


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    with tensor_files.opened(path) as file:
      return {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
  except Exception as error:  # The library's errors have no common base.
    raise errors.WeightsError(one_line(
        path, "is a damaged safetensors file: download or save it again "
        f"({type(error).__name__}: {error})")) from error


def _tensor(file: Any, name: str) -> np.ndarray | _Unread:
  dtype = file.get_slice(name).get_dtype()
  return (_Unread(dtype) if dtype.startswith(_UNREAD) else
          file.get_tensor(name))


def _unwrap(path: pathlib.Path, content: Any) -> dict[Any, Any]:
  """Returns the state dict: the content itself or one of its items."""
  if not isinstance(content, dict):
    raise errors.WeightsError(one_line(
        path, f"holds a {_type(content)}, not a state dict; save its "
        "state_dict"))
  for key in _WRAPPERS:
    if _is_state_dict(content.get(key)):
      _LOG.info("%s: the weights are those of %r", path, key)
      return content[key]
  if _is_state_dict(content):
    return content
  raise errors.WeightsError(one_line(
      path, "has no state dict at the top level or under the keys "
      f"{', '.join(_WRAPPERS)}; its keys: "
      f"{', '.join(map(_shown, content)) or 'none'}"))


def _is_state_dict(value: Any) -> bool:
  return isinstance(value, dict) and any(
      isinstance(item, np.ndarray | _Unread) for item in value.values())


def _strip(tensors: dict[Any, Any]) -> dict[Any, Any]:
  """Removes prefixes that all names have."""
  tensors = {k: v for k, v in tensors.items() if k != "_metadata"}
  while tensors and (prefix := next((p for p in _PREFIXES if all(
      isinstance(k, str) and k.startswith(p) for k in tensors)), None)):
    tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
  return tensors


def _checked(name: Any, value: Any) -> np.ndarray:
  """Returns a tensor for the conversion; ValueError says why it is unusable."""
  if not isinstance(name, str):
    raise ValueError("(names must be strings)")
  if type(value) is int and name.endswith("num_batches_tracked"):
    value = np.array(value)
  if isinstance(value, _Unread):
    raise ValueError(f"(dtype {value.dtype} is not supported)")
  if not isinstance(value, np.ndarray):
    raise ValueError(f"(a {_type(value)}, not a tensor)")
  if value.dtype.kind in "biu":
    return value
  if value.dtype.name not in ("float32", "float64", "float16", "bfloat16"):
    raise ValueError(f"(dtype {value.dtype} is not supported)")
  bad = np.count_nonzero(~np.isfinite(value))
  if bad:
    raise ValueError(f"({bad} of {value.size} values NaN or infinite)")
  with np.errstate(over="ignore"):
    result = value.astype(np.float32, copy=False)
  bad = np.count_nonzero(~np.isfinite(result))
  if bad:
    raise ValueError(f"({bad} of {value.size} values beyond float32)")
  return result


def _type(value: Any) -> str:
  """The type of a value, for messages; `Inert` objects by their own name."""
  is_inert = isinstance(value, pickles.Inert)
  return value.name if is_inert else type(value).__name__


def _shown(key: Any) -> str:
  return key if isinstance(key, str) else f"a key of type {_type(key)}"
