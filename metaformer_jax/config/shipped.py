"""The config files that come with the package: configs/."""

import os
import pathlib

_PACKAGE = pathlib.Path(__file__).parents[1]
# In what pip installs inside the package, in a checkout beside it (setup.py).
FOLDER = _PACKAGE / "configs"
if not FOLDER.is_dir():
  FOLDER = _PACKAGE.parent / "configs"


def find(config: str) -> str:
  """The config file that a command line means.

  Args:
    config: a path, with or without a variant: "configs/caformer.py:s18".

  Returns:
    The same; but for configs/NAME, where the working directory has no such
    file, that of this name that comes with the package, if there is one.
  """
  file, *variant = config.split(":", 1)
  ours = FOLDER.parent / file
  if ours.parent != FOLDER or os.path.isfile(file) or not os.path.isfile(ours):
    return config
  return ":".join([str(ours), *variant])
