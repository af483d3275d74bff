"""Folders of transformers and timm, and changed copies of them.

golden/huggingface has small models with the programs' outputs
(make_huggingface.py). Their settings differ from the defaults.
"""

import json
import pathlib
import shutil

import numpy as np

from metaformer_jax.config.hub import folders
from metaformer_jax.convert import files

GOLDEN = pathlib.Path(__file__).parent / "golden/huggingface"
NAMES = ("cat", "dog", "bird", "fish", "frog")


def changed(parent, name, change=None, file="config.json", **keys):
  """A copy of a folder with other keys in one of its JSON files.

  `change` changes the file's content, or returns another one.
  """
  folder = parent / "a copy" / name
  shutil.copytree(GOLDEN / name, folder)
  content = json.loads((folder / file).read_text())
  if change is not None:
    content = change(content) or content
  if keys:
    content.update(keys)
  (folder / file).write_text(json.dumps(content))
  return folder


def tensors_of(folder):
  """All tensors of a folder, whatever its files."""
  where = folders.weights(folder)
  return (files.read_shards(where) if isinstance(where, dict)
          else files.read_tensors(where))


def check_equal(got, want):
  assert got.keys() == want.keys()
  for name, value in want.items():
    assert np.array_equal(got[name], value), name
