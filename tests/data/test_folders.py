"""Class folders: which images, in which order, and what is an error."""

import os
import pickle

import numpy as np
import pytest
import tiny_imagenet
from source_files import fails, folder_source, named, records, write

from metaformer_jax.config import imagenet, schema
from metaformer_jax.data import sources
from metaformer_jax.data.sources import file_names, folders


def image_folder(root):
  """torchvision.datasets.folder.make_dataset, without torchvision."""
  found = []
  for label, name in enumerate(sorted(
      e.name for e in os.scandir(root) if e.is_dir())):
    for where, _, files in sorted(os.walk(root / name, followlinks=True)):
      found += [(os.path.relpath(os.path.join(where, file), root), label)
                for file in sorted(files)
                if file.lower().endswith(folders.IMAGE_SUFFIXES)]
  return found


FLAT = ("b/2.JPEG", "b/10.jpg", "b/1.png", "a b/x.TIFF", "Z/q.webp",
        "Z/Q.webp", "ü/ö.pgm", "10/a.bmp", "9/a.ppm")


def test_folder_orders_classes_and_files_as_image_folder(tmp_path):
  write(tmp_path / "train", *FLAT, "b/notes.txt", "b/jpg", "stray.png",
        "b/x.gif")
  source = folder_source(tmp_path)
  # By code points: digits, upper case, lower case, then the rest.
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


def test_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
  write(tmp_path / "train", "a/1.jpg", "a/b/2.jpg")
  closed, scandir = str(tmp_path / "train" / "a" / "b"), os.scandir

  def scan(path):  # The user who runs the tests may have access to anything.
    if path == closed:
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", scan)
  fails(lambda: folder_source(tmp_path), "config.data.path", closed,
        "cannot be read")


def test_folder_gives_a_path_without_opening_the_file(tmp_path):
  write(tmp_path / "train", "a/1.jpg", "b/2.jpg")
  source = folder_source(tmp_path)
  (tmp_path / "train" / "b" / "2.jpg").unlink()
  assert source.path(1) == str(tmp_path / "train" / "b" / "2.jpg")
  with pytest.raises(FileNotFoundError, match=r"b/2\.jpg"):
    source[1]


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "endless"])
def test_folder_reads_files_only(tmp_path, kind):
  """Opening a pipe would wait; devices and some files have no end."""
  write(tmp_path / "train", "a/1.jpg")
  file = tmp_path / "train" / "a" / "1.jpg"
  source = folder_source(tmp_path)
  if kind == "endless":
    os.truncate(file, 2**40)
  else:
    file.unlink()
    {"pipe": os.mkfifo, "folder": os.mkdir,
     "device": lambda path: os.symlink("/dev/zero", path)}[kind](file)
  with pytest.raises(OSError, match=r"a/1\.jpg'?( is not a reg| has 1\d+ b|$)"):
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
        "which contains it")


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


# Without an evaluation split.


def held_out(root, fraction=0.2, seed=0, **kw):
  """The files of the two splits."""
  return [{named_file for named_file, _ in named(folder_source(
      root, split, eval_fraction=fraction, eval_seed=seed, **kw))}
      for split in ("train", "eval")]


def many(*sizes):
  return [f"{'abcdefgh'[i]}/{j}.jpg" for i, n in enumerate(sizes)
          for j in range(n)]


@pytest.mark.parametrize("prefix", ["", "train/", "training/"])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.9])
def test_a_part_of_each_class_is_held_out(tmp_path, prefix, fraction):
  sizes = (1, 2, 3, 10, 41)
  write(tmp_path, *(prefix + file for file in many(*sizes)))
  train, held = ({file.removeprefix(prefix) for file in part}
                 for part in held_out(tmp_path, fraction))
  assert not train & held and train | held == set(many(*sizes))
  for name, n in zip("abcde", sizes):
    got = sum(file.startswith(name) for file in held)
    assert got == min(max(1, round(n * fraction)), n - 1)
  # Labels are those of all classes, also of one without a held-out image.
  data = schema.Data(source="folder", path=str(tmp_path),
                     eval_fraction=fraction)
  assert {label for _, label in named(sources.create(data, "eval"))} == {
      1, 2, 3, 4}
  assert sources.classes(data) == (5, ["a", "b", "c", "d", "e"])


def test_the_choice_depends_on_the_seed_and_hardly_on_other_images(tmp_path):
  write(tmp_path, *many(100, 100))
  _, held = held_out(tmp_path)
  assert held_out(tmp_path)[1] == held
  other = held_out(tmp_path, seed=1)[1]
  assert len(other) == len(held) == 40 and len(other & held) < 25
  write(tmp_path, *(f"a/new {i}.jpg" for i in range(10)))
  after = held_out(tmp_path)[1]
  assert {f for f in after if f[0] == "b"} == {f for f in held if f[0] == "b"}
  # As many leave as new ones are chosen, less those that are added.
  assert len(held - after) <= len([f for f in after if "new" in f])


