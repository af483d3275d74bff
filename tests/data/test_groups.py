"""Evaluation in groups of examples, each of which has one shape."""

import logging

import numpy as np
import pytest
from loader_cases import Numbers, numbers

from metaformer_jax import errors
from metaformer_jax.data import loader

N = 23
# Of different sizes: with a part of a batch, none at all, whole batches.
GROUPS = (np.array([0, 5, 7, 11, 22]), np.array([], np.int64),
          np.array([1, 2, 3, 4, 6, 8, 9, 10]),
          np.setdiff1d(np.arange(12, 22), [13]), np.array([13]))


class Shaped:
  """A transform whose arrays have the length of the record's group, plus 1."""

  def __init__(self, bad=()):
    self._bad = bad

  def __call__(self, record, rng):
    if record["label"] in self._bad:
      raise ValueError("is broken")
    return {"x": np.full(record["group"] + 1, record["label"], np.int32)}

  def blank(self, group):
    return {"x": np.full(group + 1, -7, np.int32)}


def made(bad=(), batch_size=4, groups=GROUPS, **kw):
  return loader.Loader(Numbers(N), Shaped(bad), batch_size, groups=groups, **kw)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8, 30])
def test_every_example_comes_once_in_batches_of_one_shape(batch_size):
  batches = list(made(batch_size=batch_size).eval_batches())
  assert len(batches) == made(batch_size=batch_size).n_eval_batches == sum(
      -(-len(group) // batch_size) for group in GROUPS)
  found = []
  for batch in batches:
    assert batch["x"].shape[0] == batch_size
    assert not batch["replaced"].any()
    assert (batch["x"][~batch["mask"]] == -7).all()
    found.append((batch["x"].shape[1] - 1, batch["x"][batch["mask"], 0]))
  for number, group in enumerate(GROUPS):
    parts = [x for of, x in found if of == number]
    assert np.concatenate([[], *parts]).tolist() == group.tolist()
  # One group after the other, and only the last batch of each has padding.
  assert [of for of, _ in found] == sorted(of for of, _ in found)
  assert sum(b["mask"].sum() for b in batches) == N


@pytest.mark.parametrize("count, workers", [(1, 1), (2, 0), (4, 0)])
def test_all_processes_walk_the_same_groups(count, workers):
  expected = list(made(bad=(5, 13)).eval_batches())
  parts = [list(made(bad=(5, 13), process_index=i, process_count=count,
                     workers=workers).eval_batches()) for i in range(count)]
  assert {len(part) for part in parts} == {len(expected)}
  for batch, *local in zip(expected, *parts):
    for key in batch:
      np.testing.assert_array_equal(
          np.concatenate([part[key] for part in local]), batch[key])


def test_a_bad_example_is_blank_and_named(caplog):
  bad = (7, 2, 3)
  with caplog.at_level(logging.WARNING):
    batches = list(made(bad).eval_batches())
  values = np.concatenate([b["x"][b["mask"], 0] for b in batches])
  assert sorted(values.tolist()) == sorted(set(range(N)) - set(bad))
  assert sum(b["replaced"].sum() for b in batches) == 3
  for batch in batches:
    assert (batch["x"][batch["replaced"]] == -7).all()
    assert not batch["mask"][batch["replaced"]].any()
  assert [r.getMessage() for r in caplog.records] == [
      f"example {i} cannot be used: ValueError: is broken; evaluation leaves "
      "it out" for i in bad]


def test_a_group_may_be_bad_altogether():
  batches = list(made(range(N)).eval_batches())
  assert len(batches) == made().n_eval_batches
  assert sum(b["replaced"].sum() for b in batches) == N
  assert not any(b["mask"].any() for b in batches)
  with pytest.raises(errors.DataError, match="example 0"):
    made((0,)).check()


def test_no_more_than_the_first_ten_are_named(caplog):
  with caplog.at_level(logging.WARNING):
    list(made(range(N)).eval_batches())
  assert len(caplog.records) == 11


def test_one_group_of_all_is_as_none():
  whole = list(made(groups=(np.arange(N),)).eval_batches())
  plain = list(numbers(N, 4).eval_batches())
  assert len(whole) == len(plain)
  for one, other in zip(whole, plain):
    np.testing.assert_array_equal(one["mask"], other["mask"])
    np.testing.assert_array_equal(one["x"][one["mask"], 0],
                                  other["index"][other["mask"]])
