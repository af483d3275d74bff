"""What the launcher did in a test: its commands, and the fake cloud's state."""

import ast
import os
import pathlib
import shlex

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "launch"


def commands(folder: pathlib.Path) -> str:
  """The commands that were run, one per line."""
  calls = (folder / "calls").read_text().splitlines()
  return "".join(f"{shlex.join(ast.literal_eval(c))}\n" for c in calls)


def read_state(folder: pathlib.Path) -> dict:
  """The final state of the fake cloud."""
  return ast.literal_eval((folder / "state").read_text())


def check_golden(name: str, found: str, folder: pathlib.Path) -> None:
  """Compares commands with a golden file."""
  found = found.replace(str(folder), "SOURCE").replace(str(ROOT), "ROOT")
  path = GOLDEN / f"{name}.txt"
  if os.environ.get("UPDATE_GOLDEN"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found)
  assert found == path.read_text()
