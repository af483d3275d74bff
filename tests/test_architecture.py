"""The structure of the code: directions of imports, and length of files."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "metaformer_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# Modules of the package without jax, which configs are checked by.
TABLES = {"models.compiling", "models.options", "models.registry",
          "models.settings", "models.spec"}

# What each room may import of the package besides itself, `errors`, `imports`
# and `storage` (docs/design.md): rooms, or single modules of one. A room is a
# folder or file of the package; "" is the package's own __init__.
ALLOWED = {
    "": {"models", "checkpoints", "inference"},
    "errors": set(),
    "storage": {"gcs"},
    "gcs": set(),
    "command": {"runtime.signals", "runtime.streams"},
    "imports": set(),
    "models": {"kernels", "ops"},
    "kernels": {"ops"},
    "config": TABLES,
    "recipes": {"config", *TABLES},
    "data": {"config"},
    "evaluation": set(),
    "ops": set(),
    "heads": {"models", "ops"},
    "convert": {"config.tensor_files", "models"},
    "runtime": {"config"},
    "checkpoints": {"runtime", "config", "convert", "models"},
    "tasks": {"config", "models", "heads", "ops", "data", "evaluation"},
    "training": {"tasks.base", "checkpoints", "runtime", "config"},
    "preflight": {"training.step", "tasks.base", "models", "config", "runtime"},
    "doctor": {"config"},
    "benchmark": {"config", "models", "preflight", "runtime", "tasks",
                  "training"},
    "cli": {"command", "config", "data", "runtime", "tasks"},
    "main": {"cli", "config", "training"},
    "inference": {"checkpoints", "config", "convert", "data", "models",
                  "recipes", "tasks"},
    "testing": {"models"},
    "tools": {"benchmark", "checkpoints", "cli", "command", "config",
              "convert", "data", "doctor", "evaluation", "inference", "models",
              "ops", "preflight", "recipes", "runtime", "tasks", "training"},
}

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
    allowed = ALLOWED[part] | {part, "errors", "imports", "storage"}
    assert {names[1], ".".join(names[1:3])} & allowed, module


def test_every_room_has_a_rule():
  assert {part_of(path) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", [
    *FILES, *(path for folder in ("configs", "launch", "tests")
              for path in sorted((ROOT / folder).rglob("*.py")))],
    ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_long_or_named_for_nothing(path):
  assert len(path.read_text().splitlines()) <= 400
  assert path.stem not in ("util", "utils", "misc", "helpers", "common")


def test_only_the_entry_points_see_a_config_dict():
  for path in FILES:
    if "ml_collections" in path.read_text():
      assert part_of(path) in ("config", "cli", "recipes"), path


def test_tensorflow_and_torch_are_imported_in_one_place_each():
  places = [path.relative_to(PACKAGE).as_posix() for path in FILES
            for module, _ in imports(path) if module.split(".")[0] in HEAVY]
  # The second file is run by an interpreter that has PyTorch.
  assert set(places) == {"data/sources/tfds.py", "benchmark/theirs.py"}
