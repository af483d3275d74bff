"""The blocks of code in README.md and docs/*.md.

A comment in the line before a block says how it is covered, if it is neither
executed with its page nor parsed as commands:

    <!-- source: metaformer_jax/models/mixers.py -->    quotes this file
    <!-- not run: needs a TPU -->                       nothing does, and why
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_MARK = re.compile(r"<!-- (source|not run): (.+) -->\n$")
# Indented commands, after an empty line.
_INDENTED = re.compile(r"(?<=\n\n)(?: {4}(?! *[-*] | *\d+\. ).*\n)+",
                       re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
  """A block of code: its page, first line, language, text, and mark."""

  page: pathlib.Path
  line: int
  language: str
  text: str
  mark: str | None = None  # "source" or "not run".
  why: str = ""

  def __str__(self):
    return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: pathlib.Path, language: str | None = None) -> list[Block]:
  """The blocks of a page in order, of a language or of all.

  Indented ones count as bash.
  """
  text = page.read_text()
  found = []
  for match in _FENCE.finditer(text):
    mark = _MARK.search(text[:match.start()])
    found.append(_block(page, text, match, match[1], match[2], mark))
  rest = _FENCE.sub(lambda m: re.sub(r"[^\n]", "x", m[0]), text)
  for match in _INDENTED.finditer(rest):
    code = re.sub(r"^ {4}", "", match[0], flags=re.MULTILINE)
    found.append(_block(page, text, match, "bash", code, None))
  found.sort(key=lambda block: block.line)
  return [b for b in found if language in (None, b.language)]


def _block(page, text, match, language, code, mark):
  line = text.count("\n", 0, match.start()) + 1
  return Block(page, line, language, code, *(mark.groups() if mark else ()))


def write_file(block: Block, folder: pathlib.Path) -> str | None:
  """Writes a block that begins with "# NAME.py"; returns the name, or None."""
  if match := re.match(r"# (\w+\.py)\n", block.text):
    (folder / match[1]).write_text(block.text[match.end():])
    return match[1]
  return None


def write_files(page: pathlib.Path, folder: pathlib.Path) -> list[str]:
  """Writes the files that are on a page; returns their names."""
  return list(filter(None, (write_file(block, folder)
                            for block in blocks(page, "python"))))


def run_python(page: pathlib.Path, names: dict[str, Any] | None = None,
               changes: Iterable[tuple[str, str]] = ()) -> dict[str, Any]:
  """Executes a page's Python blocks in order, in one namespace.

  Args:
    page: its path. Blocks with a mark, and files ("# NAME.py"), are left out.
    names: what is defined before.
    changes: (old, new) text of the code, each of which must be in it.

  Returns:
    The namespace.
  """
  namespace = {"__name__": "__page__"} | (names or {})
  code = {block: block.text for block in blocks(page, "python")
          if not block.mark and not re.match(r"# \w+\.py\n", block.text)}
  for old, new in changes:
    assert any(old in text for text in code.values()), f"{page}: {old}"
    code = {block: text.replace(old, new) for block, text in code.items()}
  for block, text in code.items():
    # Line numbers of a traceback are those of the page.
    text = "\n" * block.line + text
    exec(compile(text, str(block.page), "exec"), namespace)
  return namespace
