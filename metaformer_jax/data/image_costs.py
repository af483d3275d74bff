"""What decoding an image costs beyond its pixels, judged from its bytes.

A small file can ask for much work: a JPEG by passing over its pixels thousands
of times, a TIFF by using the same bytes again and again. Their decoders do this
in one call, which cannot be interrupted; so it is found out before. Work
between two reads of the file is interrupted by `Timed`.
"""

import re
import struct
import time
from typing import BinaryIO

import numpy as np
from PIL import Image

# Scans of a JPEG with data.max_pixels; a progressive one commonly has ten.
_SCANS = 20

# The header of a scan, with its length and its number of components.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

# The largest block of pixels that is decoded whole.
_JPEG_BLOCK = 32

# TIFF: limits of entries and of strips or tiles; the tags that matter; bytes of
# a value by its type; and compressions: none, fax, LZW, JPEG, deflate,
# PackBits, deflate (TIFF 6.0, sections 2 and 8, and its technical notes).
_ENTRIES, _STRIPS = 4096, 2**17
_COMPRESSION, _JPEG = 259, 7
_OFFSETS, _COUNTS = (273, 324), (279, 325)
_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u8", 6: "u1", 7: "u1",
          8: "u2", 9: "u4", 10: "u8", 11: "u4", 12: "u8", 13: "u4", 16: "u8",
          17: "u8", 18: "u8"}
_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946}


class Timed:
  """A file that can be read while its thread has processor time left.

  Time in which other programs have the processor does not count, so that the
  same images are bad on a busy machine.
  """

  # Looking at the time takes longer than reading a byte.
  _READS, _BYTES = 64, 2**16

  def __init__(self, file: BinaryIO, seconds: float):
    self._file, self._seconds = file, seconds
    self._end = time.thread_time() + seconds
    self._n_reads, self._n_bytes = 0, 0

  def read(self, size: int = -1) -> bytes:
    data = self._file.read(size)
    self._n_reads += 1
    self._n_bytes += len(data)
    if self._n_reads >= self._READS or self._n_bytes >= self._BYTES:
      self._n_reads = self._n_bytes = 0
      if time.thread_time() > self._end:
        raise TimeoutError(f"decoding takes more than {self._seconds:.0f} s")
    return data

  def __getattr__(self, name: str):
    return getattr(self._file, name)


def check_jpeg(data: bytes, picture: Image.Image, max_pixels: int) -> None:
  """ValueError if a JPEG passes over its pixels too often.

  Args:
    data: the file.
    picture: of it, as Pillow has opened it: up to the end of a scan's header.
    max_pixels: a picture with as many may have 20 scans; smaller ones more.
  """
  n = picture.layers  # Components.
  whole = b"\xff\xda\x00" + bytes((6 + 2 * n, n))
  if not picture.info.get("progressive") and data.startswith(
      whole, picture.fp.tell() - (8 + 2 * n)):
    return  # Its only scan.
  n_scans, pixels = len(_SCAN.findall(data)), 1
  for side in picture.size:
    pixels *= -(-side // _JPEG_BLOCK) * _JPEG_BLOCK
  if n_scans * pixels > _SCANS * max(max_pixels, pixels):
    raise ValueError("a JPEG of {} x {} pixels with {} scans takes too long; "
                     "save it again".format(*picture.size, n_scans))


def check_tiff(data: bytes) -> None:
  """ValueError if the first directory of a TIFF asks for too much work.

  The values that it refers to, and its strips or tiles, are each no more bytes
  than the file has, unless they overlap. What is damaged in another way is left
  to the decoder.
  """
  tags = {}
  try:
    for tag, kind, count, place in _entries(data):
      tags.setdefault(tag, (kind, count, place))
  except struct.error:
    return  # Cut.
  total = sum(np.dtype(kind).itemsize * count for kind, count, _ in
              tags.values())
  if total > len(data):
    raise ValueError(f"a TIFF whose {len(tags)} tags have {total} bytes, more "
                     f"than the file, {len(data)}")
  compression = int(_values(data, tags, (_COMPRESSION,)).sum() or 1)
  if compression not in _COMPRESSIONS:
    raise ValueError(f"a TIFF of compression {compression}; save it again, "
                     "uncompressed or with LZW or deflate")
  counts = _values(data, tags, _COUNTS)
  n = max([len(counts), *(tags[tag][1] for tag in _OFFSETS if tag in tags)])
  if n > _STRIPS or counts.sum(dtype=float) > len(data):
    raise ValueError(f"a TIFF whose {n} strips or tiles have "
                     f"{counts.sum(dtype=float):.0f} bytes; the file has "
                     f"{len(data)}")
  n_scans = len(_SCAN.findall(data)) if compression == _JPEG else 0
  if n_scans > _SCANS * max(n, 1):
    raise ValueError(f"a TIFF whose {n} strips or tiles have {n_scans} scans")


def _entries(data: bytes):
  """Yields (tag, type as NumPy has it, count, place) of the first directory."""
  order = "<" if data[:2] == b"II" else ">"
  big = struct.unpack_from(order + "H", data, 2)[0] == 43
  start, = struct.unpack_from(order + ("Q" if big else "I"), data,
                              8 if big else 4)
  head, entry = (("Q", "HHQ"), ("H", "HHI"))[not big]
  n, = struct.unpack_from(order + head, data, start)
  if n > _ENTRIES:
    raise ValueError(f"a TIFF with {n} tags")
  inline = 8 if big else 4
  place = start + struct.calcsize(order + head)
  for _ in range(n):
    tag, kind, count = struct.unpack_from(order + entry, data, place)
    place += struct.calcsize(order + entry)
    if kind in _TYPES:
      dtype = np.dtype(order + _TYPES[kind])
      there = place
      if dtype.itemsize * count > inline:
        there, = struct.unpack_from(order + ("Q" if big else "I"), data, place)
      yield tag, dtype, count, there
    place += inline


def _values(data: bytes, tags: dict, names: tuple[int, ...]) -> np.ndarray:
  """The integers of those of some tags that are there and whole."""
  found = [np.zeros(0, np.uint64)]
  for name in names:
    if name in tags:
      dtype, count, place = tags[name]
      if place + count * dtype.itemsize <= len(data):
        found.append(np.frombuffer(data, dtype, count, place).astype(np.uint64))
  return np.concatenate(found)
