"""Bad examples: replaced or omitted, counted and logged; no other changes."""

import itertools
import logging
import os

import image_files
import loader_cases
import numpy as np
import preprocessing
import pytest
import source_files
from loader_cases import take

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader, sources, streams
from metaformer_jax.data.transforms import classification as transforms

# 1 % of a folder is damaged, in 12 ways; more of its files are odd but valid.
# All names end in .jpg, whatever the files are.
N, CLASSES = 1_200, 30
ODD_ONES = dict(zip(range(40, N, 40), image_files.ODD, strict=False))
KINDS = ("cut jpeg", "jpeg, zeros from the middle", "cut png", "damaged png",
         "empty", "zeros", "html", "float tiff", "bomb: png", "bomb: iTXt",
         "bomb: gif's frame")
BAD = dict(zip((3, 150, 151, 152, 333, 501, 647, 777, 900, 1_001, 1_198),
               KINDS, strict=True))
DANGLING = N - 1
ALL_BAD = [*BAD, DANGLING]
SMALL = tasks.Classification(image_size=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """The folder before and after some of its files were damaged."""
  roots = [tmp_path_factory.mktemp(n) / "train" for n in ("clean", "damaged")]
  pixels = np.random.default_rng(0).integers(0, 256, (N, 6, 5, 3), np.uint8)
  for i in range(N):
    name = f"{i // (N // CLASSES):02}/{i:04}.jpg"
    for root in roots:
      (root / name).parent.mkdir(parents=True, exist_ok=True)
    clean, damaged = (root / name for root in roots)
    odd = image_files.ODD.get(ODD_ONES.get(i), (None,))[0]
    clean.write_bytes(odd or image_files.encode(pixels[i]))
    if i == DANGLING:
      damaged.symlink_to("nowhere.jpg")
    elif i in BAD:
      damaged.write_bytes(image_files.BAD[BAD[i]])
    else:
      os.link(clean, damaged)
  return [root.parent for root in roots]


def pictures(folder, transform=transforms.TrainTransform, **kw):
  data = schema.Data(path=str(folder))
  source = sources.create(data, "train")
  assert len(source) == N
  return loader.Loader(
      source, preprocessing.made(transform, data, SMALL), 150, seed=5, **kw)


def order(n_epochs=2):
  """The index at each position."""
  made = loader_cases.numbers(N, N, seed=5)
  return take(made.train_batches(0), n_epochs)["index"]


def joined(folder, position, n_batches, count=1, **kw):
  """The batches of all processes, joined as the global batches."""
  parts = [take(pictures(folder, process_index=i, process_count=count, **kw)
                .train_batches(position), n_batches) for i in range(count)]
  return {name: np.concatenate(
      [p[name].reshape(n_batches, 150 // count, *p[name].shape[1:])
       for p in parts], 1).reshape(-1, *parts[0][name].shape[1:])
          for name in parts[0]}


@pytest.fixture(scope="module")
def before_and_after(folders):
  return [joined(folder, 0, 16) for folder in folders]


def test_one_percent_bad_moves_nothing_else(before_and_after):
  before, after = before_and_after
  assert len(after["label"]) == 2 * N and not before["replaced"].any()
  assert len(ALL_BAD) == N // 100 == 12
  bad = np.isin(order(), ALL_BAD)
  np.testing.assert_array_equal(after["replaced"], bad)
  assert after["replaced"].sum() == 24
  for name in ("image", "label"):
    np.testing.assert_array_equal(after[name][~bad], before[name][~bad])
  # Replacements differ from the examples that they replace, and among each
  # other.
  assert all((a != b).any() for a, b in
             zip(after["image"][bad], before["image"][bad], strict=True))
  assert len(np.unique(after["image"][bad], axis=0)) == 24


def test_two_processes_replace_alike(folders, before_and_after):
  got = joined(folders[1], 0, 16, count=2)
  for name, array in before_and_after[1].items():
    np.testing.assert_array_equal(got[name], array)


@pytest.mark.parametrize("workers", [
    pytest.param(0, marks=pytest.mark.slow), 2])
def test_ten_are_logged_once_whichever_process_reads_them(
    folders, before_and_after, workers, caplog):
  made = pictures(folders[1], workers=workers)
  got = take(made.train_batches(0), 16)
  for name, array in before_and_after[1].items():
    np.testing.assert_array_equal(got[name], array)
  named = [i for i in order(1) if i in ALL_BAD][:10]
  assert len(caplog.messages) == 11
  for i, message in zip(named, caplog.messages):
    path = folders[1] / "train" / f"{i // 40:02}" / f"{i:04}.jpg"
    assert message.startswith(f"example {i} "), message
    assert str(path) in message
    assert message.endswith("; another example replaces it")
    assert "\n" not in message
  assert caplog.messages[10] == (
      "further bad examples are counted but not logged")
  assert {r.levelno for r in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize("position", [37, 1_150])
def test_resuming_replaces_as_continuing_does(folders, before_and_after,
                                              position):
  got = joined(folders[1], position, 3)
  assert got["replaced"].any()
  for name, array in before_and_after[1].items():
    np.testing.assert_array_equal(got[name], array[position:position + 450])


def test_evaluation_leaves_out_the_bad(folders):
  before, after = (
      take(pictures(folder, transforms.EvalTransform).eval_batches(), 8)
      for folder in folders)
  assert before["mask"].all() and not before["replaced"].any()
  np.testing.assert_array_equal(np.flatnonzero(after["replaced"]), ALL_BAD)
  np.testing.assert_array_equal(after["mask"], ~after["replaced"])
  assert after["image"].shape == (N, 8, 8, 3)
  assert not after["image"][ALL_BAD].any()
  for name in ("image", "label"):
    np.testing.assert_array_equal(after[name][after["mask"]],
                                  before[name][after["mask"]])


# Each example is its own index.


class Bad:
  """A transform that raises for some indices."""

  def __init__(self, *bad, error=MemoryError):
    self._bad, self._error = bad, error

  def __call__(self, record, rng):
    if record["label"] in self._bad:
      raise self._error
    return loader_cases.draw(record, rng)


def numbers(n, *bad, batch_size=None, error=MemoryError, **kw):
  return loader.Loader(loader_cases.Numbers(n), Bad(*bad, error=error),
                       batch_size or n, **kw)


def test_the_replacement_depends_on_seed_epoch_and_index_alone():
  streams = {}
  for seed, batch_size, threads in itertools.product((0, 1), (50, 20), (1, 4)):
    made = numbers(50, 5, batch_size=batch_size, seed=seed, threads=threads)
    got = take(made.train_batches(0), 1_000 // batch_size)
    assert got["replaced"].sum() == 20
    stream = [got[k][got["replaced"]].tolist() for k in ("index", "draw")]
    assert streams.setdefault(seed, stream) == stream
  for index, draw in streams.values():
    assert 5 not in index and len(set(index)) > 10
    assert len(set(draw)) == 20
  assert streams[0] != streams[1]


def test_the_replacement_has_its_own_augmentation():
  """Another draw than that of the same example at its own position."""
  got = take(numbers(50, 5).train_batches(0), 20)
  draws = got["draw"].tolist()
  assert len(set(draws)) == len(draws)


def test_another_bad_example_replaces_nothing():
  bad = range(1, 40)
  got = take(numbers(60, *bad).train_batches(0), 10)
  assert got["replaced"].sum() == 10 * len(bad)
  assert not set(bad) & set(got["index"].tolist())
  # Replacements do not change when another example becomes bad.
  more = take(numbers(60, *bad, 50).train_batches(0), 10)
  same = (got["index"] != 50)
  for name in ("index", "draw"):
    np.testing.assert_array_equal(more[name][same], got[name][same])
  assert (more["index"][~same] != 50).all()


def test_repeats_of_a_bad_example_are_repeats_of_another():
  got = take(numbers(30, *range(10), repeats=3).train_batches(0), 20)
  indices = got["index"].reshape(-1, 3)
  assert (indices == indices[:, :1]).all()
  assert got["replaced"].reshape(20, -1).sum() > 100
  assert len(set(got["draw"].tolist())) == 600


@pytest.mark.parametrize("count", [1, 2])
def test_padding_of_the_evaluation_is_not_counted(count):
  """Although its shapes come from the first example, which is bad."""
  parts = [list(numbers(5, 0, 3, batch_size=4, process_index=i,
                        process_count=count).eval_batches())
           for i in range(count)]
  steps = [{k: np.concatenate([p[k] for p in step]) for k in step[0]}
           for step in zip(*parts, strict=True)]
  got = {k: np.concatenate([s[k] for s in steps]).tolist() for k in steps[0]}
  false = [False] * 3
  assert got["replaced"] == [True, False, False, True, False, *false]
  assert got["mask"] == [False, True, True, False, True, *false]
  assert got["index"] == [0, 1, 2, 0, 4, 0, 0, 0]
  assert got["draw"] == [0, -1, -1, 0, -1, 0, 0, 0]


@pytest.mark.parametrize("error", [StopIteration, OSError, MemoryError])
def test_any_exception_makes_a_bad_example(error, caplog):
  take(numbers(5, 2, error=error).train_batches(0), 3)
  assert caplog.messages == [
      f"example 2 cannot be used: {error.__name__}; another "
      "example replaces it"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_a_bad_example(error):
  stream = streams.Train(loader_cases.Numbers(5), Bad(*range(5), error=error),
                         seed=0, repeats=1, groups=(range(5),), batch_size=1)
  with pytest.raises(error):
    stream[0]


@pytest.mark.parametrize("batches", [
    lambda made: made.train_batches(0), loader.Loader.eval_batches],
    ids=["train", "eval"])
def test_if_all_are_bad_the_run_ends_with_a_line(batches):
  with pytest.raises(errors.DataError) as caught:
    next(batches(numbers(30, *range(30), batch_size=1)))
  assert str(caught.value).endswith(
      " cannot be used: MemoryError; all examples tried in its place are "
      "bad, too")


class Unreliable(loader_cases.Numbers):
  """Each example can be read the second time."""

  def __init__(self, n):
    super().__init__(n)
    self._tried = set(range(1, n))

  def __getitem__(self, index):
    if index not in self._tried:
      self._tried.add(index)
      raise OSError("gone for a moment")
    return super().__getitem__(index)


def test_an_example_that_can_be_read_later_is_logged_as_such(caplog):
  made = loader.Loader(Unreliable(5), loader_cases.draw, 5, threads=1)
  assert take(made.eval_batches(), 1)["replaced"].tolist() == [
      True, False, False, False, False]
  assert caplog.messages == [
      "example 0 could not be used at first, but now it can: is the storage "
      "reliable?; evaluation leaves it out"]


def test_vanished_files_are_reported_with_a_path(tmp_path):
  source_files.write(tmp_path / "train/a", "0.png", "1.png", "2.png",
                     data=image_files.ODD["1x1"][0])
  data = schema.Data(path=str(tmp_path))
  made = loader.Loader(sources.create(data, "train"),
                       preprocessing.made(
                           transforms.TrainTransform, data, SMALL), 1)
  for file in (tmp_path / "train" / "a").iterdir():
    file.unlink()
  with pytest.raises(errors.DataError, match=(
      r"^example \d .*FileNotFoundError.*/train/a/\d\.png")):
    next(made.train_batches(0))


def test_a_name_does_not_control_the_terminal(tmp_path, caplog):
  folder = os.fsencode(tmp_path / "train" / "a")
  os.makedirs(folder)
  for name, data in ((b"\x1b[2Jcaf\xe9.png", b"junk"),
                     (b"good.png", image_files.ODD["1x1"][0])):
    with open(os.path.join(folder, name), "wb") as f:
      f.write(data)
  data = schema.Data(path=str(tmp_path))
  made = loader.Loader(sources.create(data, "train"),
                       preprocessing.made(
                           transforms.TrainTransform, data, SMALL), 2)
  take(made.train_batches(0), 1)
  message, = caplog.messages
  assert message.isprintable()
  assert r"/train/a/\x1b[2Jcaf\udce9.png cannot be used" in message


@pytest.mark.parametrize("transform", [
    transforms.TrainTransform, transforms.EvalTransform])
def test_the_config_limits_the_pixels(transform):
  record = {"image": image_files.ODD["rgb png"][0], "label": 0}
  rng = np.random.default_rng(0)
  preprocessing.made(transform, schema.Data(max_pixels=384), SMALL)(record, rng)
  with pytest.raises(ValueError, match=r"max_pixels, 383"):
    preprocessing.made(transform, schema.Data(max_pixels=383), SMALL)(
        record, rng)
