"""timm 0.6.11, with which the published models were trained, in parts.

Python 3.11 cannot import its models, nor therefore the package.
"""

import importlib
import pathlib
import sys
import types

VERSION = "0.6.11"
_NAME = "timm_0_6_11"


def load(folder, module: str):
  """Imports a module, e.g. "scheduler.scheduler_factory".

  Args:
    folder: with timm 0.6.11, as `pip install --no-deps --target=DIR` makes it.
    module: with relative imports only.
  """
  folder = pathlib.Path(folder, "timm")
  if VERSION not in (folder / "version.py").read_text():
    raise ValueError(f"{folder} is not timm {VERSION}")
  for part in ("", ".optim"):
    package = types.ModuleType(_NAME + part)
    package.__path__ = [str(folder / part.removeprefix("."))]
    sys.modules.setdefault(_NAME + part, package)
  return importlib.import_module(f"{_NAME}.{module}")
