"""The order of examples with any number of readers, and evaluation."""

import itertools
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import preprocessing
import pytest
from loader_cases import Numbers, draw, numbers, take

from metaformer_jax import errors
from metaformer_jax.config import schema, tasks
from metaformer_jax.data import loader
from metaformer_jax.data.sources import arrays
from metaformer_jax.data.transforms import classification as transforms


def fails(record, rng):
  class NotForPickleError(Exception):  # A worker cannot send it.
    pass
  raise NotForPickleError("this one\nis broken")


def indices(made, n_batches, position=0):
  return take(made.train_batches(position), n_batches)["index"].tolist()


# Training: the order.


@pytest.mark.parametrize("n, batch_size", [
    (10, 5), (10, 4), (10, 7), (7, 16), (1, 3), (97, 10), (97, 67), (20, 192)])
def test_each_epoch_is_a_permutation(n, batch_size):
  n_batches = -(-4 * n // batch_size)
  stream = indices(numbers(n, batch_size), n_batches)
  epochs = [stream[i * n:(i + 1) * n] for i in range(4)]
  for epoch in epochs:
    assert sorted(epoch) == list(range(n))
  if n > 5:
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(n)) not in epochs


def test_the_order_depends_on_the_seed_and_not_on_the_batch_size():
  streams = [indices(numbers(seed=seed), 10) for seed in range(5)]
  assert len({tuple(stream) for stream in streams}) == 5
  for batch_size in (1, 2, 20):
    assert indices(numbers(batch_size=batch_size), 40 // batch_size) == (
        streams[0])


def test_the_order_is_that_of_existing_checkpoints():
  """A position in a checkpoint must mean the same images after an upgrade."""
  got = take(numbers().train_batches(0), 5)
  assert got["index"].tolist() == [
      4, 6, 2, 7, 3, 5, 9, 0, 8, 1,
      5, 1, 6, 3, 4, 8, 9, 7, 2, 0]
  # Of seed 0, domain 1, then epoch 0 and example 4, and epoch 1 and 0.
  assert got["draw"][0] == np.random.default_rng((0, 1, 0, 4)).integers(2**62)
  assert got["draw"][-1] == np.random.default_rng((0, 1, 1, 0)).integers(2**62)


def test_all_orders_are_equally_likely():
  """Over 1,200 epochs each of ten examples comes first about 120 times."""
  n = 10
  stream = np.array(indices(numbers(n, 200), 60)).reshape(-1, n)
  counts = np.array([np.bincount(place, minlength=n) for place in stream.T])
  assert counts.shape == (n, n) and counts.sum() == 12_000
  chi2 = ((counts - 120) ** 2 / 120).sum()  # 81 degrees of freedom.
  assert 40 < chi2 < 130


def test_augmentation_differs_by_epoch_example_and_seed():
  got = take(numbers(10, 10).train_batches(0), 6)
  assert len(set(got["draw"].tolist())) == 60
  other = take(numbers(10, 10, seed=1).train_batches(0), 6)
  assert not set(other["draw"].tolist()) & set(got["draw"].tolist())


def test_augmentation_depends_on_the_epoch_and_the_index_alone():
  """Other batch sizes and positions give an example the same draws."""
  got = take(numbers(10, 10).train_batches(0), 3)
  epochs = np.arange(30) // 10
  expected = dict(zip(zip(epochs, got["index"]), got["draw"]))
  got = take(numbers(10, 3).train_batches(4), 8)
  epochs = (np.arange(24) + 4) // 10
  assert [expected[key] for key in zip(epochs, got["index"])] == (
      got["draw"].tolist())


@pytest.mark.parametrize("kind", [int, np.int64])
@pytest.mark.parametrize("position", [4, 9, 10, 37, 4 * 10**9 + 37])
def test_resuming_equals_continuing(position, kind):
  made = numbers()
  expected = take(made.train_batches(position - position % 40), 20)
  got = take(made.train_batches(kind(position)), 5)
  start = position % 40
  for key in ("index", "draw"):
    np.testing.assert_array_equal(got[key], expected[key][start:start + 20])


def test_resuming_is_exact_with_another_batch_size_and_process_count():
  expected = take(numbers(batch_size=4).train_batches(0), 20)
  parts = [take(numbers(batch_size=6, process_index=i, process_count=2)
                .train_batches(8), 1) for i in range(2)]
  for key in ("index", "draw"):
    got = np.concatenate([part[key] for part in parts])
    np.testing.assert_array_equal(got, expected[key][8:14])


