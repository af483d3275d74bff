"""Outlines as pycocotools draws them; damaged ones never reach it."""

import contextlib
import json

import numpy as np
import pytest
import safetensors.numpy
from pycocotools import mask as pymask

from metaformer_jax.data.sources import outline_files, outlines

SIZE = (37, 53)


def drawn(segment, size=SIZE):
  """What pycocotools makes of an outline, as its `COCO.annToRLE` does."""
  found = pymask.frPyObjects(segment, *size)
  found = pymask.merge(found) if isinstance(found, list) else found
  return found["counts"].decode()


def filled(runs, size=SIZE):
  """A mask by the definition of an RLE, column by column."""
  values = []
  for i, n in enumerate(runs):
    values += [i % 2] * n
  return np.reshape(values, size[::-1]).T


def polygons(rng, n_most=3):
  """Some of them partly, or wholly, outside of the image."""
  return [(rng.uniform(-0.4, 1.2, 2 * rng.integers(3, 12))
           * 10 ** rng.uniform(0.3, 2)).round(2).tolist()
          for _ in range(rng.integers(1, n_most + 1))]


def runs(rng, size=SIZE):
  n, edges = size[0] * size[1], rng.integers(0, 40)
  edges = np.sort(rng.integers(0, n, edges))
  return np.diff([0, *edges, n]).tolist()


def test_polygons_are_drawn_as_by_pycocotools():
  rng = np.random.default_rng(0)
  for _ in range(100):
    segment = polygons(rng)
    found = outlines.encode(segment, SIZE)
    assert found == {"size": [*SIZE], "counts": drawn(segment)}
    mask = outlines.decode(segment, SIZE)
    assert mask.shape == SIZE and mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, filled(outlines.rle_counts(
        found["counts"])))


def test_a_point_of_a_file_is_rounded_as_its_float64():
  """As float32 it would be another one: 0.5 pixels of a fifth away."""
  x = 17.5 - 1e-9
  segment = [[x, 3.5, 30, 3.5, 30, 20, x, 20]]
  builder = outlines.Builder()
  builder.add(segment)
  found, _ = builder.build(np.array([SIZE]))
  assert found[0] == segment
  assert outlines.encode(found[0], SIZE)["counts"] == drawn(segment)


def test_rles_of_every_form():
  rng = np.random.default_rng(1)
  for _ in range(50):
    counts = runs(rng)
    expected = filled(counts)
    text = drawn({"size": [*SIZE], "counts": counts})
    for form in (counts, text, text.encode()):
      for size in ([*SIZE], SIZE):
        segment = {"size": size, "counts": form}
        np.testing.assert_array_equal(outlines.decode(segment, SIZE), expected)
        assert outlines.encode(segment, SIZE)["counts"] == text


VALUES = (None, True, -1, 0, 0.5, 7, 20.25, -40, 1e3, 1e5, 1e7, -1e7, 2**31,
          2**63, 10**400, 1e308, float("nan"), float("inf"), "", "1", b"~", [],
          [[]], {}, [1, 2])


def damaged(rng, segment):
  """The same with a few values changed, added or left out."""
  segment = json.loads(json.dumps(segment))
  for _ in range(rng.integers(1, 4)):
    at = segment
    while True:
      keys = list(at) if isinstance(at, dict) else range(len(at))
      if not len(keys):
        break
      key = keys[rng.integers(len(keys))]
      if isinstance(at[key], list | dict) and rng.random() < 0.8:
        at = at[key]
        continue
      if isinstance(at[key], str) and at[key] and rng.random() < 0.7:
        i, text = rng.integers(len(at[key])), at[key]
        at[key] = text[:i] + chr(rng.integers(33, 300)) + text[i + 1:]
      elif rng.random() < 0.3:
        del at[key]
      else:
        at[key] = VALUES[rng.integers(len(VALUES))]
      break
  return segment


def test_a_damaged_outline_is_refused_or_drawn():
  """pycocotools writes outside of its memory for some of them."""
  rng, n_bad = np.random.default_rng(2), 0
  n = 1500
  for i in range(n):
    counts = runs(rng)
    whole = (polygons(rng) if i % 3 == 0 else {
        "size": [*SIZE], "counts": counts if i % 3 == 1 else drawn(
            {"size": [*SIZE], "counts": counts})})
    segment = damaged(rng, whole)
    try:
      mask = outlines.decode(segment, SIZE)
    except ValueError as e:
      n_bad += 1
      assert len(str(e)) < 500
      continue
    text = outlines.encode(segment, SIZE)["counts"]
    np.testing.assert_array_equal(mask, filled(outlines.rle_counts(text)))
    if isinstance(segment, list):
      assert text == drawn(segment)
  assert 0.3 * n < n_bad < n - 50


