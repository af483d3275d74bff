"""Training with groups of examples, of which each batch has one."""

import itertools
import logging

import numpy as np
import pytest
from loader_cases import Numbers, numbers

from metaformer_jax import errors
from metaformer_jax.data import loader, streams

N = 40
LEFT_OUT = [3, 17]
LANDSCAPE = np.setdiff1d(np.arange(N), [*LEFT_OUT, *range(0, N, 4)])
PORTRAIT = np.arange(0, N, 4)
GROUPS = LANDSCAPE, PORTRAIT


class Shaped:
  """A transform whose arrays have the length of the record's group, plus 1."""

  def __init__(self, bad=()):
    self._bad = bad

  def __call__(self, record, rng):
    assert record["index"] == record["label"]
    if record["label"] in self._bad:
      raise ValueError("is broken")
    return {"x": np.full(record["group"] + 1, record["label"]),
            "draw": rng.integers(2**62)}


def made(groups=GROUPS, batch_size=3, bad=(), n=N, **kw):
  return loader.Loader(Numbers(n), Shaped(bad), batch_size, groups=groups, **kw)


def take(batches, n):
  """The first n batches as they are; one group's are not of another's shape."""
  got = list(itertools.islice(batches, n))
  batches.close()
  assert len(got) == n
  return got


def assert_equal(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


# Turns: the groups of the steps.

SIZES = [(7, 3), (1, 1), (28, 10), (1, 999), (999, 1), (5, 5), (0, 4), (4, 0),
         (1, 0), (88_000, 29_266), (1, 2**40), (2**40 + 7, 2**39)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 12])
@pytest.mark.parametrize("start", [0, 1, 12_345, 10**12 + 3])
def test_any_window_has_the_proportion_of_the_data(sizes, seed, start):
  """Within less than one batch, counted from anywhere."""
  turns, (a, b) = streams.Turns(seed, sizes), sizes
  found = np.array([turns[start + i][0] for i in range(600)])
  counts = np.concatenate([[0], np.cumsum(found == 0)])
  lengths = np.arange(601)
  for begin in (0, 1, 57, 333):
    n = lengths[begin:] - begin
    # In whole numbers: |count - n a / (a + b)| < 1.
    far = [abs(int(c) * (a + b) - int(i) * a) for c, i in
           zip(counts[begin:] - counts[begin], n)]
    assert max(far) < a + b or max(far) == 0


@pytest.mark.parametrize("sizes", [*SIZES, (3, 0, 4, 2), (0, 0, 2), (5,)])
def test_the_number_of_earlier_steps_is_a_closed_form(sizes):
  turns, before = streams.Turns(3, sizes), dict.fromkeys(range(4), 0)
  for step in range(400):
    group, n_before = turns[step]
    assert n_before == before[group]
    before[group] += 1
  assert [before[i] > 0 for i in range(len(sizes)) if not sizes[i]] == [
      False] * sizes.count(0)


def test_several_groups_have_their_parts():
  sizes = (300, 100, 500, 100)
  turns = streams.Turns(0, sizes)
  counts = np.bincount([turns[i][0] for i in range(2000)])
  np.testing.assert_allclose(counts, [600, 200, 1000, 200], atol=2)


def test_the_seed_moves_the_turns():
  turns = {tuple(streams.Turns(seed, (7, 3))[i][0] for i in range(10))
           for seed in range(30)}
  assert len(turns) > 3


# Batches.


