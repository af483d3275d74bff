"""Any file is decoded, or refused, in bounded time and memory."""

import collections
import io
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import time
import zlib

import image_files
import image_grammar
import numpy as np
import preprocessing
import pytest
from PIL import Image

from metaformer_jax.config import schema, tasks
from metaformer_jax.data import image_costs, images
from metaformer_jax.data.transforms import classification, framing

ROOT = pathlib.Path(__file__).parents[2]
encode = image_files.encode

# Of the random files: their limit of pixels, processor time for each, and
# memory beyond what the imports took. FUZZ_SECONDS is for how long to try.
PIXELS, SECONDS, ROOM = 2**20, 15, 2**29
LONG = int(os.environ.get("FUZZ_SECONDS", "1800"))


def scans_of(data: bytes) -> list[int]:
  """Where the scans of a JPEG begin, and where it ends."""
  return [m.start() for m in re.finditer(rb"\xff\xda\x00[\x08\x0a\x0c\x0e]",
                                         data)] + [len(data) - 2]


def repeated(data: bytes, n: int) -> bytes:
  """A JPEG whose last scan comes n times more."""
  *_, start, end = scans_of(data)
  return data[:end] + n * data[start:end] + data[end:]


GRAY = encode(Image.new("L", (2000, 2000)), "JPEG", progressive=True)


def one_component(n: int) -> bytes:
  """A JPEG that is not progressive, with n scans of its first component."""
  data = encode(Image.new("RGB", (2000, 2000)), "JPEG")
  start, end = scans_of(data)
  scan = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + data[start + 14:end]
  return data[:start] + n * scan + data[end:]


def test_scans_of_a_jpeg_are_counted():
  small = encode(Image.new("L", (24, 16), 9), "JPEG", progressive=True)
  np.testing.assert_array_equal(
      np.asarray(images.decode(repeated(small, 3_000))),
      np.asarray(images.decode(small)))
  assert images.decode(repeated(GRAY, 14), 4_000_000).size == (2000, 2000)
  for data in (repeated(GRAY, 5_000), one_component(500)):
    start = time.thread_time()
    with pytest.raises(ValueError, match=r"^a JPEG of 2000 x 2000 pixels with "
                       r"\d+ scans takes too long; save it again$"):
      images.decode(data)
    assert time.thread_time() - start < 1


def test_bytes_after_a_jpeg_are_no_scans():
  """As the film in a phone's picture."""
  rest = b"\xff\xda\x00\x0c\x03" * 100_000
  data, pixels = encode(image_files.NOISE, "JPEG"), image_files.NOISE
  got = np.asarray(images.decode(data + rest))
  assert np.abs(got.astype(int) - pixels).mean() < 60
  np.testing.assert_array_equal(got, np.asarray(images.decode(data)))


def commented_gif() -> bytes:
  """Comments, each of which Pillow copies with all before it."""
  data = encode(Image.new("P", (4, 4)), "GIF")
  place = data.index(b",\0\0\0\0")
  comment = b"!\xfe" + 200 * (b"\xff" + bytes(255)) + b"\0"
  return data[:place] + comment * 4_000 + data[place:]


def profiled_png() -> bytes:
  profile = b"iCCP", b"name\0\0" + zlib.compress(bytes(900_000))
  return image_files.png(1, 1, rows=bytes(4), chunks=[profile] * 5_000)


SLOW = {
    "iccp": profiled_png,
    "comments": commented_gif,
    "markers": lambda: (image_files.encode(image_files.NOISE, "JPEG")[:2]
                        + b"\xff\xfe\x00\x02" * 3_000_000),
    "run lengths": lambda: (
        b"BM" + bytes(8) + (54 + 1024).to_bytes(4, "little")
        + np.array([40, 6000, 6000, 0x80001, 1, 0, 0, 0, 256, 0], "<u4"
                   ).tobytes() + bytes(1024) + b"\1\5" * 4_000_000),
    "values": lambda: b"P6 3000 3000 254\n" + bytes(27_000_000),
    "a comment": lambda: b"P6 #" + b"a" * 20_000_000}