def test_an_evaluation_split_is_used_if_there_is_one(tmp_path):
  write(tmp_path, "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg",
        "test/b/3.jpg")
  assert held_out(tmp_path) == [
      {"train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg"}, {"test/b/3.jpg"}]
  for name in ("validation", "valid", "val"):  # Each before those above.
    write(tmp_path, f"{name}/a/{name}.jpg")
    assert held_out(tmp_path)[1] == {f"{name}/a/{name}.jpg"}
  assert held_out(tmp_path, eval_split="test")[1] == {"test/b/3.jpg"}


def test_numbered_classes_are_held_out_as_well(tmp_path):
  write(tmp_path, *(f"{n}/{i}.jpg" for n in (0, 2) for i in range(5)))
  data = schema.Data(source="folder", path=str(tmp_path), eval_fraction=0.2)
  source = sources.create(data, "eval", numbered=True)
  assert sorted(label for _, label in named(source)) == [0, 2]


def test_a_split_that_cannot_be_read_is_a_line(tmp_path, monkeypatch):
  write(tmp_path, "train/a/1.jpg")

  def refuse(path):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr(os, "scandir", refuse)
  fails(lambda: folder_source(tmp_path), "config.data.path", "Permission")


def test_a_class_may_be_called_like_a_split(tmp_path):
  """A split holds folders; a class holds images."""
  files = [f"{name}/{i}.jpg" for name in ("car", "test", "train", "val")
           for i in range(5)]
  write(tmp_path, *files)
  train, held = held_out(tmp_path)
  assert train | held == set(files) and len(held) == 4


def lines(root, **kw):
  cfg = schema.Experiment(data=schema.Data(
      source="folder", path=str(root), **kw))
  return list(folders.check(cfg, files=True))


def test_folders_without_splits_are_a_line_that_helps(tmp_path):
  write(tmp_path / "photos", *many(2, 2))
  line, _ = lines(tmp_path / "photos")
  assert "config.data.eval_fraction=0.2" in line
  assert not lines(tmp_path / "photos", eval_fraction=0.2)
  write(tmp_path / "half", *(f"train/{file}" for file in many(2, 2)))
  line, = lines(tmp_path / "half")
  assert "no folder 'val'" in line and "eval_fraction=0.2" in line
  assert not lines(tmp_path / "half", eval_fraction=0.2)
  # A name that was given is not replaced.
  line, = lines(tmp_path / "half", eval_fraction=0.2, eval_split="vla")
  assert "config.data.eval_split: " in line and "'vla'" in line
  write(tmp_path / "evaluation", *(f"val/{file}" for file in many(2, 2)))
  line, = lines(tmp_path / "evaluation", eval_fraction=0.2)
  assert "no folder 'train'" in line
  write(tmp_path / "single", "a/1.jpg", "b/1.jpg")
  fails(lambda: folder_source(tmp_path / "single", "eval", eval_fraction=0.5),
        "config.data.eval_fraction", "two images")


# Names that number the classes.


def test_names_number_the_classes(tmp_path):
  write(tmp_path, "val/b/1.jpg", "val/d/2.jpg")
  data = schema.Data(source="folder", path=str(tmp_path))
  source = sources.create(data, "eval", names=("d", "c", "b", "a"))
  assert named(source) == [("val/d/2.jpg", 0), ("val/b/1.jpg", 2)]
  assert source.n_classes == 4
  fails(lambda: sources.create(data, "eval", names=("bb", "c")),
        "config.task.class_names", "'b'", "did you mean bb")


class Named:
  """A source with names."""

  n_classes, class_names = 3, ("x", "y", "z")

  def __init__(self, data=None, split=None):
    pass

  def __len__(self):
    return 3

  def __getitem__(self, index):
    return {"image": b"", "label": index}


def test_names_number_the_classes_of_any_source_that_has_names():
  data = schema.Data(source=f"{__name__}:Named")
  for names, want in ((None, [0, 1, 2]), (("x", "y", "z"), [0, 1, 2]),
                      (("z", "a", "y", "x"), [3, 2, 0])):
    source = sources.create(data, "eval", names=names)
    assert [r["label"] for r in records(source)] == want
    assert source.n_classes == len(names or "xyz")
  fails(lambda: sources.create(data, "train", names=("x", "z")), "'y'")
  # Labels without names are what they are.
  assert len(sources.create(schema.Data(source="digits"), "eval",
                            names=tuple("abcdefghij"))) == 297


def test_words_for_the_classes_of_imagenet():
  ids = imagenet.ids()
  assert len(set(ids)) == 1000 and list(ids) == sorted(ids)
  names = imagenet.readable(ids)
  assert names[0] == "tench" and names[281] == "tabby cat"
  assert imagenet.readable(("cat", ids[1])) == ("cat", "goldfish")


def test_a_long_name_makes_only_itself_longer():
  given = [b"%d.png" % i for i in range(20_000)] + [b"n" * 3800, b"", b"end"]
  found = file_names.FileNames(given)
  assert list(found) == given and len(found) == len(given)
  assert (found[0], found[-1], found[-3]) == (b"0.png", b"end", b"n" * 3800)
  assert list(found[5:9]) == given[5:9]
  chosen = np.array([7, 20_000, 3])
  assert list(found[chosen]) == [given[i] for i in chosen]
  assert len(pickle.dumps(found)) < 400_000
  with pytest.raises(IndexError):
    found[len(given)]
