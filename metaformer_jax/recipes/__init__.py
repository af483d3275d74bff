"""Published training recipes: one file per task.

A file of a family in configs/ has a table of its variants, which `variant`
reads.
"""

from collections.abc import Mapping
from typing import Any

from metaformer_jax import errors


def variant(table: Mapping[str, Any], name: str | None) -> Any:
  """The row of a config file's table that --config=FILE.py:NAME asks for.

  Args:
    table: variants by name.
    name: as given to `get_config`; None if the command line names none.

  Raises:
    ConfigError: no variant is named, or an unknown one.
  """
  if not name:
    raise errors.ConfigError(
        f"needs a variant, as in FILE.py:{next(iter(table))}; valid: "
        f"{', '.join(table)}")
  if name not in table:
    raise errors.ConfigError(
        f"{name!r} is not a variant{errors.did_you_mean(name, table)}")
  return table[name]