@pytest.mark.parametrize("batch_size", [1, 3, 4, 16])
def test_each_epoch_of_a_group_has_each_of_its_images_once(batch_size):
  """Also if a group is smaller than a batch, and images are left out."""
  batches = take(made(batch_size=batch_size).train_batches(0),
                 -(-3 * N // batch_size) + 2)
  epochs = {0: [], 1: []}
  for batch in batches:
    group = batch["x"].shape[1] - 1
    epochs[group] += batch["x"][:, 0].tolist()
    assert not batch["replaced"].any()
  for number, group in enumerate(GROUPS):
    n, stream = len(group), epochs[number]
    assert len(stream) >= 2 * n
    parts = [stream[i:i + n] for i in range(0, len(stream) - n + 1, n)]
    for part in parts:
      assert sorted(part) == group.tolist()
    assert len(set(map(tuple, parts))) == len(parts)
  assert made().n_examples == N - len(LEFT_OUT)


def test_one_group_of_all_is_as_none():
  batches = take(made((np.arange(N),), 4).train_batches(8), 30)
  plain = take(numbers(N, 4).train_batches(8), 30)
  for one, other in zip(batches, plain):
    assert one["x"][:, 0].tolist() == other["index"].tolist()
    assert one["draw"].tolist() == other["draw"].tolist()


@pytest.mark.parametrize("groups", [
    (np.array([], int), np.arange(N)), (np.arange(N), np.array([], int))])
def test_an_empty_group_never_comes(groups):
  shape = 1 + int(len(groups[1]) > 0)
  batches = take(made(groups).train_batches(0), 30)
  assert {batch["x"].shape for batch in batches} == {(3, shape)}


@pytest.mark.parametrize("count, workers", [(1, 2), (2, 0), (4, 0)])
def test_processes_and_workers_do_not_matter(count, workers):
  expected = take(made(batch_size=4, bad=(5, 8)).train_batches(0), 20)
  parts = [take(made(batch_size=4, bad=(5, 8), process_index=i, workers=workers,
                     process_count=count).train_batches(0), 20)
           for i in range(count)]
  assert_equal(expected, [
      {key: np.concatenate([part[key] for part in step]) for key in step[0]}
      for step in zip(*parts, strict=True)])


@pytest.mark.parametrize("step", [1, 2, 13, 29])
def test_resuming_equals_continuing(step):
  expected = take(made().train_batches(0), 40)
  assert_equal(expected[step:step + 8],
               take(made().train_batches(np.int64(3 * step)), 8))


def test_a_position_inside_of_a_batch_is_an_error():
  with pytest.raises(ValueError, match="position 4 is inside of a batch of 3"):
    next(made().train_batches(4))


def test_augmentation_differs_by_epoch_and_example():
  batches = take(made().train_batches(0), 60)
  draws = np.concatenate([batch["draw"] for batch in batches]).tolist()
  assert len(set(draws)) == len(draws)


def test_a_bad_example_is_replaced_by_one_of_its_group(caplog):
  bad = (4, 5, 8, 32)
  with caplog.at_level(logging.WARNING):
    found = take(made(bad=bad).train_batches(0), 60)
  assert sum(batch["replaced"].sum() for batch in found) > 8
  for batch, before in zip(found, take(made().train_batches(0), 60)):
    was_bad = np.isin(before["x"][:, 0], bad)
    np.testing.assert_array_equal(batch["replaced"], was_bad)
    group = GROUPS[batch["x"].shape[1] - 1]
    assert set(batch["x"][:, 0]) <= set(group.tolist()) - set(bad)
    for key in ("x", "draw"):  # No other example moves.
      np.testing.assert_array_equal(batch[key][~was_bad], before[key][~was_bad])
  assert sorted(int(m.split()[1]) for m in caplog.messages) == [*bad]
  with pytest.raises(errors.DataError, match="all examples tried in its place"):
    take(made(bad=PORTRAIT.tolist()).train_batches(0), 20)


def test_repeated_examples_come_in_a_row_within_their_group():
  streams_of = {0: [], 1: []}
  for batch in take(made(repeats=2).train_batches(0), 60):
    streams_of[batch["x"].shape[1] - 1] += batch["x"][:, 0].tolist()
  for stream, group in zip(streams_of.values(), GROUPS):
    one = stream[:len(group)]
    assert one[::2] == one[1::2] and len(set(one)) == len(group) // 2


def test_the_layout_tells_groups_apart():
  prints = [made(groups).layout() for groups in (
      GROUPS, GROUPS[::-1], (LANDSCAPE[1:], PORTRAIT),
      (LANDSCAPE[::-1], PORTRAIT), None)]
  assert len({tuple(p.items()) for p in prints}) == 5
  assert prints[0] == made().layout()
  assert prints[0]["number of used examples"] == N - len(LEFT_OUT)


def test_the_check_reads_an_example_of_a_group():
  groups = (np.array([], int), PORTRAIT[1:])
  made(groups, bad=(0, 1)).check()
  with pytest.raises(errors.DataError, match="example 4"):
    made(groups, bad=(4,)).check()
