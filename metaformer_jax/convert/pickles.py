"""Reads PyTorch checkpoints without PyTorch and without running their code.

A pickle is a program. `pickle.Unpickler` can restrict the globals that it looks
up, but still calls them with any arguments that the file has, sets their
attributes, and reads copyreg's registry. So this module interprets only the
opcodes that build plain data; globals are names in a table and are never
imported. A file can do no more than `_Machine` does.
"""

import dataclasses
import io
import math
import mmap
import pathlib
import pickletools
import sys
import zipfile
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.convert import torch_names
from metaformer_jax.convert.torch_names import Inert

# The legacy format begins with two pickles: these integers (torch/
# serialization.py).
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

# Opcodes whose argument is the value.
_PLAIN = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4",
          "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
          "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
          "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

# What a file may ask for. It then takes a few seconds, and 256 MiB besides the
# tensors, and the tensors at most 16 times the file's size.
#
# Instructions of its pickles, each of which makes one object at most. With a
# moving average and AdamW's state there are some 160 for each parameter, of
# which the largest models have less than 1,000.
_MAX_STEPS = 10**6
# Tensors may share a storage, so a small file could need any amount of memory;
# tied weights and copies need less.
_MAX_EXPANSION = 16
_MAX_NDIM = 16  # A convolution in three dimensions has five.
# Of an archive's directory: 50,000 storages.
_MAX_DIRECTORY_BYTES = 2**22
# Of keys: names of parameters, and in old optimizers addresses. Comparing long
# ones takes long, and larger integers can have the same hash.
_MAX_KEY_LENGTH, _MAX_KEY = 4096, 2**60
_MAX_SIZE = 2**63
_MAX_ARGUMENTS = 10


def read(path: str | pathlib.Path) -> Any:
  """Returns what `torch.save` was given, in its zip or its legacy format.

  Containers are dicts, lists and tuples. Tensors and parameters are C-ordered
  arrays that own their memory, in the saved dtype. The few other objects that
  checkpoints may have are `Inert`.

  Raises:
    WeightsError: the file is damaged, of another kind, or holds anything else.
  """
  try:
    with _File(path) as file:
      is_zip = file.read(4) == b"PK\x03\x04"
      return _read_zip(file) if is_zip else _read_legacy(file)
  except errors.WeightsError as error:
    raise errors.WeightsError(one_line(path, error)) from error
  except OSError as error:
    raise errors.WeightsError(one_line(
        path, f"cannot be read: {error.strerror or error}")) from error
  except Exception as error:
    # For damaged bytes, zipfile, pickletools and NumPy raise exceptions of many
    # types, MemoryError and RecursionError among them.
    raise errors.WeightsError(one_line(
        path, "is damaged or not a PyTorch checkpoint: download or save it "
        f"again ({type(error).__name__}: {error})")) from error


def one_line(path: str | pathlib.Path, message: Any) -> str:
  """Returns 'path: message' on one line."""
  return errors.one_line(f"{path}: {message}")


class _File(io.FileIO):
  """A file of which no more than `most` bytes can be read at once.

  `zipfile` reads the directory of an archive at once, whatever its size.
  """

  most = sys.maxsize

  def read(self, size: int = -1) -> bytes:
    if size > self.most:
      raise errors.WeightsError(
          f"is an archive with a directory of more than {self.most} bytes, "
          "which torch.save does not write")
    return super().read(size)


def _read_zip(file: _File) -> Any:
  file.most = _MAX_DIRECTORY_BYTES
  with zipfile.ZipFile(file) as archive:
    file.most = sys.maxsize
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise errors.WeightsError(
          "is a zip archive, but not one that torch.save wrote; name the file "
          "of weights in it")
    size = file.seek(0, io.SEEK_END)
    stored = all(
        info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        and info.compress_size == info.file_size
        for info in archive.infolist())
    if (not stored or len(entries) < len(archive.infolist())
        or sum(info.file_size for info in entries.values()) > size):
      raise errors.WeightsError(
          "holds compressed, encrypted, repeated or overlapping entries, which "
          "torch.save does not write; save it again")
    root = pickles[0].removesuffix("data.pkl")
    order = "little"
    if f"{root}byteorder" in entries:
      order = archive.read(f"{root}byteorder").decode()
    if order not in ("little", "big"):
      raise ValueError(f"byte order {order!r}")
    machine = _Machine(size, order)
    result = machine.run(io.BytesIO(archive.read(pickles[0])))
    for key in machine.storages:
      machine.fill(key, archive.read(f"{root}data/{key}"))
  return result