def test_limits():
  """Of what pycocotools can number, and can hold in memory."""
  square = [[0, 0, 2**19, 0, 2**19, 9, 0, 9]]
  with pytest.raises(ValueError, match="is 1048594 pixels long"):
    outlines.encode(square, SIZE)
  with pytest.raises(ValueError, match="not finite, or beyond 16777216"):
    outlines.encode([[0, 0, 2**24 + 2, 0, 5, 9]], SIZE)
  with pytest.raises(ValueError, match="65536 x 32768 pixels, which are 2147"):
    outlines.encode([[0, 0, 5, 0, 5, 9]], (2**15, 2**16))
  found = outlines.encode([[0, 0, 5, 0, 5, 9]], (2**15, 2**16 - 1))
  assert pymask.area(found) == pymask.area(
      outlines.encode([[0, 0, 5, 0, 5, 9]], SIZE))


# Files.


@pytest.fixture
def written(tmp_path):
  """A file of outlines, and these; with some of each kind, and without."""
  rng = np.random.default_rng(3)
  segments = [None, polygons(rng), {"size": [*SIZE], "counts": runs(rng)}, None,
              polygons(rng), polygons(rng),
              {"size": [*SIZE], "counts": drawn({"size": [*SIZE],
                                                 "counts": runs(rng)})}]
  path = tmp_path / "x.safetensors"
  path.write_bytes(outline_files.save(segments, np.array([SIZE] * 7)))
  return path, segments


def test_files_hold_all_digits(written):
  path, segments = written
  found = outline_files.load(path)
  assert [found[i] for i in range(7)] == segments
  exist = [segment is not None for segment in segments]
  assert found.exist().tolist() == exist
  assert outline_files.exist(path).tolist() == exist
  chosen = outlines.Chosen(found, np.array([6, 1, 0]))
  assert [*chosen] == [segments[6], segments[1], None]
  assert chosen.exist().tolist() == [True, True, False]
  # The same outlines give the same bytes, and there may be none.
  assert outline_files.save(segments, np.array([SIZE] * 7)) == (
      path.read_bytes())
  path.write_bytes(outline_files.save([], np.zeros((0, 2))))
  assert outline_files.load(path).exist().tolist() == []


@pytest.mark.parametrize("name, change", [
    ("points", lambda x: x[:-1]), ("points", lambda x: x * np.nan),
    ("points", lambda x: x + 1e9), ("points", lambda x: x.astype("f4")),
    ("points", lambda x: x[None]), ("ends", lambda x: x[:-1]),
    ("ends", lambda x: x[::-1].copy()), ("ends", lambda x: x - 1),
    ("starts", lambda x: x[:-1]), ("starts", lambda x: x * 0),
    ("starts", lambda x: x[:0]), ("starts", lambda x: x.astype("i4")),
    ("rle_rows", lambda x: x + 99), ("rle_rows", lambda x: x - 99),
    ("rle_rows", lambda x: x[1:]), ("rle_ends", lambda x: x // 2),
    ("rle_ends", lambda x: x[:0]), ("rle_texts", lambda x: x[:-1]),
    ("rle_texts", lambda x: x ^ 1), ("rle_texts", lambda x: x * 0 + 48),
    ("more", lambda x: np.zeros(2))])
def test_a_damaged_file_is_refused(written, name, change):
  path, _ = written
  arrays = safetensors.numpy.load_file(path)
  arrays[name] = change(arrays.get(name))
  path.write_bytes(safetensors.numpy.save(arrays))
  with pytest.raises(ValueError) as e:
    outline_files.load(path)
  assert len(str(e.value).splitlines()) == 1
  with contextlib.suppress(ValueError):  # Less of it is read.
    assert len(outline_files.exist(path)) in (6, 7)


def test_flipped_bits_of_a_file_are_refused_or_read(written):
  path, _ = written
  whole, rng = path.read_bytes(), np.random.default_rng(0)
  for _ in range(300):
    data = bytearray(whole)
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    try:
      found = outline_files.load(path)
    except ValueError:
      continue
    for i in range(len(found.exist())):
      try:
        outlines.decode(found[i], SIZE)
      except ValueError as e:
        assert len(str(e)) < 500
