"""What the task sections of an experiment have in common."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
  from metaformer_jax.config.schema import Experiment
  from metaformer_jax.models.settings import Family

# Larger values would run out of memory, or take for ever to start.
_MAX_SIDE = 2**14  # Of an image, in pixels.
_MAX_BATCH_BYTES = 2**40


class Measure(NamedTuple):
  """A figure that an evaluation reports.

  Attributes:
    name: as in the evaluation's result.
    higher_is_better: the direction in which checkpoints are ranked by it.
    is_fraction: it is in [0, 1], and tables show it in percent.
  """

  name: str
  higher_is_better: bool
  is_fraction: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
  """What every task section has.

  Attributes:
    MEASURES: by which checkpoints can be ranked, the default one first.
    RESUMABLE: keys that may change when a run is resumed.
    PER_HOST: keys that may differ among the processes of a run, as paths.
    AUGMENTS_ON: values of `config.data.augment_on` that it follows.
  """

  MEASURES: ClassVar[tuple[Measure, ...]]
  RESUMABLE: ClassVar[tuple[str, ...]] = ()
  PER_HOST: ClassVar[tuple[str, ...]] = ()
  AUGMENTS_ON: ClassVar[tuple[str, ...]] = ("host",)

  name: str

  @property
  def input_size(self) -> tuple[int, int] | None:
    """Height and width of the model's images; None if they vary."""
    return None

  @property
  def num_classes(self) -> int | None:
    """Classes that the model tells apart; None for a task without classes."""
    return None

  @property
  def has_masks(self) -> bool:
    """Whether it needs the outlines of objects, and not only their boxes."""
    return False

  def filled(self) -> "Task":
    """With what follows from the section's other values for some left at None.
    """
    return self

  def check(self, cfg: "Experiment", files: bool) -> Iterator[str]:
    """Yields a line per mistake that spans keys, or that is on disk.

    Args:
      cfg: the experiment that this section is in.
      files: whether the files that it names must be on this machine.
    """
    del cfg, files
    yield from ()

  def check_model(self, settings: "Family") -> Iterator[str]:
    """Yields a line per mistake in using a model of the table for this task."""
    del settings
    yield from ()


@dataclasses.dataclass(frozen=True)
class Own(Task):
  """The section of a user's own task until its module is imported.

  Attributes:
    name: import path of the task.
    settings: the other keys of the section, which the task declares.
  """

  MEASURES = ()

  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_images(cfg: "Experiment", key: str, height: int,
                 width: int) -> Iterator[str]:
  """Yields a line per mistake in the size of the images of a batch.

  Args:
    cfg: the experiment.
    key: of the task section, which has the size.
    height, width: in pixels.
  """
  side = max(height, width)
  if side > _MAX_SIDE:
    yield f"config.task.{key}: {side} is above the largest, {_MAX_SIDE}"
    return
  largest = _MAX_BATCH_BYTES // (3 * height * width)
  for section in ("train", "eval"):
    n = getattr(cfg, section).batch_size
    if n > largest:
      yield (f"config.{section}.batch_size: {n} images of {height} x {width} "
             f"pixels are more than 1 TiB; largest: {largest}")
