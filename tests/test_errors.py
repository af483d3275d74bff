"""Messages for the terminal."""

import pytest

from metaformer_jax import errors


@pytest.mark.parametrize("text, line", [
    ("as it is", "as it is"), (" a\n b\t\r\nc ", "a b c"), ("", ""),
    ("\x1b[2J\x07", "?[2J?"), ("caf\u00e9 \u202ename", "caf\u00e9 ?name"),
    (ValueError("a\nb"), "a b")])
def test_one_line_is_printable(text, line):
  assert errors.one_line(text) == line
  assert errors.one_line(text).isprintable()
