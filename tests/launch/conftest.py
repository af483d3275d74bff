"""The launcher, as it is when its folder is on sys.path."""

import importlib
import pathlib
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def launcher():
  """The launcher, imported with its folder on sys.path, as when it is run."""
  sys.path.insert(0, str(LAUNCH))
  try:
    yield importlib.import_module("tpu_vm")
  finally:
    sys.path.remove(str(LAUNCH))