@pytest.mark.parametrize("name", SLOW)
def test_the_time_of_a_file_is_limited(name, monkeypatch):
  data = SLOW[name]()
  monkeypatch.setattr(images, "_SECONDS", 0.3)
  monkeypatch.setattr(images, "_PIXELS_PER_SECOND", 1e12)
  start = time.thread_time()
  with pytest.raises(TimeoutError, match=r"^decoding takes more than 0 s$"):
    images.decode(data)
  assert time.thread_time() - start < 1
  file = io.BytesIO(data)
  if name not in ("run lengths", "values"):  # It is in the header.
    with pytest.raises(TimeoutError):
      images.size(file)


def test_waiting_is_no_time():
  """A file on a slow disk, or a busy machine."""
  class Slow(io.BytesIO):
    def read(self, size=-1):
      time.sleep(0.01)
      return super().read(size)

  file = image_costs.Timed(Slow(bytes(200)), 0.5)
  assert sum(len(file.read(1)) for _ in range(200)) == 200


# Extreme shapes.


def row(width: int, height: int) -> bytes:
  return image_files.png(width, height, rows=bytes(height * (1 + 3 * width)))


@pytest.mark.parametrize("size", [(40_000, 1), (1, 40_000)])
def test_no_picture_is_resized_to_more_than_the_limit(size):
  """197 bytes would take ten gigabytes; training crops a part that is not."""
  transform = preprocessing.made(
      classification.EvalTransform, schema.Data(),
      tasks.Classification(image_size=224))
  record = {"image": row(*size), "label": 0}
  with pytest.raises(ValueError, match=(
      rf"^{size[0]} x {size[1]} pixels resized to \d+ x \d+ pixels are more "
      r"than config\.data\.max_pixels, 50000000$")):
    transform(record)
  assert transform({"image": row(200, 1), "label": 0})["image"].shape == (
      224, 224, 3)
  train = preprocessing.made(
      classification.TrainTransform, schema.Data(),
      tasks.Classification(image_size=224))
  assert train(record, np.random.default_rng(0))["image"].shape == (
      224, 224, 3)


def test_a_side_is_limited():
  images.decode(row(65_535, 1))
  with pytest.raises(ValueError, match=r"^1 x 65536 pixels: a side is longer"):
    images.decode(row(1, 65_536))


def test_long_images_do_not_make_a_large_canvas():
  """Of all sizes up to the limit of pixels, in any number of canvases."""
  rng, most = np.random.default_rng(0), 10**6
  task = tasks.Segmentation(eval_canvases=2)
  sides = np.exp(rng.uniform(0, np.log(65_535), (2_000, 1)))
  sizes = np.concatenate([sides, np.minimum(most / sides, 65_535)], 1)
  sizes = np.maximum(sizes.astype(int), 1)
  for canvas in framing.choose(framing.usable(sizes, most), task):
    assert np.prod(canvas.labels) <= 4.2 * most
  usual = sizes[(sizes.max(1) < 2_000)]
  np.testing.assert_array_equal(framing.usable(usual, most), usual)


# TIFF.


def tiff(tags: dict[int, tuple[int, int, int]], rest: bytes = b"") -> bytes:
  """Tag -> (type, count, value or place)."""
  rows = b"".join(np.array([tag, kind], "<u2").tobytes() +
                  np.array(values, "<u4").tobytes()
                  for tag, (kind, *values) in tags.items())
  return (b"II*\0\x08\0\0\0" + np.array([len(tags)], "<u2").tobytes() + rows
          + bytes(4) + rest)


@pytest.mark.parametrize("tags,words", [
    (dict.fromkeys(range(3_999), (1, 90_000, 8)), "3999 tags have 359910000 "),
    (dict.fromkeys(range(4_999), (3, 1, 1)), "with 4999 tags"),
    ({259: (3, 1, 50_000)}, "of compression 50000; save it again"),
    ({259: (3, 1, 8), 273: (4, 9, 20), 279: (3, 9_000, 9_999)},
     "9000 strips or tiles have"),
    ({273: (4, 200_000, 20)}, "whose 200000 strips")])
