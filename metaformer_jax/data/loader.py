"""Batches in an order that depends on nothing but (seed, epoch, index).

Training images form one endless stream: epoch after epoch, each a permutation
of the data set. Step s takes the positions [s B, (s + 1) B) of it, and each
process its own contiguous part of them. The position in the data is therefore
one integer, whatever the number of processes, workers and threads; resuming
there is exact. Reading ahead, threads and worker processes are grain's.

An example that cannot be read or transformed is bad. To train, another takes
its place, drawn from (seed, epoch, index) too; evaluation leaves it out, as
another would bias the measure. Nothing else moves.
"""

import dataclasses
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from metaformer_jax import errors
from metaformer_jax.data.sources.folders import Source

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Domains of the seeds, so that no two uses draw the same numbers.
_ORDER, _AUGMENT, _REPLACE = 0, 1, 2

# How many examples are tried in the place of a bad one.
_TRIES = 20

# How many bad examples a loader names in the log.
_NAMED = 10

# The most examples of a batch that are prepared in one go.
_CHUNK = 64

# More batches than any run takes: the stream has no end of its own.
_ENDLESS = 2**40


@dataclasses.dataclass(frozen=True)
class Loader:
  """Where batches come from.

  Attributes:
    source: the data set.
    transform: `(record, rng) -> example`, a dict of arrays of equal shapes.
    batch_size: over all processes.
    seed: of the order and the augmentation.
    process_index, process_count: this process's part of each batch.
    workers: processes that prepare batches; 0 for none, -1 for one a core.
    threads: reading threads of each process.
    repeats: how often an example comes in a row of the training stream. An
      epoch still has n_examples positions, which the first n_examples / repeats
      of its permutation fill (repeated augmentation, arXiv 1901.09335, as
      DeiT's and timm's samplers do it).
  """

  source: Source
  transform: Callable[..., dict[str, Any]]
  batch_size: int
  seed: int = 0
  process_index: int = 0
  process_count: int = 1
  workers: int = 0
  threads: int = 4
  repeats: int = 1
  _named: set[int] = dataclasses.field(
      default_factory=set, init=False, repr=False, compare=False)

  def __post_init__(self):
    if self.batch_size % self.process_count:
      raise ValueError(f"a batch of {self.batch_size} cannot be divided among "
                       f"{self.process_count} processes")

  @property
  def n_examples(self) -> int:
    return len(self.source)

  @property
  def n_eval_batches(self) -> int:
    return -(-self.n_examples // self.batch_size)

  def train_batches(self, position: int) -> Iterator[Batch]:
    """Endless batches of this process, from `position` images into the stream.

    Yields:
      The transform's arrays, stacked: {"image": [b, ...], "label": [b], ...}
      with b = batch_size / process_count; and "replaced": bool [b], true where
      an example is bad and another in its place.

    Raises:
      DataError: a bad example, and all that were tried in its place.
    """
    stream = _TrainStream(self.source, self.transform, self.seed, self.repeats)
    yield from self._read(_Part(stream, self, position, _ENDLESS),
                          "another takes its place")

  def eval_batches(self) -> Iterator[Batch]:
    """The whole data set in order, once; the last batch is filled up.

    Yields:
      As `train_batches`, with "mask": bool [b], false for what fills up and for
      the bad examples. These are all zeros, and "replaced" is true for them
      only.

    Raises:
      DataError: a bad example, and all whose shape it could have taken.
    """
    stream = _Part(_EvalStream(self.source, self.transform), self, 0,
                   self.n_eval_batches)
    yield from self._read(stream, "it is not measured")

  def _read(self, stream: "_Part", fate: str) -> Iterator[Batch]:
    if not flags.FLAGS.is_parsed():  # grain's options are absl flags.
      flags.FLAGS.mark_as_parsed()
    local = self.batch_size // self.process_count
    # Batches are prepared in chunks: all workers share in each batch, and what
    # is read ahead is about one batch, however many workers there are.
    chunk = max(n for n in range(1, min(local, _CHUNK) + 1) if local % n == 0)
    n_chunks = local // chunk
    workers = (os.cpu_count() or 1) if self.workers == -1 else self.workers
    chunks = grain.MapDataset.source(stream).batch(chunk).to_iter_dataset(
        grain.ReadOptions(
            num_threads=self.threads,
            prefetch_buffer_size=self.threads + (0 if workers else n_chunks)))
    if workers:
      chunks = chunks.mp_prefetch(
          grain.MultiprocessingOptions(
              num_workers=workers,
              per_worker_buffer_size=1 + -(-n_chunks // workers)),
          worker_init_fn=_follow_parent)
    iterator = iter(chunks)
    try:
      while parts := list(itertools.islice(iterator, n_chunks)):
        # A copy in any case: workers hand over shared memory, which jax would
        # hold on to.
        batch = {name: np.concatenate([part[name] for part in parts])
                 for name in parts[0]}
        bad = batch.pop("bad")
        for index in bad[bad >= 0].tolist():
          self._name(index, fate)
        yield {**batch, "replaced": bad >= 0}
    except errors.DataError as e:
      # grain adds lines about itself.
      raise errors.DataError(str(e).splitlines()[0]) from e
    finally:
      iterator.close()

  def _name(self, index: int, fate: str) -> None:
    """Logs a bad example and what is wrong with it; the first few, once."""
    if index in self._named or len(self._named) > _NAMED:
      return
    self._named.add(index)
    if len(self._named) > _NAMED:
      log.warning("further bad examples are counted, but not named")
      return
    _, reason = _try(self.source, self.transform, index,
                     np.random.default_rng(0))
    log.warning("%s; %s", reason or f"example {index} could not be used at "
                "first, but can now: is the storage reliable?", fate)


def _follow_parent(index: int, count: int) -> None:
  """Makes a worker end when its parent does, however that is, and not before.

  Schedulers and Ctrl-C tell all processes to end; the parent has steps to make
  until then, and a state to save.
  """
  del index, count
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)

  def wait():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=wait, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class _TrainStream:
  """The endless stream: position -> augmented example."""

  source: Source
  transform: Callable[..., dict[str, Any]]
  seed: int
  repeats: int

  def __getitem__(self, position: int) -> dict[str, Any]:
    n = len(self.source)
    epoch, place = divmod(position, n)
    place, repeat = divmod(place, self.repeats)
    index = int(_permutation(self.seed, epoch, n)[place])
    key = (self.seed, _AUGMENT, epoch, index)
    rng = np.random.default_rng((*key, repeat) if repeat else key)
    return _example(self.source, self.transform, index, rng,
                    _others((self.seed, _REPLACE, epoch, index), n, repeat))


def _example(source, transform, index, rng, others) -> dict[str, Any]:
  """An example, or the first that can be used of `others`, if it is bad.

  Its "bad" is then the index, and -1 otherwise. DataError: all are bad.
  """
  example, reason = _try(source, transform, index, rng)
  if not reason:
    return {**example, "bad": np.int64(-1)}
  for other, other_rng in others:
    example, failed = _try(source, transform, other, other_rng)
    if not failed:
      return {**example, "bad": np.int64(index)}
  raise errors.DataError(f"{reason}; nor could any other that was tried")


def _try(source, transform, index, rng) -> tuple[dict[str, Any], str]:
  """Reads and transforms an example; returns it, and why it is bad or ""."""
  record = {}
  try:
    record = source[index]
    return transform(record, rng), ""
  except Exception as e:
    reason = (f"example {index} {record.get('path', '')} cannot be used: "
              f"{type(e).__name__}: {e}")
    # Names are of others: none controls the terminal.
    return {}, "".join(c if c.isprintable() else ascii(c)[1:-1]
                       for c in " ".join(reason.split()).rstrip(": "))


def _others(key: tuple[int, int, int, int], n: int, repeat: int):
  """Draws which of n examples to try in the place of key's, and their rngs."""
  if n == 1:
    return
  steps = np.random.default_rng(key).integers(1, n, _TRIES)
  for number, step in enumerate(steps.tolist()):
    yield (key[-1] + step) % n, np.random.default_rng((*key, repeat, number))


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, n: int) -> np.ndarray:
  """The order of an epoch; two are kept, as batches lie across epochs."""
  return np.random.default_rng((seed, _ORDER, epoch)).permutation(n)


@dataclasses.dataclass(frozen=True)
class _EvalStream:
  """The data set in its own order, then filling; "mask" tells them apart."""

  source: Source
  transform: Callable[..., dict[str, Any]]

  def __getitem__(self, position: int) -> dict[str, Any]:
    n = len(self.source)
    valid = position < n
    index = position if valid else 0
    example = _example(self.source, self.transform, index, None,
                       _others((0, _REPLACE, 0, index), n, 0))
    bad = example.pop("bad")
    if bad >= 0:
      example = {name: np.zeros_like(x) for name, x in example.items()}
    return {**example, "mask": np.bool_(valid and bad < 0),
            "bad": bad if valid else np.int64(-1)}


class _Part:
  """This process's part of a stream, for grain: index -> example."""

  def __init__(self, stream, loader: Loader, start: int, n_batches: int):
    self._stream, self._start = stream, start
    self._global = loader.batch_size
    self._local = loader.batch_size // loader.process_count
    self._offset = loader.process_index * self._local
    self._n = n_batches * self._local

  def __len__(self) -> int:
    return self._n

  def __getitem__(self, i: int) -> dict[str, Any]:
    batch, place = divmod(int(i), self._local)
    return self._stream[self._start + batch * self._global + self._offset +
                        place]
