"""ConfigDict: the tree of keys that config files and recipes change.

It is that of ml_collections. Where ml_collections is not installed, recipes
change a plain tree, so that `tools.benchmark --model` runs without it; config
files and overrides need the original.
"""

from typing import Any

try:
  from ml_collections import ConfigDict
  from ml_collections.config_dict import FieldReference
except ModuleNotFoundError as e:
  if e.name != "ml_collections":
    raise

  class ConfigDict(dict):
    """A dict whose items are attributes, too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
    to_dict = dict.copy

  def FieldReference(value: Any, field_type: type) -> Any:
    """The value: types are checked when the tree is complete."""
    del field_type
    return value

__all__ = ["ConfigDict", "FieldReference"]
