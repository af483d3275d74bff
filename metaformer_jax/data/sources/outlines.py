"""Outlines of objects in COCO files: polygons, and RLEs of masks.

Boxes can be learned without them. Of a file, one that cannot be used is left
out, and counted. pycocotools, which turns polygons into pixels, would read or
write outside of its memory for some; `encode` and `decode` check them first.
"""

import array
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pycocotools import mask as pymask

from metaformer_jax.config import conversion

# Of a coordinate.
_MAX_NUMBER = 2**24

# Of a polygon: how far it is around it, in pixels. pycocotools takes 100 bytes
# for each of them.
_MAX_LENGTH = 2**20

# Of an image; pycocotools numbers pixels by 32 bits.
_MAX_PIXELS = 2**31

# Values of a polygon of three points.
_SHORTEST = 6

Segment = list[list[float]] | dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Segments:
  """The outlines of the annotations of a file, by their index.

  Attributes:
    points: float64 [P], x and y of the polygons in turn.
    ends: int64 [R + 1], of the polygons in `points`.
    starts: int64 [A + 1], of an annotation's polygons in `ends`.
    rles: {"size": [height, width], "counts"} as JSON, of those that have it.
  """

  points: np.ndarray
  ends: np.ndarray
  starts: np.ndarray
  rles: Mapping[int, bytes]

  def __getitem__(self, row: int) -> Segment:
    """Polygons [[x, y, x, y, ...], ...], an RLE, or None."""
    if row in self.rles:
      return json.loads(self.rles[row])
    start, stop = self.starts[row:row + 2]
    ends = self.ends[start:stop + 1].tolist()
    return [self.points[a:b].tolist()
            for a, b in itertools.pairwise(ends)] or None

  def exist(self) -> np.ndarray:
    """bool [A]: which annotations have an outline."""
    found = np.diff(self.starts) > 0
    found[list(self.rles)] = True
    return found


@dataclasses.dataclass(frozen=True)
class Chosen(Sequence):
  """The outlines of some annotations, in another order.

  Attributes:
    segments: of all.
    rows: int64 [N], their indices in it.
  """

  segments: Segments
  rows: np.ndarray

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> Segment:
    return self.segments[int(self.rows[index])]

  def exist(self) -> np.ndarray:
    """bool [N]: which of them there are."""
    return self.segments.exist()[self.rows]


class Builder:
  """Collects the outlines of annotations, in their order."""

  def __init__(self):
    self._points = array.array("d")
    self._ends, self._starts = array.array("q", [0]), array.array("q", [0])
    self._rles: dict[int, bytes] = {}
    self._sizes: dict[int, list[int]] = {}
    self._unusable: list[str] = []

  def add(self, segment: Any) -> None:
    """Adds a "segmentation"; ValueError if it has another form."""
    i = len(self._starts) - 1
    reason = (self._add_rle(i, segment) if isinstance(segment, dict) else
              self._add_polygons(segment or []))
    if reason:
      self._note(i, reason)
    self._starts.append(len(self._ends) - 1)

  def _note(self, i: int, reason: str) -> None:
    self._unusable.append(f"annotations[{i}] has {reason}")

  def _add_rle(self, i: int, segment: dict[str, Any]) -> str | None:
    """Adds an RLE, or returns what is wrong with it."""
    counts, size = segment.get("counts"), segment.get("size")
    try:
      if (type(size) is not list or len(size) != 2
          or any(type(side) is not int or side < 1 for side in size)):
        raise ValueError(f"has the size {conversion.shown(size)}")
      _runs(segment, size)
    except ValueError as e:
      return f"an RLE that {e}"
    self._sizes[i] = size
    self._rles[i] = json.dumps({"size": size, "counts": counts},
                               separators=(",", ":")).encode()
    return None

  def _add_polygons(self, segment: list[Any]) -> str | None:
    """Adds the polygons; returns what is wrong with one that is left out."""
    if type(segment) is not list or any(type(p) is not list for p in segment):
      raise ValueError("has a segmentation that is neither a list of polygons "
                       "nor an RLE")
    reason = None
    for polygon in segment:
      if len(polygon) < _SHORTEST or len(polygon) % 2:
        reason = f"a polygon of {len(polygon)} values"
        continue
      try:
        self._points.extend(polygon)
      except (OverflowError, TypeError) as e:
        raise ValueError(f"has a polygon of other things than numbers: {e}"
                         ) from e
      self._ends.append(len(self._points))
    return reason

  def build(self, sizes: np.ndarray) -> tuple[Segments, list[str]]:
    """The outlines, and a line if some cannot be used.

    Args:
      sizes: int [A, 2], heights and widths of the annotations' images.

    Raises:
      ValueError: a coordinate is too large, or infinite.
    """
    for i, size in self._sizes.items():
      if size != sizes[i].tolist():
        del self._rles[i]
        self._note(i, "an RLE of {} x {} pixels, but its image has {} x {}"
                   .format(*size[::-1], *sizes[i][::-1]))
    # Without copies, as there can be a gigabyte of them.
    points, ends, starts = map(np.asarray, (self._points, self._ends,
                                            self._starts))
    if not are_near(points):
      wrong = np.flatnonzero(~(np.abs(points) <= _MAX_NUMBER))[0]
      polygon = np.searchsorted(ends, wrong, "right") - 1
      i = np.searchsorted(starts, polygon, "right") - 1
      raise ValueError(f"annotations[{i}] has a polygon with the coordinate "
                       f"{points[wrong]}")
    n = len(self._unusable)
    return Segments(points, ends, starts, self._rles), [
        f"{n:,} outlines cannot be used, and are left out; the first: "
        f"{self._unusable[0]}"] if n else []


