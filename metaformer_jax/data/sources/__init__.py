"""Data sets: where records come from.

Each module opens one kind of data set, and checks the configuration of it;
`config.data.source` chooses the module here.
"""

from collections.abc import Iterator

from metaformer_jax.config import schema
from metaformer_jax.data.sources import arrays, base, folders, tfds

_CHECKS = {"digits": arrays.check_digits, "folder": folders.check,
           "idx": arrays.check_idx, "tfds": tfds.check}


def create(data: schema.Data, split: str, numbered: bool = False,
           ) -> base.Source:
  """Opens the "train" or the "eval" split that the config names.

  Args:
    data: the kind of data set and its place.
    split: "train" or "eval".
    numbered: source folder: the names of the class folders are the classes.

  Raises:
    ConfigError: the data is missing, or cannot be read; says which part.
  """
  train = split == "train"
  match data.source:
    case "digits":
      return arrays.digits(train)
    case "folder":
      return folders.create(data, train, numbered)
    case "idx":
      return arrays.idx(data.path, train)
    case "tfds":
      return tfds.create(data.name, data.path,
                         data.train_split if train else data.eval_split, train)
  raise ValueError(f"unknown source {data.source!r}")


def check(cfg: schema.Experiment, files: bool) -> Iterator[str]:
  """Yields a line per mistake in an experiment's configuration of its data.

  Args:
    cfg: an experiment; each of its values was checked alone.
    files: whether the data must be on this machine.
  """
  yield from _CHECKS[cfg.data.source](cfg, files)
