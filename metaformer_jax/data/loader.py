"""Batches whose order depends on (seed, epoch, index) only.

Training images form one endless stream: epoch after epoch, each a permutation
of the data set. Step s takes the positions [s B, (s + 1) B) of the stream, and
each process its own contiguous part of them. The position in the data is
therefore one integer, whatever the number of processes, workers and threads,
and a run resumes there exactly. Images of several shapes form a stream for
each, and a step has images of one (`streams.Turns`). `readers` has the threads
and worker processes.

An example that cannot be read or transformed is bad. In training it is replaced
by another, also drawn from (seed, epoch, index); evaluation leaves it out,
because a replacement would bias the measure. No other example moves.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import comparison, schema
from metaformer_jax.data import readers, streams
from metaformer_jax.data.sources import base, fingerprints

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Bad examples that a loader reports one by one.
_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Loader:
  """Batches of a data set.

  Attributes:
    source: the data set.
    transform: `(record, rng) -> example`, a dict of arrays, which have the same
      shapes for all records of a group.
    batch_size: over all processes.
    seed: of the order and the augmentation.
    process_index, process_count: this process's part of each batch.
    workers: processes that prepare batches; 0 for none, -1 for one per core.
    threads: reading threads of each process.
    repeats: how often in a row each example comes in the training stream. An
      epoch still has n_examples positions, filled by the first n_examples /
      repeats of its permutation (repeated augmentation, arXiv 1901.09335, as in
      DeiT's and timm's samplers).
    groups: the examples of each shape, by index; others are left out. None: all
      examples have one shape. Records have their index as "index", and the
      number of their group as "group". For evaluation,
      `transform.blank(number)` is an example of a group.
  """

  source: base.Source
  transform: Callable[..., dict[str, Any]]
  batch_size: int
  seed: int = 0
  process_index: int = 0
  process_count: int = 1
  workers: int = 0
  threads: int = 4
  repeats: int = 1
  groups: tuple[np.ndarray, ...] | None = None
  _named: set[int] = dataclasses.field(
      default_factory=set, init=False, repr=False, compare=False)
  # Workers of the last evaluation, for the next one; and those of training that
  # have started, but read nothing yet.
  _kept: list[readers.Workers] = dataclasses.field(
      default_factory=list, init=False, repr=False, compare=False)
  _started: list[readers.Workers] = dataclasses.field(
      default_factory=list, init=False, repr=False, compare=False)

  def __post_init__(self) -> None:
    if self.batch_size % self.process_count:
      raise ValueError(f"a batch of {self.batch_size} cannot be divided among "
                       f"{self.process_count} processes")

  @property
  def n_examples(self) -> int:
    return sum(map(len, self._groups))

  @property
  def n_eval_batches(self) -> int:
    return sum(-(-len(group) // self.batch_size) for group in self._groups)

  @property
  def _groups(self) -> tuple[streams.Indices, ...]:
    return self.groups or (range(len(self.source)),)

  def fingerprint(self) -> dict[str, Any]:
    """What tells the data set from others (`fingerprints.of`)."""
    return fingerprints.of(self.source)

  def layout(self) -> dict[str, Any]:
    """Which examples have which shape, if there are groups."""
    if not self.groups:
      return {}
    shapes = hashlib.sha256()
    blank = getattr(self.transform, "blank", None)  # For evaluation.
    for number, group in enumerate(self.groups):
      shapes.update(f"{number}:{len(group)}".encode() + group.tobytes())
      for name, array in sorted(blank(number).items() if blank else ()):
        shapes.update(f"{name}{array.shape}".encode())
    return {"number of used examples": self.n_examples,
            "shapes of examples": comparison.DIGEST + shapes.hexdigest()}

  def check(self) -> None:
    """Reads and transforms the first example, in this process.

    Raises:
      DataError: why it cannot be used.
    """
    first = next((int(group[0]) for group in self._groups if len(group)), 0)
    _, reason = streams.attempt(self._examples, self.transform, first,
                                np.random.default_rng(0))
    if reason:
      raise errors.DataError(reason)

  def training_example(self, index: int, epoch: int) -> dict[str, Any]:
    """What training sees of an example in an epoch, if it is not replaced.

    Raises:
      DataError: why it cannot be used.
    """
    example, reason = streams.attempt(
        self._examples, self.transform, index,
        streams.augment_rng(self.seed, epoch, index))
    if reason:
      raise errors.DataError(reason)
    return example

  @property
  def indices(self) -> np.ndarray:
    """The examples that are used, in the data's order: int [n_examples]."""
    return np.sort(np.concatenate([np.asarray(group, np.int64)
                                   for group in self._groups]))

  @property
  def _examples(self) -> base.Source:
    """The source, whose records name their groups."""
    return (base.Grouped(self.source, self.groups) if self.groups else
            self.source)

  def start_workers(self) -> Callable[[], None]:
    """Starts the processes of the next `train_batches`, ahead of it.

    They take seconds, in which this process can do something else.

    Returns:
      What ends them, whether or not they are in use.
    """
    if not self.workers:
      return lambda: None
    workers = self._workers(self._training(0))
    workers.start()
    self._started.append(workers)
    return workers.close

  def train_batches(self, position: int) -> Iterator[Batch]:
    """Endless batches of this process, starting `position` images in.

    Yields:
      The transform's arrays, stacked: {"image": [b, ...], "label": [b], ...}
      with b = batch_size / process_count; and "replaced": bool [b], true where
      another example replaces a bad one.

    Raises:
      DataError: an example and all of its replacements are bad.
      ValueError: with several groups, `position` is not the first of a batch.
    """
    if len(self._groups) > 1 and position % self.batch_size:
      raise ValueError(f"position {position} is inside of a batch of "
                       f"{self.batch_size}, which has one group")
    yield from self._read(self._training(position), itertools.count(),
                          "another example replaces it", self._started)

  def eval_batches(self) -> Iterator[Batch]:
    """The whole data set in order, once; the last batch is padded.

    With groups, it is one group after the other, each in order, and the last
    batch of each is padded, so that a batch has one shape.

    Yields:
      As `train_batches`, and "mask": bool [b], false for padding and for bad
      examples. A bad example is all zeros, or with groups the transform's blank
      one, and only there "replaced" is true.

    Raises:
      DataError: without groups; an example is bad, and so are all that could
        give its shape.
    """
    parts = self._parts(
        streams.GroupedEvaluation(self._examples, self.transform, self.groups,
                                  self.batch_size)
        if self.groups else streams.Evaluation(self.source, self.transform), 0)
    yield from self._read(
        parts, range(self.n_eval_batches * parts.n_per_batch),
        "evaluation leaves it out", self._kept)

  def _training(self, position: int) -> streams.Parts:
    stream = streams.Train(self._examples, self.transform, self.seed,
                           self.repeats, self._groups, self.batch_size)
    return self._parts(stream, position)

  def _parts(self, stream: streams.Stream, position: int) -> streams.Parts:
    return streams.Parts(stream, position, self.batch_size, self.process_index,
                         self.process_count)

  def _reader(self, parts: streams.Parts) -> readers.Reader:
    """What reads about one batch ahead, whatever the number of workers."""
    if self.workers:
      return self._workers(parts)
    return readers.Threads(parts, self.threads,
                           self.threads + parts.n_per_batch)

  def _workers(self, parts: streams.Parts) -> readers.Workers:
    n = (os.cpu_count() or 1) if self.workers == -1 else self.workers
    return readers.Workers(self._of_a_worker(parts), n,
                           1 + -(-parts.n_per_batch // n))

  def _of_a_worker(self, parts: streams.Parts) -> Callable[[int], Batch]:
    return parts if self.threads == 1 else readers.InThreads(parts,
                                                             self.threads)

  def _read(self, parts: streams.Parts, numbers: Iterable[int], fate: str,
            kept: list[readers.Workers]) -> Iterator[Batch]:
    """Reads parts by workers that are kept, or others; names bad examples.

    When all are read, workers are kept, which can read them again.
    """
    workers = kept.pop() if kept else None
    if workers:
      workers.read = self._of_a_worker(parts)
    reader = workers or self._reader(parts)
    with contextlib.closing(readers.batches(
        reader, numbers, parts.n_per_batch)) as batches:
      for batch in batches:
        bad = batch.pop("bad")
        for index in bad[bad >= 0].tolist():
          self._name(index, fate)
        yield {**batch, "replaced": bad >= 0}
    if isinstance(reader, readers.Workers):
      kept.append(reader)
    else:
      reader.close()

  def _name(self, index: int, fate: str) -> None:
    """Logs what is wrong with a bad example; once, and only the first few."""
    if index in self._named or len(self._named) > _NAMED:
      return
    self._named.add(index)
    if len(self._named) > _NAMED:
      log.warning("further bad examples are counted but not logged")
      return
    _, reason = streams.attempt(self._examples, self.transform, index,
                                np.random.default_rng(0))
    log.warning("%s; %s", reason or f"example {index} could not be used at "
                "first, but now it can: is the storage reliable?", fate)


def create(cfg: schema.Experiment, split: str, source: base.Source,
           transform: Callable[..., dict[str, Any]], *, n_devices: int,
           process_index: int, process_count: int, repeats: int = 1,
           groups: tuple[np.ndarray, ...] | None = None) -> Loader:
  """Makes the loader of an experiment's "train" or "eval" split.

  Args:
    cfg: the experiment: batch sizes, mesh, seed, workers and threads.
    split: "train" or "eval".
    source: the data set of the split.
    transform: as in `Loader`.
    n_devices: of all processes together.
    process_index, process_count: this process, and how many there are.
    repeats, groups: as in `Loader`.
  """
  batch_size = cfg.train.batch_size
  if split != "train":
    # Rounded up so that every device of the mesh gets the same number of
    # images. An axis of -1 takes the remaining devices, so the mesh has all.
    axes = (cfg.mesh.data, cfg.mesh.fsdp)
    n = n_devices if -1 in axes else math.prod(axes)
    batch_size = -(-cfg.eval.batch_size // n) * n
  return Loader(
      source, transform, batch_size, seed=cfg.seed,
      process_index=process_index, process_count=process_count,
      workers=cfg.data.workers, threads=cfg.data.threads, repeats=repeats,
      groups=groups)
