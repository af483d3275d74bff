"""The modules of docs/extending.md, as a user would have them."""

import pathlib
import re

GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "extending.md"


def write_modules(folder: pathlib.Path) -> list[str]:
  """Writes each block that begins with "# NAME.py"; returns the names."""
  blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", GUIDE.read_text(),
                      re.DOTALL)
  for name, code in blocks:
    (folder / name).write_text(code)
  return [name for name, _ in blocks]
