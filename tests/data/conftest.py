"""Data sets that several files of tests read."""

import pytest
import tiny_imagenet


@pytest.fixture(scope="session")
def tfds_data(tmp_path_factory):
  """{format: data_dir} of imagenet2012, prepared by TFDS and TensorFlow."""
  pytest.importorskip("tensorflow_datasets")
  root = tmp_path_factory.mktemp("imagenet")
  tiny_imagenet.write_tars(root / "tars")
  tiny_imagenet.python("-c", f"""
import pathlib
import tiny_imagenet

root = pathlib.Path({str(root)!r})
for file_format in {tiny_imagenet.FORMATS}:
  tiny_imagenet.prepare_tfds(root / "tars", root / file_format, file_format)
""")
  return {name: root / name for name in tiny_imagenet.FORMATS}
