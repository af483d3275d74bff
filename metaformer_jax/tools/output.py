"""How tools print rows: as a table, as JSON or as comma-separated values.

And how they write JSON files.
"""

import csv
import io
import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from metaformer_jax import errors

Rows = Sequence[Mapping[str, Any]]


def write(rows: Rows, form: str, header: bool = True) -> None:
  """Prints rows with the same keys to stdout.

  Args:
    rows: one or more; the values are text, numbers, booleans or None.
    form: "table"; "json": an object on each line; or "csv".
    header: csv: whether to begin with the names of the columns.
  """
  if isinstance(sys.stdout, io.TextIOWrapper):
    # The name of a file may be any bytes; Python has them as surrogates.
    sys.stdout.reconfigure(errors="surrogateescape")
  if form == "csv":
    writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
    if header:
      writer.writeheader()
    writer.writerows(rows)
  elif form == "json":
    print(*map(json.dumps, rows), sep="\n")
  else:
    print(table(rows))
  sys.stdout.flush()


def table(rows: Sequence[Mapping[str, Any]],
          digits: Mapping[str, int] | None = None) -> str:
  """Rows with the same keys, as aligned columns below their names.

  Args:
    rows: one or more.
    digits: after the point, by column; by default 4.
  """

  def shown(key, value):
    if value is None:
      return ""
    if isinstance(value, float):
      return f"{value:,.{(digits or {}).get(key, 4)}f}"
    return f"{value:,}" if type(value) is int else errors.one_line(value)

  cells = [list(rows[0]),
           *([shown(*item) for item in row.items()] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  left = [isinstance(value, str) for value in rows[0].values()]
  return "\n".join("  ".join(
      cell.ljust(width) if is_left else cell.rjust(width)
      for cell, width, is_left in zip(line, widths, left)).rstrip()
      for line in cells)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes standard JSON into a file, which is complete or absent.

  Raises:
    OSError: it cannot be written; an existing file is unchanged.
  """
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    with open(partial, "w", encoding="utf-8") as file:
      json.dump(content, file, allow_nan=False)
      file.write("\n")
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
