"""ImageNet-ReaL: new labels of the validation images, several per image.

Beyer et al., arXiv 2006.07159. real.json of
github.com/google-research/reassessed-imagenet has a list of classes for each of
the images ILSVRC2012_val_00000001 to 50000, in this order.
"""

import pathlib
import re
from typing import Any

import numpy as np

from metaformer_jax import errors
from metaformer_jax.config import json_data
from metaformer_jax.data.sources import base, fingerprints, folders

_MAX_BYTES = 2**24  # The official file has 0.5 million.


class RealLabels:
  """Adds "labels" to the records of a source: int32 [L], padded with -1.

  An image without labels has -1 only; evaluation leaves it out.
  """

  def __init__(self, source: folders.ClassFolders, path: str, n_classes: int):
    """Reads the file of labels.

    Args:
      source: the validation images, under their original names.
      path: of real.json.
      n_classes: each class must be below it.

    Raises:
      ConfigError: the file is malformed, or has no labels of an image.
    """
    file = pathlib.Path(path).expanduser()
    where = f"config.task.real_path: {file}"
    try:
      labels = json_data.read(file, _MAX_BYTES)
    except (OSError, ValueError) as e:
      raise errors.ConfigError(f"{where} cannot be read as JSON: {e}") from e
    if not isinstance(labels, list) or not labels:
      raise errors.ConfigError(f"{where} is not a list of lists of classes")
    for number, one in enumerate(labels, 1):
      if not isinstance(one, list) or len(one) > n_classes or not all(
          type(v) is int and 0 <= v < n_classes for v in one):
        raise errors.ConfigError(
            f"{where}: image {number} has {str(one)[:60]}, which is not a list "
            f"of classes below {n_classes}")
    numbered = np.full((len(labels), max(1, *map(len, labels))), -1, np.int32)
    for row, one in zip(numbered, labels):
      row[:len(one)] = one
    numbers = []
    for i in range(len(source)):
      image = pathlib.PurePath(source.path(i))
      match = re.fullmatch(r"ILSVRC2012_val_(\d{8})", image.stem)
      if not match or not 1 <= int(match[1]) <= len(labels):
        raise errors.ConfigError(
            f"{where} has labels of ILSVRC2012_val_{1:08} to "
            f"{len(labels):08}, not of {image}")
      numbers.append(int(match[1]))
    self._source = source
    self.n_classes = source.n_classes
    self._labels = numbered[np.array(numbers) - 1]

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> base.Record:
    return {**self._source[index], "labels": self._labels[index]}

  def fingerprint(self) -> dict[str, Any]:
    return {**fingerprints.of(self._source),
            "labels of real.json": fingerprints.arrays(self._labels)}
