"""Writes files as torch.save does, but without torch."""

import dataclasses
import io
import pickle
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage", np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage", np.dtype(np.int64): "LongStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int32): "IntStorage", np.dtype(np.int16): "ShortStorage",
    np.dtype(np.int8): "CharStorage", np.dtype(np.uint8): "ByteStorage",
    np.dtype(np.bool_): "BoolStorage",
}


class Global:
  """Pickled as the global 'module name', which need not exist."""

  def __init__(self, module: str, name: str):
    self.module, self.name = module, name

  def __call__(self, *args):
    """Only because pickle requires a callable."""


@dataclasses.dataclass(eq=False)
class Object:
  """Pickled as `function(*args)`, then BUILD of the state if there is one."""

  function: Global
  args: tuple = ()
  state: Any = None

  def __reduce__(self):
    return (self.function, self.args) + ((self.state,) if self.state else ())


@dataclasses.dataclass(eq=False)
class Storage:
  """Values in memory; the other fields, if set, are written instead."""

  values: np.ndarray
  claimed_size: Any = None
  location: str = "cpu"
  view: Any = None
  pid: Any = None  # Replaces the whole persistent id.


class _Pickler(pickle._Pickler):
  """Not the C pickler, which looks up globals while it writes."""

  dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

  def __init__(self, file, protocol, legacy):
    super().__init__(file, protocol)
    self.storages, self._legacy = [], legacy

  def persistent_id(self, obj):
    if not isinstance(obj, Storage):
      return None
    if obj not in self.storages:
      self.storages.append(obj)
    if obj.pid is not None:
      return obj.pid
    size = len(obj.values) if obj.claimed_size is None else obj.claimed_size
    kind = Global("torch", STORAGES[obj.values.dtype])
    pid = ("storage", kind, str(self.storages.index(obj)), obj.location, size)
    return (*pid, obj.view) if self._legacy else pid

  def save_named(self, obj):
    if self.proto >= 4:
      self.save(obj.module)
      self.save(obj.name)
      self.write(pickle.STACK_GLOBAL)
    else:
      self.write(f"c{obj.module}\n{obj.name}\n".encode())

  dispatch[Global] = save_named


def dumps(obj: Any, protocol: int = 2) -> bytes:
  buffer = io.BytesIO()
  _Pickler(buffer, protocol, False).dump(obj)
  return buffer.getvalue()


def tensor(values: Any, start=0, shape=None, strides=None, *,
           v1=False, metadata=None) -> Object:
  """A tensor of an array, or a view of a Storage."""
  if not isinstance(values, Storage):
    values = np.asarray(values)
    shape = values.shape
    strides = tuple(s // values.itemsize for s in values.strides)
    values = Storage(values.ravel())
  args = (values, start, shape, strides)
  if v1:
    return Object(Global("torch._utils", "_rebuild_tensor"), args)
  args += (False, {}) + ((metadata,) if metadata else ())
  return Object(Global("torch._utils", "_rebuild_tensor_v2"), args)


def parameter(values: Any) -> Object:
  return Object(Global("torch._utils", "_rebuild_parameter"),
                (tensor(values), True, {}))


def zipped(obj: Any, *, protocol=2, order="little", prefix="archive",
           **changes) -> bytes:
  """The zip format; `changes` replace entries by name, or omit them."""
  buffer = io.BytesIO()
  pickler = _Pickler(buffer, protocol, legacy=False)
  if isinstance(obj, bytes):
    buffer.write(obj)
  else:
    pickler.dump(obj)
  entries = {"data.pkl": buffer.getvalue(), "byteorder": order.encode()}
  for i, storage in enumerate(pickler.storages):
    entries[f"data/{i}"] = _bytes(storage.values, order)
  entries |= {"version": b"3\n"} | changes
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name, data in entries.items():
      if data is not None:
        archive.writestr(f"{prefix}/{name}", data)
  return buffer.getvalue()


def legacy(obj: Any, *, magic=0x1950A86A20F9469CFC6C, protocol=1001,
           keys=None) -> bytes:
  """The format before PyTorch 1.6: pickles, then the storages."""
  buffer = io.BytesIO()
  pickler = _Pickler(buffer, 2, legacy=True)
  if isinstance(obj, bytes):
    buffer.write(obj)
  else:
    pickler.dump(obj)
  found = [str(i) for i in range(len(pickler.storages))]
  info = {"protocol_version": 1001, "little_endian": True}
  parts = [dumps(magic), dumps(protocol), dumps(info), buffer.getvalue(),
           dumps(found if keys is None else keys)]
  for storage in pickler.storages:
    parts += [len(storage.values).to_bytes(8, "little"),
              _bytes(storage.values, "little")]
  return b"".join(parts)


def _bytes(values: np.ndarray, order: str) -> bytes:
  integers = values.view(f"u{values.itemsize}")
  return integers.astype(
      integers.dtype.newbyteorder("<" if order == "little" else ">")).tobytes()
