"""Sources held in memory and in folders: what each index gives, what fails."""

import gzip
import os
import pickle
import struct

import numpy as np
import pytest
import tiny_imagenet
from sklearn import datasets

from metaformer_jax import errors
from metaformer_jax.config import schema
from metaformer_jax.data.sources import folders as sources


def fails(call, *parts):
  """`call` raises ConfigError: one line that holds each of `parts`."""
  with pytest.raises(errors.ConfigError) as caught:
    call()
  message = str(caught.value)
  assert "\n" not in message
  for part in parts:
    assert str(part) in message, (part, message)


def records(source):
  return [source[i] for i in range(len(source))]


# Digits.


def test_digits_are_scikit_learns_scaled_to_255():
  parts = sources.digits(True), sources.digits(False)
  assert [len(p) for p in parts] == [1500, 297]
  assert [p.n_classes for p in parts] == [10, 10]
  all_records = records(parts[0]) + records(parts[1])
  images = np.stack([r["image"] for r in all_records])
  assert images.dtype == np.uint8 and images.shape == (1797, 8, 8)
  raw = datasets.load_digits()
  # Of the 17 values only 8 lies on a half, 127.5; its even side is up.
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
    sources.InMemory(images, np.array([0, 1]))
  with pytest.raises(ValueError, match="0 images"):
    sources.InMemory(images[:0], np.array([], np.int64))


# idx files.


def idx_bytes(array, *, kind=8):
  header = bytes((0, 0, kind, array.ndim))
  sizes = b"".join(struct.pack(">I", n) for n in array.shape)
  return header + sizes + array.tobytes()


def write_idx(folder, name, array, gz=False):
  data = idx_bytes(array)
  file = folder / (f"{name}.gz" if gz else name)
  file.write_bytes(gzip.compress(data) if gz else data)
  return file


@pytest.fixture
def mnist(tmp_path):
  """A folder with idx files: gzipped to train, plain to test; its arrays."""
  rng = np.random.default_rng(0)
  arrays = {
      "train-images-idx3-ubyte": rng.integers(0, 256, (7, 5, 3), np.uint8),
      "train-labels-idx1-ubyte": np.array([3, 0, 9, 255, 1, 1, 2], np.uint8),
      "t10k-images-idx3-ubyte": rng.integers(0, 256, (2, 5, 3), np.uint8),
      "t10k-labels-idx1-ubyte": np.array([4, 3], np.uint8),
  }
  for name, array in arrays.items():
    write_idx(tmp_path, name, array, gz=name.startswith("train"))
  return tmp_path, arrays


@pytest.mark.parametrize("train", [True, False])
def test_idx_gives_what_was_written(mnist, train):
  folder, arrays = mnist
  source = sources.idx(str(folder), train)
  prefix = "train" if train else "t10k"
  images = arrays[f"{prefix}-images-idx3-ubyte"]
  labels = arrays[f"{prefix}-labels-idx1-ubyte"].tolist()
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
  source = sources.idx(f"~/{folder.name}", True)
  assert [r["label"] for r in records(source)] == list(range(7))


def plain(data):
  return gzip.decompress(data)


