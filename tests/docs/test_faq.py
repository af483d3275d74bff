"""docs/faq.md: its messages are those of the code."""

import ast
import re

import pages
import pytest

PAGE = pages.ROOT / "docs" / "faq.md"
MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)


def _text(node) -> str:
  """A string of the code, with a zero byte for each value."""
  if isinstance(node, ast.Constant):
    return node.value
  if isinstance(node, ast.JoinedStr):
    return "".join(_text(part) for part in node.values)
  if isinstance(node, ast.BinOp):
    return _text(node.left) + _text(node.right)
  return "\0"


@pytest.fixture(scope="module")
def strings() -> str:
  """Every string of the package but docstrings, one a line."""
  found = []
  for path in sorted((pages.ROOT / "metaformer_jax").rglob("*.py")):
    nodes = list(ast.walk(ast.parse(path.read_text())))
    docstrings = {id(n.value) for n in nodes if isinstance(n, ast.Expr)}
    found += [
        re.sub(r"%[.\d]*[sdrfg]", "\0", _text(node)).replace("\n", " ")
        for node in nodes if id(node) not in docstrings
        and (isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Constant) and isinstance(node.value, str)))]
  return "\n".join(found)


@pytest.mark.parametrize("message", MESSAGES)
def test_the_code_has_the_message(message, strings):
  parts = [part.strip() for part in re.split(
      r"\.\.\.(?!\.)", message) if part.strip()]
  # Ellipses stand for values, the names of keys among them.
  pattern = r"[^\n]*?\0[^\n]*?".join(map(re.escape, parts))
  assert re.search(pattern, strings), message


def test_docstrings_are_no_messages(strings):
  assert len(MESSAGES) > 40 and "no such key" in strings
  assert "What to do if a step does not fit" not in strings
