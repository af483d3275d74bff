"""A source of numbers, its loader, and how to read its batches."""

import itertools

import numpy as np

from metaformer_jax.data import loader


class Numbers:
  """A source of n examples; each is its own index."""

  n_classes = None

  def __init__(self, n):
    self._n = n

  def __len__(self):
    return self._n

  def __getitem__(self, index):
    assert 0 <= index < self._n
    return {"image": index, "label": index}


def draw(record, rng):
  """A transform: the index and a random number; -1 without an rng."""
  return {"index": np.int32(record["label"]),
          "draw": np.int64(-1 if rng is None else rng.integers(2**62))}


def numbers(n=10, batch_size=4, **kw):
  return loader.Loader(Numbers(n), draw, batch_size, **kw)


def take(batches, n):
  """The first n batches, joined: {key: [n * b, ...]}."""
  got = list(itertools.islice(batches, n))
  batches.close()
  assert len(got) == n
  return {k: np.concatenate([b[k] for b in got]) for k in got[0]}