# Processes.


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_processes_batches_joined_are_the_global_batch(count):
  expected = list(itertools.islice(numbers(11, 8).train_batches(3), 4))
  parts = [list(itertools.islice(
      numbers(11, 8, process_index=i, process_count=count).train_batches(3), 4))
           for i in range(count)]
  for step, batch in enumerate(expected):
    for key in ("index", "draw"):
      got = [part[step][key] for part in parts]
      assert {len(g) for g in got} == {8 // count}
      np.testing.assert_array_equal(np.concatenate(got), batch[key])


@pytest.mark.parametrize("batch_size, count", [(4, 3), (1, 2), (6, 4)])
def test_a_batch_that_cannot_be_divided_is_an_error(batch_size, count):
  with pytest.raises(ValueError, match=f"{batch_size} .*{count} processes"):
    numbers(batch_size=batch_size, process_count=count)


# Evaluation.


@pytest.mark.parametrize("n, batch_size", [
    (10, 1), (10, 7), (10, 10), (10, 15), (1, 4), (12, 4), (300, 260)])
def test_eval_gives_each_example_once_in_order(n, batch_size):
  made = numbers(n, batch_size)
  batches = list(made.eval_batches())
  assert len(batches) == made.n_eval_batches == -(-n // batch_size)
  assert made.n_examples == n
  for batch in batches:
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(
        ("index", "draw", "mask", "replaced"), (batch_size,))
    assert batch["mask"].dtype == batch["replaced"].dtype == np.bool_
    assert not batch["replaced"].any()
  mask = np.concatenate([b["mask"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  assert index[mask].tolist() == list(range(n))
  assert mask.tolist() == [True] * n + [False] * (len(mask) - n)
  # No augmentation, and the second pass is the first.
  assert all((b["draw"] == -1).all() for b in batches)
  for one, other in zip(batches, made.eval_batches(), strict=True):
    np.testing.assert_equal(other, one)


@pytest.mark.parametrize("n, batch_size", [
    (10, 2), (10, 8), (10, 10), (10, 16), (10, 30), (300, 260)])
def test_eval_of_two_processes_gives_each_example_once(n, batch_size):
  parts = [list(numbers(n, batch_size, process_index=i, process_count=2)
                .eval_batches()) for i in range(2)]
  # The same number of batches, or the process with more would wait forever.
  assert [len(p) for p in parts] == [-(-n // batch_size)] * 2
  seen, expected = [], numbers(n, batch_size).eval_batches()
  for whole, *batches in zip(expected, *parts, strict=True):
    for key in ("index", "mask"):
      np.testing.assert_array_equal(
          np.concatenate([b[key] for b in batches]), whole[key])
    seen += [i for b in batches for i in b["index"][b["mask"]].tolist()]
  assert seen == list(range(n))


# From an experiment.


def create(split, n_devices=8, **sections):
  return loader.create(
      schema.Experiment(**sections), split, Numbers(10), draw,
      n_devices=n_devices, process_index=0, process_count=1)


AXES = [(data, fsdp) for data in (-1, 1, 2, 3, 8) for fsdp in (-1, 1, 2, 4)
        if (data, fsdp) != (-1, -1)]


@pytest.mark.parametrize("data, fsdp", AXES)
def test_eval_batches_are_divisible_by_the_devices_of_the_mesh(data, fsdp):
  mesh = schema.Mesh(data=data, fsdp=fsdp)
  for n_devices, batch_size in itertools.product((1, 8, 24), range(1, 60, 7)):
    # As runtime.sharding makes the mesh: -1 takes all that the other leaves.
    n = n_devices if -1 in (data, fsdp) else data * fsdp
    made = create("eval", n_devices, mesh=mesh,
                  eval=schema.Eval(batch_size=batch_size))
    assert made.batch_size % n == 0
    assert 0 <= made.batch_size - batch_size < n


def test_train_batches_have_the_size_of_the_config():
  for data, fsdp in AXES:
    made = create("train", mesh=schema.Mesh(data=data, fsdp=fsdp),
                  train=schema.Train(batch_size=13))
    assert made.batch_size == 13


@pytest.mark.parametrize("split", ["train", "eval"])
def test_create_takes_everything_else_from_the_experiment(split):
  cfg = schema.Experiment(
      seed=7, data=schema.Data(workers=3, threads=5),
      train=schema.Train(batch_size=12), eval=schema.Eval(batch_size=12))
  source = Numbers(10)
  made = loader.create(cfg, split, source, draw, n_devices=4, process_index=1,
                       process_count=2, repeats=6)
  assert made == loader.Loader(
      source, draw, 12, seed=7, process_index=1, process_count=2, workers=3,
      threads=5, repeats=6)
  made = create(split)
  assert (made.seed, made.repeats) == (0, 1)


def test_check_uses_one_example_in_this_process():
  seen = []

  def transform(record, rng):
    seen.append((record["label"], os.getpid()))
    return draw(record, rng)

  made = loader.Loader(Numbers(10), transform, 4, workers=2)
  assert made.check() is None
  assert seen == [(0, os.getpid())]
  with pytest.raises(errors.DataError) as caught:
    loader.Loader(Numbers(10), fails, 4).check()
  assert str(caught.value) == (
      "example 0 cannot be used: NotForPickleError: this one is broken")


# Threads and worker processes.


def pictures(**kw):
  """Augmented digits, three batches an epoch."""
  transform = preprocessing.made(
      transforms.TrainTransform,
      schema.Data(), tasks.Classification(image_size=8))
  return loader.Loader(arrays.digits(False), transform, 99, seed=3, **kw)


@pytest.fixture(scope="module")
def expected_pictures():
  return take(pictures(workers=0, threads=1).train_batches(50), 5)


@pytest.mark.parametrize("workers, threads", [(0, 4), (1, 1), (2, 4)])
def test_workers_and_threads_change_no_byte(expected_pictures, workers,
                                            threads):
  made = pictures(workers=workers, threads=threads)
  got = take(made.train_batches(50), 5)
  assert got["image"].shape == (495, 8, 8, 3)
  for key in ("image", "label"):
    assert got[key].dtype == expected_pictures[key].dtype
    assert got[key].tobytes() == expected_pictures[key].tobytes()


class Place:
  """The index, and the process that made it."""

  def __call__(self, record, rng):
    del rng
    return {"index": np.int32(record["label"]), "pid": np.int64(os.getpid())}


def test_eval_by_workers_is_in_order_and_uses_both():
  made = loader.Loader(Numbers(10), Place(), 3, workers=2)
  got = take(made.eval_batches(), 4)
  assert got["index"][got["mask"]].tolist() == list(range(10))
  pids = set(got["pid"].tolist())
  assert len(pids) == 2 and os.getpid() not in pids


def test_workers_ignore_signals_to_end():
  """From Ctrl-C or a scheduler: the parent process ends them."""
  batches = numbers(workers=2).train_batches(0)
  # A batch of each worker, so that both have started.
  got = [batch["index"] for batch in itertools.islice(batches, 2)]
  for process in multiprocessing.active_children():
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
  got += [batch["index"] for batch in itertools.islice(batches, 29)]
  batches.close()
  assert np.concatenate(got).tolist() == indices(numbers(), 31)


def test_batches_of_workers_may_be_kept():
  """They are not views of shared memory that a later batch overwrites."""
  made = numbers(workers=1)
  batches = list(itertools.islice(made.train_batches(0), 30))
  kept = np.concatenate([b["index"] for b in batches]).tolist()
  assert kept == indices(numbers(), 30)
  assert all(v.flags.owndata for b in batches for v in b.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_reaches_the_consumer(workers):
  made = loader.Loader(Numbers(1), fails, 2, workers=workers)
  with pytest.raises(errors.DataError) as caught:
    next(made.train_batches(0))
  assert str(caught.value) == (
      "example 0 cannot be used: NotForPickleError: this one is broken; all "
      "examples tried in its place are bad, too")


@pytest.mark.parametrize("workers", [0, 2])
def test_closing_early_leaves_no_process_behind(workers):
  before = set(multiprocessing.active_children())
  batches = numbers(workers=workers).train_batches(0)
  assert len(next(batches)["index"]) == 4
  started = set(multiprocessing.active_children()) - before
  assert len(started) == workers
  start = time.monotonic()
  batches.close()
  for process in started:
    process.join(20)
    assert not process.is_alive()
  assert time.monotonic() - start < 20
  with pytest.raises(StopIteration):
    next(batches)


ORPHANS = """
import multiprocessing, sys
sys.path.insert(0, "tests")
import loader_cases
if __name__ == "__main__":
  batches = loader_cases.numbers(workers=2).train_batches(0)
  next(batches)
  print(*[p.pid for p in multiprocessing.active_children()], flush=True)
  sys.stdin.read()
"""


def test_workers_end_with_a_process_that_is_killed(tmp_path):
  script = tmp_path / "orphans.py"
  script.write_text(ORPHANS)
  root = pathlib.Path(__file__).parents[2]
  with subprocess.Popen(
      [sys.executable, str(script)], cwd=root, stdin=subprocess.PIPE,
      stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
      env={**os.environ, "PYTHONPATH": str(root)}) as process:
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
  deadline = time.monotonic() + 20
  while any(os.path.exists(f"/proc/{pid}") for pid in workers):
    assert time.monotonic() < deadline, workers
    time.sleep(0.1)


def test_an_unread_stream_starts_no_process():
  before = set(multiprocessing.active_children())
  numbers(workers=2).train_batches(0).close()
  assert set(multiprocessing.active_children()) == before
