"""How tools print rows: as a table, as JSON or as comma-separated values."""

import csv
import io
import json
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


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Rows with the same keys, as aligned columns below their names."""

  def shown(value):
    if value is None:
      return ""
    if isinstance(value, float):
      return f"{value:.4f}"
    return f"{value:,}" if type(value) is int else errors.one_line(value)

  cells = [list(rows[0]), *([shown(v) for v in row.values()] for row in rows)]
  widths = [max(map(len, column)) for column in zip(*cells)]
  left = [isinstance(value, str) for value in rows[0].values()]
  return "\n".join("  ".join(
      cell.ljust(width) if is_left else cell.rjust(width)
      for cell, width, is_left in zip(line, widths, left)).rstrip()
      for line in cells)