def are_near(points: np.ndarray) -> bool:
  """Whether all coordinates are finite, and not too large."""
  return not len(points) or bool(
      points.min() >= -_MAX_NUMBER and points.max() <= _MAX_NUMBER)


def encode(segment: Segment, size: Sequence[int]) -> dict[str, Any]:
  """The RLE of an outline, as pycocotools and COCO's server take it.

  Args:
    segment: polygons, or an RLE of any form.
    size: height and width of the image.

  Returns:
    {"size": [height, width], "counts": text}.

  Raises:
    ValueError: it cannot be used.
  """
  height, width = map(int, size)
  if height * width >= _MAX_PIXELS:
    raise ValueError(f"is in an image of {width} x {height} pixels, which are "
                     f"{_MAX_PIXELS} or more")
  if isinstance(segment, Mapping):
    found = pymask.frPyObjects({"size": [height, width],
                                "counts": _runs(segment, size)}, height, width)
  else:
    if not isinstance(segment, list | tuple) or not segment:
      raise ValueError("has neither polygons nor an RLE")
    found = pymask.merge(pymask.frPyObjects(
        [_polygon(polygon) for polygon in segment], height, width))
  return {"size": [height, width], "counts": found["counts"].decode()}


def decode(segment: Segment, size: Sequence[int]) -> np.ndarray:
  """The mask of an outline: uint8 [height, width], 1 inside of it, else 0.

  The arguments and errors are those of `encode`. As pycocotools' `decode` and
  mmdetection 2.19 (LoadAnnotations._poly2mask).
  """
  height, width = size
  runs = (_runs(segment, size) if isinstance(segment, Mapping) else
          rle_counts(encode(segment, size)["counts"]))
  values = np.zeros(len(runs), np.uint8)
  values[1::2] = 1
  return np.repeat(values, runs).reshape(width, height).T


def _polygon(values: Sequence[float]) -> list[float]:
  """The coordinates of a polygon; ValueError if it cannot be used."""
  try:
    points = np.asarray(values, np.float64)
  except (OverflowError, TypeError) as e:
    raise ValueError("has a polygon of other things than numbers") from e
  if points.ndim != 1 or len(points) < _SHORTEST or len(points) % 2:
    raise ValueError(f"has a polygon of the shape {points.shape}; one has x "
                     "and y of at least three points in turn")
  if not (np.abs(points) <= _MAX_NUMBER).all():
    raise ValueError("has a polygon with a coordinate that is not finite, or "
                     f"beyond {_MAX_NUMBER}")
  points = points.reshape(-1, 2)
  length = np.abs(points - np.roll(points, 1, 0)).max(1).sum()
  if length > _MAX_LENGTH:
    raise ValueError(f"has a polygon that is {length:.0f} pixels long; at most "
                     f"{_MAX_LENGTH} can be drawn")
  return points.ravel().tolist()


def _runs(segment: Mapping[str, Any], size: Sequence[int]) -> list[int]:
  """The lengths of the runs of an RLE; ValueError if it is of another size."""
  runs, own = rle_counts(segment.get("counts")), segment.get("size")
  if (not isinstance(own, Sequence) or list(own) != list(size)
      or sum(runs) != size[0] * size[1]):
    raise ValueError(f"is of {conversion.shown(sum(runs))} pixels, but its "
                     f"size is {conversion.shown(own)}")
  return runs


def rle(mask: np.ndarray) -> dict[str, list[int]]:
  """The RLE of a mask, bool [H, W]: the lengths begin with that of zeros."""
  values = mask.ravel("F")
  edges = np.flatnonzero(values[1:] != values[:-1]) + 1
  start = [0, 0] if values[0] else [0]
  return {"size": list(mask.shape),
          "counts": np.diff([*start, *edges, values.size]).tolist()}


def rle_counts(counts: Any) -> list[int]:
  """The lengths of an RLE's runs of pixels, column by column.

  Args:
    counts: a list of the lengths, or COCO's text of them: for each length, the
      difference to the one before the last (from the fourth on), in groups of
      five bits, the lowest first, with 32 for those that another one follows,
      plus 48 (pycocotools, common/maskApi.c, rleFrString).

  Raises:
    ValueError: it is neither, or has a length below 0. pycocotools would read
      or write outside of its memory.
  """
  if isinstance(counts, bytes):  # As pycocotools gives it.
    counts = counts.decode("latin-1")
  if isinstance(counts, str):
    counts = _parse_counts(counts)
  if type(counts) is not list or not all(
      type(n) is int and n >= 0 for n in counts):
    raise ValueError("has neither a list of lengths nor a text of them")
  return counts


def _parse_counts(text: str) -> list[int]:
  lengths, value, shift = [], 0, 0
  for character in text:
    bits = ord(character) - 48
    if not 0 <= bits < 64 or shift > 60:
      raise ValueError(f"holds {conversion.shown(character)} in a wrong place")
    value |= (bits & 31) << shift
    shift += 5
    if not bits & 32:
      value -= (bits & 16) << (shift - 4)  # The sign.
      lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
      value, shift = 0, 0
  if shift:
    raise ValueError("ends within a length")
  return lengths
