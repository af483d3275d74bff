"""Patterns of parameters' paths, against a plain recursion, and their cost."""

import functools
import time

import numpy as np
import pytest

from metaformer_jax import errors
from metaformer_jax.config import globs


@functools.cache
def expected(pattern: str, path: str) -> bool:
  """What the docstring of `globs` says, of components."""

  def components(wanted, names):
    if not wanted:
      return True  # A path stands for all below it.
    if wanted[0] == "**":
      return components(wanted[1:], names) or (
          bool(names) and components(wanted, names[1:]))
    return bool(names) and characters(wanted[0], names[0]) and components(
        wanted[1:], names[1:])

  def characters(wanted, name):
    if not wanted:
      return not name
    if wanted[0] == "*":
      return characters(wanted[1:], name) or (
          bool(name) and characters(wanted, name[1:]))
    return bool(name) and wanted[0] == name[0] and characters(
        wanted[1:], name[1:])

  return components(pattern.split("/"), path.split("/"))


@pytest.mark.parametrize("pattern, yes, no", [
    ("stage1", ["stage1", "stage1/a", "stage1/a/b"], ["stage10/a", "a/stage1"]),
    ("stage*/norm", ["stage1/norm/scale", "stage/norm"],
     ["stage1/a/norm", "stage1/normal"]),
    ("**/kernel", ["kernel", "a/kernel", "a/b/kernel"], ["a/kernels"]),
    ("a/**/c", ["a/c", "a/b/c/d", "a/b/b/c"], ["b/a/c", "a/cc"]),
    ("*", ["a", "a/b"], []), ("**", ["a", "a/b"], []),
    ("a.c", ["a.c/b"], ["abc"]), ("[ab]", ["[ab]"], ["a"]),
    ("a?", ["a?"], ["ab"]), ("", [""], ["a"]), ("a/", [], ["a", "a/b"])])
def test_examples(pattern, yes, no):
  glob = globs.Glob(pattern)
  assert [p for p in yes + no if glob.matches(p)] == yes


def test_random_patterns_match_as_the_recursion_says():
  rng = np.random.default_rng(0)

  def drawn(symbols, most):
    return "".join(rng.choice(symbols, rng.integers(1, most)))

  found = set()
  for _ in range(4000):
    pattern = drawn(["a", "b", "*", "/", "/**/", "**/", "*a"], 7)
    glob = globs.Glob(pattern)
    for path in [drawn(["a", "b", "/", "ab"], 9) for _ in range(4)]:
      assert glob.matches(path) == expected(pattern, path), (pattern, path)
      found.add((glob.matches(path), "**" in pattern))
  assert len(found) == 4


@pytest.mark.parametrize("pattern, path", [
    ("*a" * 4000 + "b", "a" * 4000),
    ("*" * 8000 + "b", "a" * 8000),
    ("*ab" * 2700 + "*c", "ab" * 4000),
    ("**/" * 2700 + "b", "a/" * 1000 + "a"),
    ("**/*a*a*a*b/" * 600 + "c", ("a" * 50 + "/") * 500 + "a"),
    ("**/" + "a/" * 500 + "b", "a/" * 1000 + "a"),
    ("/*" * 4000 + "/b", "/a" * 4000)])
def test_no_pattern_takes_long(pattern, path):
  start = time.process_time()
  assert not globs.Glob(pattern).matches(path)
  assert time.process_time() - start < 1


def test_a_pattern_without_a_match_is_told_what_could_be_meant():
  paths = ["backbone/stage1/norm1/scale", "head/kernel"]
  for pattern, hint in {
      "kernel": r"; did you mean \*\*/kernel\?", "haed": "; did you mean head?",
      ".*kernel": "; did you mean head/kernel?",
      "x" * 8000: "; valid: "}.items():
    with pytest.raises(errors.ConfigError, match=hint) as e:
      globs.matching(pattern, paths, "config.a")
    assert str(e.value).startswith("config.a: '")
  assert globs.matching("**/norm1", paths, "config.a") == paths[:1]
