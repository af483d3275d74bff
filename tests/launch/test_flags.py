"""docs/tpu/flags.md against what --dry_run prints."""

import re
import shlex

import pytest
import test_launch
import test_mig
from launches import ROOT

PAGE = ROOT / "docs" / "tpu" / "flags.md"
WIDE = "all of them"
ROW = re.compile(r"^\| (?:`(gcloud [^`]*)`|(all of them)) \| ([^|]*) \| "
                 r"`([^`]+)`[^|]* \| (\d{4}-\d\d-\d\d), (help|excerpt)[^|]* "
                 r"\|$", re.MULTILINE)
DRY = [*test_launch.DRY.values(), *test_mig.DRY.values()]


def table() -> dict[str, set[str]]:
  """Command -> the flags in its rows."""
  found = {}
  for command, wide, flags, *_ in ROW.findall(PAGE.read_text()):
    found.setdefault(command or wide, set()).update(
        re.findall(r"`(--[a-z-]+)`", flags.replace("`--create_flag`", "")))
  return found


@pytest.fixture
def printed(launcher, capsys):
  """(command, its flags) of everything that is printed, for both services."""
  for command, *rest in DRY:
    assert launcher.main([command, "--dry_run", *rest]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  return [(" ".join(word for word in line if not word.startswith("--")),
           {word.partition("=")[0] for word in line if word.startswith("--")})
          for line in lines if line[0] == "gcloud"]


def test_every_flag_that_is_printed_stands_in_the_table(printed):
  rows = table()
  seen = {command: set() for command in rows}
  for words, flags in printed:
    command = max((row for row in rows if f"{words} ".startswith(f"{row} ")),
                  key=len)
    missing = flags - rows[command] - rows[WIDE]
    assert not missing, (command, missing)
    seen[command] |= flags - rows[WIDE]
    seen[WIDE] |= flags & rows[WIDE]
  assert seen == rows  # Nothing else stands there.


def test_each_row_has_a_reference_and_a_date():
  rows = [line for line in PAGE.read_text().splitlines()
          if line.startswith(("| `gcloud ", f"| {WIDE}"))]
  assert len(rows) == len(ROW.findall(PAGE.read_text())) > 15
  for command, _, _, reference, *_ in ROW.findall(PAGE.read_text()):
    path = command.removeprefix("gcloud ").replace(" ", "/") or "index"
    assert reference.removeprefix("beta/") == path