DAMAGE = {
    "cut gzip": (lambda d: d[:-9], "cannot be read"),
    "wrong checksum": (lambda d: d[:-8] + b"\0" * 8, "cannot be read"),
    "no gzip": (plain, "cannot be read"),
    "corrupt deflate": (lambda d: d[:12] + b"\xff" * 8 + d[20:],
                        "cannot be read"),
    "empty": (lambda d: b"", "is no idx file"),
    "cut header": (lambda d: gzip.compress(plain(d)[:15]), "is no idx file"),
    "signed bytes": (lambda d: gzip.compress(b"\0\0\x09\x03" + plain(d)[4:]),
                     "is no idx file"),
    "one dimension": (lambda d: gzip.compress(b"\0\0\x08\x01" + plain(d)[4:]),
                      "is no idx file"),
    "bad magic": (lambda d: gzip.compress(b"\1\0\x08\x03" + plain(d)[4:]),
                  "is no idx file"),
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
  fails(lambda: sources.idx(str(mnist[0]), True), file, message)
  sources.idx(str(mnist[0]), False)  # The other split does not need it.


def test_idx_names_what_is_missing(mnist, tmp_path):
  folder, _ = mnist
  (folder / "t10k-labels-idx1-ubyte").unlink()
  fails(lambda: sources.idx(str(folder), False),
        folder, "t10k-labels-idx1-ubyte", "config.data.path")
  fails(lambda: sources.idx(str(tmp_path / "none"), True),
        tmp_path / "none", "train-images-idx3-ubyte")


def test_idx_counts_images_and_labels(mnist):
  folder, _ = mnist
  write_idx(folder, "t10k-labels-idx1-ubyte", np.zeros(3, np.uint8))
  fails(lambda: sources.idx(str(folder), False),
        folder, "2 t10k images but 3 labels")


def test_idx_without_images_is_a_config_error(mnist):
  folder, _ = mnist
  write_idx(folder, "t10k-images-idx3-ubyte", np.zeros((0, 5, 3), np.uint8))
  write_idx(folder, "t10k-labels-idx1-ubyte", np.zeros(0, np.uint8))
  fails(lambda: sources.idx(str(folder), False), folder)


# Class folders.


def write(root, *names):
  """Files below `root` that hold their own names."""
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(name.encode())


def folder_source(root, split="train", **kw):
  return sources.create(
      schema.Data(source="folder", path=str(root), **kw), split)


def named(source):
  """[(path below the split's folder, label)] in the source's order."""
  return [(r["image"].decode(), r["label"]) for r in records(source)]


def image_folder(root):
  """torchvision.datasets.folder.make_dataset, without torchvision."""
  found = []
  for label, name in enumerate(sorted(
      e.name for e in os.scandir(root) if e.is_dir())):
    for where, _, files in sorted(os.walk(root / name, followlinks=True)):
      found += [(os.path.relpath(os.path.join(where, file), root), label)
                for file in sorted(files)
                if file.lower().endswith(sources.IMAGE_SUFFIXES)]
  return found


FLAT = ("b/2.JPEG", "b/10.jpg", "b/1.png", "a b/x.TIFF", "Z/q.webp",
        "Z/Q.webp", "ü/ö.pgm", "10/a.bmp", "9/a.ppm")


def test_folder_orders_classes_and_files_as_image_folder(tmp_path):
  write(tmp_path / "train", *FLAT, "b/notes.txt", "b/jpg", "stray.png",
        "b/x.gif")
  source = folder_source(tmp_path)
  # By code points: digits, capitals, small letters, then the rest.
  assert named(source) == [
      ("10/a.bmp", 0), ("9/a.ppm", 1), ("Z/Q.webp", 2), ("Z/q.webp", 2),
      ("a b/x.TIFF", 3), ("b/1.png", 4), ("b/10.jpg", 4), ("b/2.JPEG", 4),
      ("ü/ö.pgm", 5)]
  assert named(source) == image_folder(tmp_path / "train")
  assert source.n_classes == 6 and len(source) == 9
  assert source[5]["path"] == str(tmp_path / "train" / "b" / "1.png")


NESTED = ("b/y.jpg", "b/a/x.jpg", "b/a-b/x.jpg", "b/a.jpg", "b/a/z/w.PNG",
          "a/1/2/3.jpg")


def test_folder_takes_images_of_nested_folders_and_links(tmp_path):
  write(tmp_path / "train", *NESTED)
  write(tmp_path / "elsewhere", "v.jpg")
  (tmp_path / "train" / "c").symlink_to(tmp_path / "elsewhere")
  (tmp_path / "train" / "d").mkdir()
  (tmp_path / "train" / "d" / "link").symlink_to(tmp_path / "elsewhere")
  got = named(folder_source(tmp_path))
  assert got[-2:] == [("v.jpg", 2), ("v.jpg", 3)]
  assert sorted(got[:-2]) == sorted((n, "ab".index(n[0])) for n in NESTED)
  assert [label for _, label in got] == [0, 1, 1, 1, 1, 1, 2, 3]


def test_folder_orders_nested_files_as_image_folder(tmp_path):
  write(tmp_path / "train", *NESTED)
  assert named(folder_source(tmp_path)) == image_folder(tmp_path / "train")


def test_folder_walks_into_a_folder_with_an_images_name(tmp_path):
  write(tmp_path / "train", "a/1.jpg", "a/2.jpg/3.jpg")
  assert named(folder_source(tmp_path)) == [("a/1.jpg", 0),
                                            ("a/2.jpg/3.jpg", 0)]
  assert named(folder_source(tmp_path)) == image_folder(tmp_path / "train")


def test_folder_leaves_out_nothing_that_it_cannot_list(tmp_path, monkeypatch):
  write(tmp_path / "train", "a/1.jpg", "a/b/2.jpg")
  closed, scandir = str(tmp_path / "train" / "a" / "b"), os.scandir

  def scan(path):  # Who runs the tests may be let into any folder.
    if path == closed:
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", scan)
  fails(lambda: folder_source(tmp_path), "config.data.path", closed,
        "cannot be read")


def test_folder_tells_a_path_without_the_file(tmp_path):
  write(tmp_path / "train", "a/1.jpg", "b/2.jpg")
  source = folder_source(tmp_path)
  (tmp_path / "train" / "b" / "2.jpg").unlink()
  assert source.path(1) == str(tmp_path / "train" / "b" / "2.jpg")
  with pytest.raises(FileNotFoundError, match=r"b/2\.jpg"):
    source[1]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless"])
def test_folder_reads_files_only(tmp_path, kind):
  """Pipes would be waited for; devices and some files have no end."""
  write(tmp_path / "train", "a/1.jpg")
  file = tmp_path / "train" / "a" / "1.jpg"
  source = folder_source(tmp_path)
  if kind == "endless":
    os.truncate(file, 2**40)
  else:
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir,
     "device": lambda path: os.symlink("/dev/zero", path)}[kind](file)
  with pytest.raises(OSError, match=r"a/1\.jpg'?( is no reg| has 1\d+ b|$)"):
    source[0]


