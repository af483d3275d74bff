"""TFRecord files, read by index, with their checksums.

A record is its length (uint64), the length's checksum, the data, and the data's
checksum. Both are masked CRC-32Cs of 4 bytes; all numbers are little-endian
(tensorflow/core/lib/io/record_writer.h and tensorflow/core/lib/hash/crc32c.h).
"""

import os
import struct
from collections.abc import Sequence
from concurrent import futures
from typing import Protocol

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import paths

_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")
_LENGTH_BYTES = 8

_MASK = 0xA282EAD8

_AGAIN = "copy the file again, or prepare the data set again"


class Part(Protocol):
  """The examples of a file that belong to a split: TFDS' FileInstruction.

  Attributes:
    filename: of the file.
    skip: examples before the first one.
    take: how many they are; -1 for all that follow.
    examples_in_shard: of the whole file.
  """

  filename: str | os.PathLike
  skip: int
  take: int
  examples_in_shard: int


class Records:
  """The data of records in files, by an index of their offsets."""

  def __init__(self, parts: Sequence[Part]):
    """Reads the lengths of all records.

    Raises:
      ConfigError: a file cannot be read, is truncated, has another number of
        examples, or a length that differs from its checksum: where the next
        record begins is then unknown. google_crc32c is not installed.
    """
    try:
      import google_crc32c  # noqa: F401, PLC0415  Of the extra tfds.
    except ImportError as e:
      raise errors.ConfigError(
          "config.data.source: TFRecord files need google-crc32c; "
          "pip install 'metaformer-jax[tfds]'") from e
    self._paths = [os.fspath(part.filename) for part in parts]
    with futures.ThreadPoolExecutor() as pool:
      found = list(pool.map(_scan, self._paths))
    shards, records = [], []
    for i, (part, record) in enumerate(zip(parts, found)):
      if len(record) != part.examples_in_shard:
        raise errors.ConfigError(
            f"{part.filename}: holds {len(record)} examples, not "
            f"{part.examples_in_shard}; {_AGAIN}")
      take = part.take if part.take >= 0 else len(record)
      records.append(record[part.skip:part.skip + take])
      shards.append(np.full(len(records[-1]), i, np.int32))
    self._shards = np.concatenate(shards)
    self._records = np.concatenate(records)

  def __len__(self) -> int:
    return len(self._shards)

  def __getitem__(self, index: int) -> bytes:
    """The data of a record; OSError if it differs from its checksum."""
    path = self._paths[self._shards[index]]
    offset, length = self._records[index].tolist()
    # Opened for each read: ImageNet has more shards than a process may have
    # open files.
    with open(path, "rb", buffering=0) as f:
      f.seek(offset)
      data, checksum = f.read(length), f.read(_CHECKSUM.size)
    if len(data) + len(checksum) != length + _CHECKSUM.size:
      raise OSError(f"{path}: was truncated while it was read")
    if _CHECKSUM.unpack(checksum)[0] != _masked(data):
      raise OSError(f"{path}: the record at byte {offset - _HEADER.size} "
                    "differs from its checksum")
    return data


def _scan(path: str) -> np.ndarray:
  """The offset and length of each record's data: int64 [n, 2]."""
  found, at = [], 0
  try:
    with paths.open_file(path, buffering=0) as f:
      size = os.fstat(f.fileno()).st_size
      while header := f.read(_HEADER.size):
        if len(header) < _HEADER.size:
          raise errors.ConfigError(f"{path}: is truncated; {_AGAIN}")
        length, checksum = _HEADER.unpack(header)
        if checksum != _masked(header[:_LENGTH_BYTES]):
          raise errors.ConfigError(
              f"{path}: the length of the record at byte {at} differs from its "
              f"checksum, so the rest of the file cannot be read; {_AGAIN}")
        start = at + _HEADER.size
        at = start + length + _CHECKSUM.size
        if at > size:
          raise errors.ConfigError(f"{path}: is truncated; {_AGAIN}")
        found.append((start, length))
        f.seek(at)
  except OSError as e:
    raise errors.ConfigError(f"{path}: cannot be read: {e}") from e
  return np.array(found, np.int64).reshape(-1, 2)


def _masked(data: bytes) -> int:
  """The masked CRC-32C: rotated and shifted, as data may contain checksums."""
  import google_crc32c  # noqa: PLC0415  Of the extra tfds.

  checksum = google_crc32c.value(data)
  return ((checksum >> 15 | checksum << 17) + _MASK) & 0xFFFFFFFF