def _read_legacy(file: _File) -> Any:
  # Mapped, so that reading more bytes than the file has allocates nothing.
  with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as stream:
    # Little-endian whatever the third pickle, `sys_info`, says: torch.load
    # ignores it, too.
    machine = _Machine(len(stream), "little")
    if machine.run(stream) != _MAGIC:
      raise errors.WeightsError(
          "is a pickle, but not one that torch.save wrote; save its state_dict "
          "as safetensors")
    if machine.run(stream) != _PROTOCOL:
      raise ValueError("unknown protocol")
    machine.run(stream)
    result = machine.run(stream)
    keys = machine.run(stream)
    # Strings only: comparing other objects of a pickle may never end.
    if (type(keys) is not list or len(keys) != len(machine.storages)
        or not all(isinstance(key, str) and key in machine.storages
                   for key in keys)
        or len(set(keys)) < len(keys)):
      raise ValueError("the storages are not those that the tensors use")
    for key in keys:
      dtype, size = machine.storages[key]
      if int.from_bytes(stream.read(8), "little", signed=True) != size:
        raise ValueError(f"storage {key} does not have the declared size")
      machine.fill(key, stream.read(size * dtype.itemsize))
  return result


@dataclasses.dataclass(frozen=True)
class _Storage:
  """`size` values, from `start`, of the storage saved under `key`."""

  key: str
  start: int
  size: int


class _Machine:
  """Runs pickles: creates their containers, and arrays that `fill` fills."""

  def __init__(self, file_size: int, byte_order: str):
    self._file_size = file_size
    self._budget = _MAX_EXPANSION * file_size
    self._swap = byte_order != sys.byteorder
    self._steps = 0
    self._views: dict[str, list] = {}  # Key -> (array, start, strides).
    self.storages: dict[str, tuple[np.dtype, int]] = {}  # Key -> dtype, size.

  def run(self, stream: Any) -> Any:
    """Returns the object of the pickle at the stream's position."""
    stack: list = []
    marked: list[list] = []  # The stacks below each mark.
    memo: dict[int, Any] = {}
    for opcode, arg, _ in pickletools.genops(stream):
      self._count_step()
      match opcode.name:
        case "PROTO" | "FRAME":
          pass
        case "STOP":
          return stack.pop()
        case name if name in _PLAIN:
          stack.append(arg)
        case name if name in _CONSTANTS:
          stack.append(_CONSTANTS[name])
        case "MARK":
          marked.append(stack)
          stack = []
        case "EMPTY_LIST":
          stack.append([])
        case "EMPTY_DICT":
          stack.append({})
        case name if name in _TUPLES:
          items = [stack.pop() for _ in range(_TUPLES[name])]
          stack.append(tuple(reversed(items)))
        case "TUPLE" | "LIST" | "DICT" | "APPENDS" | "SETITEMS" as name:
          items, stack = stack, marked.pop()
          _collect(name, items, stack)
        case "APPEND":
          item = stack.pop()
          _extend(stack[-1], [item])
        case "SETITEM":
          value, key = stack.pop(), stack.pop()
          _set_items(stack[-1], [key, value])
        case "PUT" | "BINPUT" | "LONG_BINPUT":
          _check_key(arg)
          memo[arg] = stack[-1]
        case "MEMOIZE":
          memo[len(memo)] = stack[-1]
        case "GET" | "BINGET" | "LONG_BINGET":
          stack.append(memo[arg])
        case "GLOBAL":
          stack.append(torch_names.named(arg.replace(" ", ".")))
        case "STACK_GLOBAL":
          name, module = stack.pop(), stack.pop()
          stack.append(_global(module, name))
        case "REDUCE" | "NEWOBJ":
          args, function = stack.pop(), stack.pop()
          stack.append(self._call(function, args))
        case "BUILD":
          stack.pop()
          _require_attributes(stack[-1])
        case "BINPERSID":
          stack.append(self._storage(stack.pop()))
        case name:
          raise errors.WeightsError(torch_names.refusal(f"the opcode {name}"))
    raise ValueError("truncated")

  def _count_step(self) -> None:
    self._steps += 1
    if self._steps > _MAX_STEPS:
      raise errors.WeightsError(
          f"has more than {_MAX_STEPS:,} instructions, ten times those of the "
          "largest models; save the state_dict alone, as safetensors")

  def _call(self, function: Any, args: Any) -> Any:
    name = function.name if isinstance(function, Inert) else ""
    if name in torch_names.INERT and isinstance(args, tuple):
      return Inert(name)
    if not isinstance(args, tuple) or len(args) > _MAX_ARGUMENTS:
      raise ValueError("a call with unusual arguments")
    match name, args:
      case _, (storage, start, shape, strides, *rest) if (
          name in torch_names.TENSORS):
        if rest[2:] not in ([], [None], [{}]):
          raise errors.WeightsError(
              torch_names.refusal("a conjugate or negative view"))
        return self._tensor(storage, start, shape, strides)
      case torch_names.UNTYPED, _:
        raise torch_names.untyped(args)
      case torch_names.PARAMETER, (np.ndarray() as array, *_):
        return array
      case "collections.OrderedDict", () | ([],):
        return {}
      case "torch.Size", (tuple() as shape,):
        return shape
    raise ValueError("a call with unusual arguments")

  def _storage(self, pid: Any) -> _Storage:
    unusual = ValueError("an unusual reference to a storage")
    if not isinstance(pid, tuple) or len(pid) > _MAX_ARGUMENTS:
      raise unusual
    match pid:
      case "storage", Inert(name), str(key), str(location), int(size), *view:
        _check_key(key)
      case _:
        raise unusual
    if location == "meta":
      raise errors.WeightsError("holds tensors without values (device 'meta')")
    dtype = torch_names.STORAGES[name]
    if not 0 <= size * dtype.itemsize <= self._file_size:
      raise ValueError(f"storage {key} is larger than the file")
    if self.storages.setdefault(key, (dtype, size)) != (dtype, size):
      raise ValueError(f"storage {key} is declared in two ways")
    if view in ([], [None]):  # The legacy format may have a view here.
      return _Storage(key, 0, size)
    match view:
      case [(_, int(start), int(length))] if (
          min(start, length) >= 0 and start + length <= size):
        return _Storage(key, start, length)
    raise ValueError(f"a view reaches beyond storage {key}")

  def _tensor(self, storage: Any, start: Any, shape: Any, strides: Any,
              ) -> np.ndarray:
    """Returns an array without its values yet."""
    if (not isinstance(storage, _Storage)
        or not len(shape) == len(strides) <= _MAX_NDIM
        or any(type(n) is not int or not 0 <= n < _MAX_SIZE
               for n in (start, *shape, *strides))):
      raise ValueError("a tensor's description is unusual")
    dtype, _ = self.storages[storage.key]
    last = start + sum((n - 1) * s for n, s in zip(shape, strides))
    if math.prod(shape) and last >= storage.size:
      raise ValueError(f"a tensor reaches beyond storage {storage.key}")
    self._budget -= math.prod(shape) * dtype.itemsize
    if self._budget < 0:
      raise errors.WeightsError(
          f"expands to more than {_MAX_EXPANSION} times its size; save clones "
          "of the tensors")
    array = np.empty(shape, dtype)
    self._views.setdefault(storage.key, []).append(
        (array, storage.start + start, strides))
    return array

  def fill(self, key: str, data: bytes) -> None:
    """Copies a storage's values to the arrays that view it."""
    dtype, size = self.storages[key]
    if len(data) != size * dtype.itemsize:
      raise ValueError(f"storage {key} does not have the declared size")
    # Through integers, as bfloat16 has no byte order.
    values = np.frombuffer(data, f"u{dtype.itemsize}")
    values = (values.byteswap() if self._swap else values).view(dtype)
    for array, start, strides in self._views.get(key, ()):
      if array.size:
        array[...] = np.lib.stride_tricks.as_strided(
            values[start:], array.shape, [s * dtype.itemsize for s in strides],
            writeable=False)


