"""Sources in memory: the digits; intact and damaged idx files."""

import gzip

import numpy as np
import pytest
from sklearn import datasets
from source_files import fails, records, write_idx, write_mnist

from metaformer_jax.data.sources import arrays


@pytest.fixture
def mnist(tmp_path):
  """A folder with idx files, and the arrays in them by name."""
  return tmp_path, write_mnist(tmp_path)


# Digits.


def test_digits_are_scikit_learns_scaled_to_255():
  parts = arrays.digits(True), arrays.digits(False)
  assert [len(p) for p in parts] == [1500, 297]
  assert [p.n_classes for p in parts] == [10, 10]
  all_records = records(parts[0]) + records(parts[1])
  images = np.stack([r["image"] for r in all_records])
  assert images.dtype == np.uint8 and images.shape == (1797, 8, 8)
  raw = datasets.load_digits()
  # Of the 17 values only 8 is at a half, 127.5, which rounds up to even.
  np.testing.assert_array_equal(
      images, np.floor(raw.images * 255 / 16 + 0.5))
  assert [r["label"] for r in all_records] == raw.target.tolist()
  # The first row of the first digit, a zero, is 0 0 5 13 9 1 0 0 of 16.
  assert images[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
  assert [r["label"] for r in all_records[:5]] == [0, 1, 2, 3, 4]
  assert (images.min(), images.max()) == (0, 255)


def test_in_memory_refuses_what_does_not_match():
  images = np.zeros((3, 2, 2), np.uint8)
  with pytest.raises(ValueError, match="3 images but 2 labels"):
    arrays.InMemory(images, np.array([0, 1]))
  with pytest.raises(ValueError, match="0 images"):
    arrays.InMemory(images[:0], np.array([], np.int64))


# idx files.


@pytest.mark.parametrize("train", [True, False])
def test_idx_gives_what_was_written(mnist, train):
  folder, written = mnist
  source = arrays.idx(str(folder), train)
  prefix = "train" if train else "t10k"
  images = written[f"{prefix}-images-idx3-ubyte"]
  labels = written[f"{prefix}-labels-idx1-ubyte"].tolist()
  got = records(source)
  assert [r["label"] for r in got] == labels
  assert all(isinstance(r["label"], int) for r in got)
  np.testing.assert_array_equal([r["image"] for r in got], images)
  assert got[0]["image"].dtype == np.uint8
  assert source.n_classes == max(labels) + 1


def test_idx_prefers_the_plain_file_and_expands_the_home_folder(
    mnist, monkeypatch):
  folder, _ = mnist
  monkeypatch.setenv("HOME", str(folder.parent))
  write_idx(folder, "train-labels-idx1-ubyte", np.arange(7, dtype=np.uint8))
  source = arrays.idx(f"~/{folder.name}", True)
  assert [r["label"] for r in records(source)] == list(range(7))


def plain(data):
  return gzip.decompress(data)


DAMAGE = {
    "cut gzip": (lambda d: d[:-9], "cannot be read"),
    "wrong checksum": (lambda d: d[:-8] + b"\0" * 8, "cannot be read"),
    "no gzip": (plain, "cannot be read"),
    "corrupt deflate": (lambda d: d[:12] + b"\xff" * 8 + d[20:],
                        "cannot be read"),
    "empty": (lambda d: b"", "is not an idx file"),
    "cut header": (lambda d: gzip.compress(plain(d)[:15]),
                   "is not an idx file"),
    "signed bytes": (lambda d: gzip.compress(b"\0\0\x09\x03" + plain(d)[4:]),
                     "is not an idx file"),
    "one dimension": (lambda d: gzip.compress(b"\0\0\x08\x01" + plain(d)[4:]),
                      "is not an idx file"),
    "bad magic": (lambda d: gzip.compress(b"\1\0\x08\x03" + plain(d)[4:]),
                  "is not an idx file"),
    "cut data": (lambda d: gzip.compress(plain(d)[:-1]),
                 "holds 104 values, not 7x5x3"),
    "more data": (lambda d: gzip.compress(plain(d) + b"\0"),
                  "holds 106 values, not 7x5x3"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_idx_names_the_damaged_file(mnist, kind):
  damage, message = DAMAGE[kind]
  file = mnist[0] / "train-images-idx3-ubyte.gz"
  file.write_bytes(damage(file.read_bytes()))
  fails(lambda: arrays.idx(str(mnist[0]), True), file, message)
  arrays.idx(str(mnist[0]), False)  # The other split does not need it.


def test_idx_names_what_is_missing(mnist, tmp_path):
  folder, _ = mnist
  (folder / "t10k-labels-idx1-ubyte").unlink()
  fails(lambda: arrays.idx(str(folder), False),
        folder, "t10k-labels-idx1-ubyte", "config.data.path")
  fails(lambda: arrays.idx(str(tmp_path / "none"), True),
        tmp_path / "none", "train-images-idx3-ubyte")


def test_idx_counts_images_and_labels(mnist):
  folder, _ = mnist
  write_idx(folder, "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
  fails(lambda: arrays.idx(str(folder), False),
        folder, "2 t10k images but 3 labels")


def test_idx_without_images_is_a_config_error(mnist):
  folder, _ = mnist
  write_idx(folder, "t10k-images-idx3-ubyte", np.zeros((0, 5, 3), np.uint8))
  write_idx(folder, "t10k-labels-idx1-ubyte", np.zeros(0, np.uint8))
  fails(lambda: arrays.idx(str(folder), False), folder)
