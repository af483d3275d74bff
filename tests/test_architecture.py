"""The shape of the code: which way imports point, and how long files are."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "metaformer_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package besides itself (docs/design.md).
# A part is a file or folder of the package; "" is the package's own __init__.
CONFIG = {"errors", "experiment"}
ALLOWED = {
    "": {"models", "training"},
    "errors": set(),
    "experiment": set(),
    "models": {"errors"},
    "convert": {"errors", "models"},
    "checks": CONFIG | {"data", "models"},
    "config": CONFIG | {"checks"},
    "recipes": {"config", "models"},
    "data": CONFIG,
    "evaluation": set(),
    "tasks": CONFIG | {"models", "data", "evaluation"},
    "training": CONFIG | {"checks", "config", "convert", "models", "tasks"},
    "cli": CONFIG | {"config", "training"},
    "main": {"cli", "experiment", "tasks", "training"},
    "doctor": CONFIG,
    "preflight": CONFIG | {"models", "tasks", "training"},
    "tools": CONFIG | {"checks", "cli", "config", "convert", "data", "doctor",
                       "models", "preflight", "tasks", "training"},
}
# Of the tasks these know the protocol only; of data, checks the strings.
ALLOWED_MODULES = {"training": {"tasks.base"}, "preflight": {"tasks.base"},
                   "checks": {"data.policies"}}

HEAVY = {"tensorflow", "tensorflow_datasets", "torch"}


def part_of(path: pathlib.Path) -> str:
  first = path.relative_to(PACKAGE).parts[0]
  return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: pathlib.Path):
  """Yields (module, whether at the top level) of every import in a file."""
  tree = ast.parse(path.read_text())
  top = set(tree.body)
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for name in node.names:
        yield name.name, node in top
    elif isinstance(node, ast.ImportFrom):
      for name in node.names:
        yield f"{node.module}.{name.name}", node in top


@pytest.mark.parametrize("path", FILES,
                         ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
  part = part_of(path)
  for module, at_top in imports(path):
    names = module.split(".")
    assert not (at_top and names[0] in HEAVY), module
    assert names[0] not in ("configs", "tests"), module
    if names[0] != "metaformer_jax" or len(names) == 1:
      continue
    target = names[1]
    assert target == part or target in ALLOWED[part], module
    allowed = ALLOWED_MODULES.get(part, set())
    if any(m.split(".")[0] == target for m in allowed):
      assert ".".join(names[1:3]) in allowed, module


def test_every_part_is_ruled():
  assert {part_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", [
    *FILES, *sorted((ROOT / "configs").glob("*.py")),
    *sorted((ROOT / "launch").glob("*.py")),
    *sorted((ROOT / "tests").glob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long_or_named_for_nothing(path):
  assert len(path.read_text().splitlines()) <= 400
  assert path.stem not in ("util", "utils", "misc", "helpers", "common")


def test_only_the_entry_points_see_a_config_dict():
  for path in FILES:
    if "ml_collections" in path.read_text():
      assert part_of(path) in ("config", "cli", "recipes"), path


def test_tensorflow_and_torch_are_imported_in_one_place_at_most():
  places = [path.relative_to(PACKAGE).as_posix() for path in FILES
            for module, _ in imports(path) if module.split(".")[0] in HEAVY]
  assert set(places) == {"data/tfds_source.py"}