@pytest.mark.parametrize("links", [
    {"a/b/up": "."}, {"a/b/up": "a"}, {"a/b/to": "a/c", "a/c/to": "a/b"}],
    ids=str)
def test_folder_in_a_circle_is_an_error(tmp_path, links):
  root = tmp_path / "train"
  write(root, "a/b/1.jpg", "a/c/2.jpg")
  for name, target in links.items():
    (root / name).symlink_to(root / target)
  fails(lambda: folder_source(tmp_path), "config.data.path", "is a link to",
        "which it lies in")


def test_folder_ignores_hidden_folders(tmp_path):
  write(tmp_path / "train", ".cache/x.jpg", "a/x.jpg", "b/x.jpg")
  source = folder_source(tmp_path)
  assert named(source) == [("a/x.jpg", 0), ("b/x.jpg", 1)]
  assert source.n_classes == 2


def test_folder_takes_names_that_are_not_utf8(tmp_path):
  folder = os.fsencode(tmp_path / "train" / "a")
  os.makedirs(folder)
  with open(os.path.join(folder, b"caf\xe9.jpg"), "wb") as f:
    f.write(b"data")
  assert folder_source(tmp_path)[0]["image"] == b"data"


def test_folder_gives_the_bytes_and_labels_of_imagenet(tmp_path):
  tiny_imagenet.write_folder(tmp_path)
  got = records(folder_source(tmp_path))
  assert [(r["image"], r["label"]) for r in got] == [
      (data, tiny_imagenet.SYNSETS.index(synset))
      for synset, _, data in tiny_imagenet.train_images()]
  val = {data: i % 4 for i, (_, data) in
         enumerate(tiny_imagenet.val_images())}
  got = records(folder_source(tmp_path, "eval"))
  assert {r["image"]: r["label"] for r in got} == val
  assert len(got) == tiny_imagenet.N_VAL


def test_folder_val_without_a_class_keeps_the_numbers(tmp_path):
  write(tmp_path / "train", "a/1.jpg", "b/1.jpg", "c/1.jpg")
  write(tmp_path / "val", "c/2.jpg", "a/2.jpg")
  source = folder_source(tmp_path, "eval")
  assert named(source) == [("a/2.jpg", 0), ("c/2.jpg", 2)]
  assert source.n_classes == 3


def test_folder_val_with_an_unknown_class_is_an_error(tmp_path):
  write(tmp_path / "train", "husky/1.jpg", "tabby/1.jpg")
  write(tmp_path / "val", "husky/2.jpg", "taby/2.jpg")
  fails(lambda: folder_source(tmp_path, "eval"),
        tmp_path / "val", "'taby'", "did you mean tabby?")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_folder_of_a_class_without_images_is_an_error(tmp_path, split):
  folder = "train" if split == "train" else "val"
  write(tmp_path / "train", "a/1.jpg", "b/1.jpg")
  write(tmp_path / "val", "a/1.jpg", "b/1.jpg")
  (tmp_path / folder / "b" / "1.jpg").rename(tmp_path / folder / "b" / "1.txt")
  fails(lambda: folder_source(tmp_path, split), tmp_path / folder / "b",
        "no images", ".jpeg")


def test_folder_without_classes_is_an_error(tmp_path):
  write(tmp_path / "train", "1.jpg", ".a/2.jpg")
  fails(lambda: folder_source(tmp_path), tmp_path / "train",
        "no class folders")


@pytest.mark.parametrize("split", ["train", "eval"])
def test_folder_without_the_split_is_an_error(tmp_path, split):
  if split == "eval":
    write(tmp_path / "train", "a/1.jpg")
  fails(lambda: folder_source(tmp_path, split), tmp_path)


# Any source.


def test_create_opens_the_split_that_the_config_names(mnist, tmp_path):
  folder, _ = mnist
  data = schema.Data
  assert len(sources.create(data(source="digits"), "train")) == 1500
  assert len(sources.create(data(source="digits"), "eval")) == 297
  cfg = data(source="idx", path=str(folder))
  assert len(sources.create(cfg, "train")) == 7
  assert len(sources.create(cfg, "eval")) == 2
  write(tmp_path / "fit", "a/1.jpg", "a/2.jpg", "b/3.jpg")
  write(tmp_path / "held out", "b/4.jpg")
  kw = {"train_split": "fit", "eval_split": "held out"}
  assert len(folder_source(tmp_path, "train", **kw)) == 3
  assert named(folder_source(tmp_path, "eval", **kw)) == [("b/4.jpg", 1)]
  with pytest.raises(ValueError, match="unknown source 'zip'"):
    sources.create(data(source="zip"), "train")


def test_a_pickled_source_is_the_same_source(mnist, tmp_path):
  write(tmp_path / "train", *NESTED)
  for source in (sources.digits(False), sources.idx(str(mnist[0]), True),
                 folder_source(tmp_path)):
    copy = pickle.loads(pickle.dumps(source))
    assert (len(copy), copy.n_classes) == (len(source), source.n_classes)
    for one, other in zip(records(source), records(copy), strict=True):
      np.testing.assert_equal(other, one)
