"""Data sets prepared by TensorFlow Datasets, read without TensorFlow.

Preparing a data set needs TensorFlow, reading does not: both of TFDS' formats
are read here by index. Images stay encoded; `data.images` decodes them.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

from metaformer_jax import errors, storage
from metaformer_jax.config import schema
from metaformer_jax.data.sources import (
  array_records,
  base,
  fingerprints,
  tfrecords,
)


def create(name: str, data_dir: str | None, split: str | None,
           train: bool) -> base.Source:
  """Opens a split of a prepared data set.

  Args:
    name: of the data set, "imagenet2012" or "name/config:version".
    data_dir: where it was prepared; None for TFDS' default.
    split: in TFDS' notation, "train[:90%]". None: "train" for training; for
      evaluation "validation", or "test" if there is no such split.
    train: whether the split is for training.

  Raises:
    ConfigError: TFDS is not installed; or the data set or the split is not
      there, is damaged, or is not one of images with a class each.
  """
  try:
    import tensorflow_datasets as tfds  # noqa: PLC0415  An extra, and slow.
  except ImportError as e:
    raise errors.ConfigError(
        "config.data.source: tfds needs TensorFlow Datasets; "
        "pip install 'metaformer-jax[tfds]'") from e

  data_dir = os.path.expanduser(data_dir) if data_dir else None
  try:
    builder = tfds.builder(name, data_dir=data_dir)
    splits = builder.info.splits
  except tfds.core.DatasetNotFoundError as e:
    known = tfds.list_builders(with_community_datasets=False)
    raise errors.ConfigError(
        f"config.data.name: TFDS has no data set {name!r}"
        f"{errors.did_you_mean(name, known)}") from e
  except Exception as e:  # TFDS raises many types, with many lines.
    raise errors.ConfigError(
        f"config.data.name: TFDS cannot open {name!r} in "
        f"{data_dir or 'its default folder'}: "
        f"{errors.one_line(f'{type(e).__name__}: {e}')}") from e
  if not splits:
    raise errors.ConfigError(
        f"config.data.path: {name} is not prepared in {builder.data_dir}; "
        f"prepare it where TensorFlow is installed: tfds build {name} "
        f"--data_dir={data_dir or '~/tensorflow_datasets'}")
  if split is None:
    split = ("train" if train else
             "validation" if "validation" in splits else "test")
  key = "config.data." + ("train_split" if train else "eval_split")
  try:
    info = splits[split]
  except (KeyError, ValueError) as e:
    raise errors.ConfigError(
        f"{key}: {name} has no split {split!r}"
        f"{errors.did_you_mean(split, splits)}") from e
  features = builder.info.features
  for feature in ("image", "label"):
    if feature not in features:
      raise errors.ConfigError(
          f"config.data.name: {name} has no feature {feature!r}, only "
          f"{', '.join(features)}")
  if not hasattr(features["label"], "num_classes"):
    raise errors.ConfigError(
        f"config.data.name: the label of {name} is not a class")
  if info.num_examples <= 0:
    raise errors.ConfigError(f"{key}: {split!r} of {name} is empty")
  return TfdsSource(_records(name, builder, info), features, [
      os.fspath(part.filename) for part in info.file_instructions])


def _records(name: str, builder: Any, info: Any) -> Sequence[bytes]:
  """Opens the files of a split; ConfigError as for `create`."""
  file_format = builder.info.file_format.value
  if file_format == "array_record":
    return array_records.Records(info.file_instructions)
  if file_format != "tfrecord":
    raise errors.ConfigError(
        f"config.data.path: {name} is prepared as {file_format}, which has no "
        "random access; prepare it with --file_format=array_record")
  if storage.is_remote(builder.data_dir):
    raise errors.ConfigError(
        f"config.data.path: {name} is prepared as tfrecord, which is not read "
        f"from {storage.SCHEME}; {base.ELSEWHERE}, or prepare it with "
        "--file_format=array_record")
  return tfrecords.Records(info.file_instructions)


def check(cfg: schema.Experiment, files: bool,
          train: bool = True) -> Iterator[str]:
  """Yields a line per mistake that can be found without TFDS."""
  del train
  data = cfg.data
  if not data.name:
    yield (f"config.data.name: {data.name!r} with source tfds; give the name "
           "of a data set, e.g. imagenet2012")
  if files and data.path:
    yield from base.check_folder(data, remote=True)


class TfdsSource:
  """A split of a TFDS data set with an image and a label."""

  def __init__(self, records, features, paths: Sequence[str] = ()):
    """Takes the serialized examples, by index, and their TFDS features.

    Args:
      records: the examples.
      features: of TFDS.
      paths: of the files that the examples are in.
    """
    self._records, self._features, self._paths = records, features, paths
    self._decoders: dict[str, Any] | None = None
    self.n_classes = features["label"].num_classes
    self.class_names = features["label"].names

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> base.Record:
    if self._decoders is None:
      import tensorflow_datasets as tfds  # noqa: PLC0415

      self._decoders = {"image": tfds.decode.SkipDecoding()}
    example = self._features.deserialize_example_np(
        self._records[index], decoders=self._decoders)
    record = {"image": example["image"], "label": int(example["label"])}
    name = example.get("file_name")  # ImageNet has it.
    if isinstance(name, bytes):
      record["path"] = os.fsdecode(name)
    return record

  def fingerprint(self) -> dict[str, str]:
    """`fingerprints.files` of the files that the examples are in."""
    return fingerprints.files(*(
        (os.path.dirname(path), [os.fsencode(os.path.basename(path))])
        for path in self._paths))
