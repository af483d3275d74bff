"""Data sets: where records come from.

Each module opens one kind of data set, and checks the configuration of it;
`config.data.source` chooses the module here, or names a source of the user's
own: `source(data, split)`, called with the section and "train" or "eval".
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from metaformer_jax import errors, imports
from metaformer_jax.config import schema, tasks
from metaformer_jax.data.sources import (
  arrays,
  base,
  coco,
  folders,
  label_maps,
  prepared,
  scenes,
  tfds,
)


class _Kind(NamedTuple):
  """A kind of data set.

  Attributes:
    check: `check(cfg, files, train)` yields a line per mistake.
    labels: what a label belongs to: an "image", a "pixel" or an "object"; of
      some kinds of data sets, either of two.
  """

  check: Callable[[schema.Experiment, bool, bool], Iterator[str]]
  labels: tuple[str, ...]


_KINDS = {
    "ade20k": _Kind(label_maps.check, ("pixel",)),
    "array_record": _Kind(prepared.check, ("pixel", "object")),
    "coco": _Kind(coco.check, ("object",)),
    "digits": _Kind(arrays.check_digits, ("image",)),
    "folder": _Kind(folders.check, ("image",)),
    "idx": _Kind(arrays.check_idx, ("image",)),
    "label_maps": _Kind(label_maps.check, ("pixel",)),
    "scenes": _Kind(scenes.check, ("pixel", "object")),
    "tfds": _Kind(tfds.check, ("image",)),
}

# What the tasks need a label of.
_NEEDS = {"classification": "image", "segmentation": "pixel",
          "detection": "object"}


def create(data: schema.Data, split: str, numbered: bool = False,
           names: Sequence[str] | None = None,
           task: tasks.Task | None = None) -> base.Source:
  """Opens the "train" or the "eval" split that the config names.

  Args:
    data: the kind of data set and its place.
    split: "train" or "eval".
    numbered: source folder: the names of the class folders are the classes.
    names: of the classes, which number the data's classes; None: as the data
      numbers them. Data without names is numbered as it is.
    task: its section; scenes have what it needs a label of, by default pixels,
      and objects have outlines if it has masks.

  Raises:
    ConfigError: the data is missing, or cannot be read; says which part.
  """
  train = split == "train"
  match data.source:
    case "ade20k" | "label_maps":
      source = label_maps.create(data, train)
    case "array_record":
      source = prepared.create(data, train, _has_masks(task))
    case "coco":
      source = coco.create(data, train, _has_masks(task))
    case "digits":
      return arrays.digits(train)
    case "folder":
      return folders.create(data, train, numbered, names)
    case "idx":
      return arrays.idx(data.path, train)
    case "scenes":
      source = scenes.create(data, train, _needs(task) == "object")
    case "tfds":
      source = tfds.create(data.name, data.path,
                           data.train_split if train else data.eval_split,
                           train)
    case _:
      source = _create_own(data, split, task)
  return base.renumbered(source, names) if names else source


def _needs(task: tasks.Task | None) -> str | None:
  return _NEEDS.get(task.name) if task else None


def _has_masks(task: tasks.Task | None) -> bool:
  return task is not None and task.has_masks


def _create_own(data: schema.Data, split: str,
                task: tasks.Task | None) -> base.Source:
  source = imports.call(data.source, "a source, source(data, split)", data,
                        split)
  wanted = ["__len__", "__getitem__", "n_classes"]
  if _needs(task) == "object":
    wanted += ["class_names", "category_ids", "sizes", "has_objects",
               "annotations"]
  missing = [name for name in wanted if not hasattr(source, name)]
  if missing:
    raise errors.ConfigError(
        f"config.data.source: {data.source} gave a {type(source).__name__}, "
        f"which has no {', no '.join(missing)}; a source has a length, records "
        '{"image", "label"} by index, and n_classes; what one of objects has '
        "is in metaformer_jax.data.sources.base")
  return source


def classes(data: schema.Data,
            task: tasks.Task | None = None) -> base.Classes:
  """The classes of the training split; images are not read.

  The arguments are as for `create`.

  Raises:
    ConfigError: as `create`.
  """
  match data.source:
    case "folder":
      return folders.classes(data)
    case "ade20k" | "label_maps":
      return label_maps.classes(data)
    case "coco":
      return coco.classes(data, _has_masks(task))
    case "array_record":
      return prepared.classes(data)
    case "digits":
      return arrays.DIGITS
    case "scenes":
      return (arrays.DIGITS if _needs(task) == "object" else scenes.CLASSES)
  source = create(data, "train", task=task)
  return base.Classes(source.n_classes, getattr(source, "class_names", None))


def reduces_zero_label(data: schema.Data) -> bool:
  """Whether 0 in label maps is what has no class, and a class is one less.

  Raises:
    ConfigError: as `create`.
  """
  if data.source == "array_record":
    return prepared.reduces_zero_label(data)
  return data.source == "ade20k"


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake in an experiment's configuration of its data.

  Args:
    cfg: an experiment; each of its values was checked alone.
    files: whether the data must be on this machine.
    train: whether the training split must be there, too.
  """
  name = cfg.data.source
  if imports.is_path(name):
    return
  kind, needed = _KINDS[name], _needs(cfg.task)
  if needed not in (None, *kind.labels):
    suitable = [n for n, k in _KINDS.items() if needed in k.labels]
    yield (f"config.data.source: {name} has a label for each "
           f"{' or '.join(kind.labels)}, "
           f"but {cfg.task.name} needs one for each {needed}; valid: "
           f"{', '.join(suitable)}")
    return
  yield from kind.check(cfg, files, train)
