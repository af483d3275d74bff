"""The protocol of a data set, random access by index, and shared checks.

A classification record is {"image", "label"}: the image either encoded, as
bytes, or uint8 [H, W] or [H, W, 3]; the label an int; and, if there is a file,
its "path", by which a bad image is reported. Several threads read a source, and
it is pickled to worker processes.
"""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from metaformer_jax import errors
from metaformer_jax.config import paths, schema

Record = Mapping[str, Any]


class Classes(NamedTuple):
  """The classes of a data set.

  Attributes:
    n: labels are below it; None if the source cannot know.
    names: one for each, by label; None if they have none.
  """

  n: int | None
  names: Sequence[str] | None


class Source(Protocol):
  """What the loader needs of a data set.

  Attributes:
    n_classes: labels are below it; None if the source cannot know. A source may
      also have `class_names`, one for each.
  """

  n_classes: int | None

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


def check_folder(data: schema.Data, inside: Iterable[str] = (),
                 hint: str = "") -> Iterator[str]:
  """Yields a line if `data.path` is not a local folder, else those of `inside`.

  Args:
    data: its `path` is set.
    inside: further checks; not iterated over if there is no folder.
    hint: where to get the folder; by default the nearest existing folder.
  """
  if "://" in data.path:
    yield (f"config.data.path: {data.path} is not a local folder, which source "
           f"{data.source} needs")
    return
  try:
    root = paths.local("config.data.path", data.path)
    if root.is_dir():
      yield from inside
    else:
      yield (f"config.data.path: {data.path} is not a folder"
             f"{hint or nearest_folder(root)}")
  except errors.ConfigError as e:
    yield str(e)
  except OSError as e:  # A folder inside cannot be read.
    yield f"config.data.path: {data.path}: {e}"


def check_classes(cfg: schema.Experiment, n_classes: int) -> Iterator[str]:
  """Yields a line if the training data has another number of classes."""
  outputs = cfg.task.num_classes
  if outputs not in (None, n_classes):
    yield (f"config.task.num_classes: {outputs}, but the training data has "
           f"{n_classes} classes; set it to {n_classes}, or to None")


def nearest_folder(path: pathlib.Path) -> str:
  """A hint: the folder most like the first component that does not exist."""
  while not path.parent.is_dir():
    path = path.parent
  siblings = [p.name for p in path.parent.iterdir() if p.is_dir()]
  if not siblings:
    return f"; {path.parent} has no folders"
  return f" (in {path.parent}{errors.did_you_mean(path.name, siblings)})"