def test_a_tiff_that_uses_its_bytes_again_is_refused(tags, words):
  """Before Pillow or libtiff reads it."""
  data = tiff(tags, b"\xff" * 1_000_000)
  with pytest.raises(ValueError, match=f"^a TIFF .*{words}"):
    images.decode(data)
  with pytest.raises(ValueError, match=r"^a TIFF"):
    images.size(io.BytesIO(data))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("form", [None, "tiff_lzw", "tiff_deflate", "packbits",
                                  "jpeg", "tiff_adobe_deflate"])
def test_usual_tiffs_are_decoded(form, big):
  for pixels in (image_files.NOISE, np.zeros((300, 1000, 3), np.uint8)):
    data = encode(pixels, "TIFF", compression=form, big_tiff=big)
    got = np.asarray(images.decode(data))
    if form == "jpeg":
      assert got.shape == pixels.shape
    else:
      np.testing.assert_array_equal(got, pixels)


# Random files.


@pytest.mark.parametrize("seconds,seed", [
    (4, 0), pytest.param(LONG, 1, marks=pytest.mark.soak)])
def test_random_files_take_bounded_time_and_memory(tmp_path, seconds, seed):
  """In a process that ends if it takes more; the last file is kept."""
  done = subprocess.run(
      [sys.executable, __file__, str(seconds), str(seed), str(tmp_path)],
      capture_output=True, text=True, timeout=10 * seconds + 100,
      env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
  assert done.returncode == 0, (done.stderr, list(tmp_path.iterdir()))
  found = json.loads(done.stdout)
  print(found)
  assert found["seconds"] < SECONDS
  assert found["bytes"] < ROOM
  # The grammar reaches the decoders: of each format, some files are good.
  assert found["files"].keys() == image_grammar.FORMATS.keys()
  for form, n in found["good"].items():
    assert n > 0 or seconds < 100, form


def _serve(seconds: str, seed: str, folder: str) -> None:
  """Reads random files for a time; prints what they took."""
  taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
  limit = taken * resource.getpagesize() + ROOM
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  data = schema.Data(max_pixels=PIXELS)
  small = tasks.Classification(image_size=32)
  made = [preprocessing.made(kind, data, small) for kind in (
      classification.EvalTransform, classification.TrainTransform)]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  files, good, kinds, slowest = (collections.Counter() for _ in range(4))
  end, i = time.monotonic() + float(seconds), 0
  while time.monotonic() < end or i < 80:  # Also on a busy machine.
    rng = np.random.default_rng((int(seed), i))
    i += 1
    form, data = image_grammar.image(rng)
    path = pathlib.Path(folder) / f"{seed}-{i}.{form}"
    path.write_bytes(data)
    files[form] += 1
    for read in (lambda: made[0]({"image": data, "label": 0}),  # noqa: B023
                 lambda: made[1]({"image": data, "label": 0}, rng),  # noqa: B023
                 lambda: images.size(io.BytesIO(data), PIXELS),  # noqa: B023
                 lambda: images.decode_labels(data, PIXELS)):  # noqa: B023
      start = time.thread_time()
      try:
        read()
        good[form] += 1
      except MemoryError:
        raise
      except Exception as e:
        kinds[type(e).__name__] += 1
      spent = time.thread_time() - start
      slowest[form] = max(slowest[form], spent)
      if spent > SECONDS:
        sys.exit(f"{path}: {spent:.1f} s")
    path.unlink()
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  print(json.dumps({"files": files, "good": good, "errors": kinds,
                    "slowest": {k: round(v, 2) for k, v in slowest.items()},
                    "seconds": max(slowest.values()),
                    "bytes": 1024 * (after - before)}))


if __name__ == "__main__":
  _serve(*sys.argv[1:])