def _extend(target: Any, items: list) -> None:
  if type(target) is not list:
    raise ValueError("items of something that is not a list")
  target.extend(items)


def _global(module: Any, name: Any) -> Any:
  """What a global of two strings stands for."""
  if not isinstance(name, str) or not isinstance(module, str):
    raise ValueError("a global without a name")
  return torch_names.named(f"{module}.{name}")


def _require_attributes(value: Any) -> None:
  """Only an OrderedDict (`_metadata`) and an inert object may have some."""
  if not isinstance(value, (dict, Inert)):
    raise errors.WeightsError(torch_names.refusal("attributes of a value"))


def _collect(opcode: str, items: list, stack: list) -> None:
  """Makes or fills the container that the items above a mark belong to."""
  match opcode:
    case "TUPLE":
      stack.append(tuple(items))
    case "LIST":
      stack.append(items)
    case "DICT":
      stack.append({})
      _set_items(stack[-1], items)
    case "APPENDS":
      _extend(stack[-1], items)
    case "SETITEMS":
      _set_items(stack[-1], items)


def _set_items(target: Any, items: list) -> None:
  if type(target) is not dict or len(items) % 2:
    raise ValueError("items of something that is not a dictionary")
  for key in items[::2]:
    _check_key(key)
  target.update(zip(items[::2], items[1::2]))


def _check_key(key: Any) -> None:
  """Raises WeightsError for a key that could take long to find."""
  # Hashing recurses in C: deeply nested tuples would crash the process.
  if not isinstance(key, (str, bytes, int, float, type(None))):
    what = f"a {type(key).__name__}"
  elif isinstance(key, int) and abs(key) >= _MAX_KEY:
    what = "a huge integer"
  elif isinstance(key, (str, bytes)) and len(key) > _MAX_KEY_LENGTH:
    what = f"a text of {len(key):,} characters"
  else:
    return
  raise errors.WeightsError(
      f"holds a dictionary with {what} as a key, which this reader refuses; "
      "save its state_dict as safetensors")
