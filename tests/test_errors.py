"""Messages for the terminal."""

import time

import pytest

from metaformer_jax import errors


@pytest.mark.parametrize("text, line", [
    ("as it is", "as it is"), (" a\n b\t\r\nc ", "a b c"), ("", ""),
    ("\x1b[2J\x07", "?[2J?"), ("caf\u00e9 \u202ename", "caf\u00e9 ?name"),
    (ValueError("a\nb"), "a b")])
def test_one_line_is_printable(text, line):
  assert errors.one_line(text) == line
  assert errors.one_line(text).isprintable()


def test_a_long_line_keeps_its_beginning_and_its_end():
  line = errors.one_line("where: " + "a\n" * 10**6 + "do this")
  assert len(line) < 6100 and line.isprintable()
  assert line.startswith("where: a a ") and line.endswith(" a a do this")
  assert f"... ({len('where: do this') + 2 * 10**6 - 6000} more charac" in line
  assert errors.one_line("a" * 6200) == "a" * 6200
  assert errors.one_line(line) == line


def test_long_names_are_compared_soon():
  names = [f"{i}{'ab' * 4000}" for i in range(1000)]
  start = time.process_time()
  assert errors.nearest("ba" * 4000, names) != []
  assert time.process_time() - start < 2


@pytest.mark.parametrize("name, valid, found", [
    # A typing error is nearer than any other name of the family.
    ("poolfomer_s24", ["poolformer_s12", "poolformer_s24"], ["poolformer_s24"]),
    # No such size: those that are as near, the longest common start first.
    ("poolformer_s13", ["poolformer_s36", "poolformer_s12", "resnet18"],
     ["poolformer_s12", "poolformer_s36"]),
    # A family, a word and initials stand for what has them.
    ("resnet", ["pvt_tiny", "resnet18", "resnet50"], ["resnet18", "resnet50"]),
    ("train", ["test", "train_split", "erasing"], ["train_split", "erasing"]),
    ("lr", ["beta1", "base_lr", "min_lr"], ["base_lr", "min_lr"]),
    ("learning_rate", ["drop_rate", "base_lr"], ["base_lr"]),
    ("wd", ["widths", "weight_decay"], ["weight_decay"]),
    ("PoolFormer-S12", ["poolformer_s12", "poolformer_s24"],
     ["poolformer_s12"]),
    ("caformer_s18", ["caformer", "resnet18"], ["caformer"]),
    # At most three, and none that is not like it.
    ("a1", ["a2", "a3", "a4", "a5"], []),
    ("aa1", ["aa2", "aa3", "aa4", "aa5"], ["aa2", "aa3", "aa4"]),
    ("zzz", ["seed", "init"], []), ("", ["seed"], []), ("x", [], [])])
def test_nearest_names_are_useful_and_in_order(name, valid, found):
  assert errors.nearest(name, valid) == found


def test_suggestions_are_a_question_or_the_choices():
  assert errors.did_you_mean("sed", ["seed", "init"]) == "; did you mean seed?"
  assert errors.did_you_mean("aa1", ["aa3", "aa2"]) == (
      "; did you mean aa2 or aa3?")
  assert errors.did_you_mean("zz", ["b", "a"]) == "; valid: a, b"
  assert errors.did_you_mean("zz", []) == ""
  assert errors.did_you_mean(
      "s24", ["configs/s24.py", "configs/s12.py"],
      by=lambda path: path[8:-3]) == "; did you mean configs/s24.py?"
