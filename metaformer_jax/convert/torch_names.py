"""What names in PyTorch's pickles stand for; nothing is imported by them."""

import dataclasses
import functools

import ml_dtypes
import numpy as np

from metaformer_jax import errors

STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    # Bytes of any dtype, for UNTYPED.
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
# Tensors of the dtypes for which there is no kind of storage.
UNTYPED = "torch._utils._rebuild_tensor_v3"
# Saved besides the weights; read as `Inert` and their arguments ignored.
INERT = ("argparse.Namespace", "torch.device", "numpy.dtype",
         "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
         "_codecs.encode")  # In protocol 2, for the bytes of a scalar.
# Of UNTYPED, or settings.
_DTYPES = tuple(f"torch.{name}" for name in (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32",
    "int64", "float16", "bfloat16", "float32", "float64", "float8_e4m3fn",
    "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
    "float4_e2m1fn_x2", "complex32", "complex64", "complex128"))
_ALLOWED = {*STORAGES, *TENSORS, *INERT, *_DTYPES, PARAMETER, UNTYPED,
            "torch.Size", "collections.OrderedDict"}

# Tensors that are not read, by how a user knows them.
_QUANTISED = "quantised tensors; save what dequantize() of them returns"
_COMPLEX = "complex numbers, which no model here has"
_UNREAD = {
    "torch._utils._rebuild_sparse_tensor":
        "sparse tensors; save what to_dense() of them returns",
    "torch._utils._rebuild_nested_tensor": "nested tensors; save each of them",
    "torch._utils._rebuild_meta_tensor_no_storage":
        "tensors without values (device 'meta')",
    "torch._utils._rebuild_qtensor": _QUANTISED,
    **{f"torch.{kind}Storage": _QUANTISED for kind in (
        "QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
    **{f"torch.Complex{kind}Storage": _COMPLEX for kind in ("Float", "Double")},
}


@dataclasses.dataclass(frozen=True)
class Inert:
  """A placeholder for a Python object that was not created."""

  name: str


@functools.cache  # A file may hold a name a million times.
def named(name: str) -> Inert:
  """What a global stands for; WeightsError if it is not in the table."""
  if name in _UNREAD:
    raise errors.WeightsError(f"holds {_UNREAD[name]}")
  if name not in _ALLOWED:
    raise errors.WeightsError(refusal(name[:100]))
  return Inert(name)


def refusal(what: str) -> str:
  """A message: a file has something that is not data."""
  return (f"holds {what}, which this reader does not run; save its state_dict "
          "as safetensors")


def untyped(arguments: tuple) -> errors.WeightsError:
  """The error for a call of UNTYPED with arguments: names the dtype."""
  dtype = arguments[6] if len(arguments) > 6 else None
  if not isinstance(dtype, Inert) or dtype.name not in _DTYPES:
    raise ValueError("a tensor without a dtype")
  return errors.WeightsError(
      f"holds tensors of {dtype.name}, which are not read; save them as "
      "float32, float16 or bfloat16")
