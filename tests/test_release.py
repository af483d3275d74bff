"""What is installed: commands, config files, metadata. CI builds it."""

import pathlib
import re
import runpy

import command_line
import pytest
import setuptools

import metaformer_jax
from metaformer_jax import errors
from metaformer_jax.config import shipped
from metaformer_jax.tools import study

ROOT = command_line.ROOT
TOOLS = ROOT / "metaformer_jax" / "tools"


@pytest.fixture(scope="module")
def metadata():
  """The arguments that setup.py gives to setuptools."""
  found = {}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(setuptools, "setup", lambda **kwargs: found.update(kwargs))
    patch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
  return found


def test_every_tool_is_a_command(metadata):
  commands = dict(
      entry.split(" = ") for entry in
      metadata["entry_points"]["console_scripts"])
  expected = {"metaformer-train": "metaformer_jax.main:console"} | {
      f"metaformer-{path.stem.replace('_', '-')}":
          f"metaformer_jax.tools.{path.stem}:console"
      for path in TOOLS.glob("*.py") if "__main__" in path.read_text()}
  assert commands == expected
  for name, place in commands.items():
    module = place.removesuffix(":console").replace(".", "/")
    text = (ROOT / f"{module}.py").read_text()
    assert f'def console() -> None:\n  """The command {name}."""\n' in text
    assert text.endswith('if __name__ == "__main__":\n  console()\n')


def test_a_tool_is_named_as_it_was_started():
  done = command_line.python(
      ["-c", "import sys; sys.argv = ['/bin/metaformer-checkpoints', '--help'];"
       "from metaformer_jax.tools import checkpoints; checkpoints.console()"])
  assert done.stdout.startswith("usage: metaformer-checkpoints [-h] ")


def test_versions_and_titles_agree(metadata):
  citation = (ROOT / "CITATION.cff").read_text()
  assert f"\nversion: {metaformer_jax.__version__}\n" in citation
  assert metadata["version"] == metaformer_jax.__version__
  titles = re.findall(r"^  title={(.*)},$", (ROOT / "README.md").read_text(),
                      re.MULTILINE)
  assert titles
  for title in [*titles, *metadata["project_urls"]]:
    assert f'title: "{title}"' in citation
  for url in metadata["project_urls"].values():
    assert f'url: "{url}"' in citation


def test_types_are_announced(metadata):
  [[package, files]] = metadata["package_data"].items()
  assert [(ROOT / package / name).is_file() for name in files] == [True]
  assert "Typing :: Typed" in metadata["classifiers"]


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  ours = ROOT / "configs"
  assert shipped.find("configs/quickstart.py") == str(ours / "quickstart.py")
  assert shipped.find("./configs/caformer.py:s18:x") == (
      f"{ours / 'caformer.py'}:s18:x")
  for other in ("quickstart.py", "my/configs/quickstart.py", "configs", "",
                "configs/none.py", "configs/../configs/quickstart.py",
                f"configs/{'a' * 5000}.py", "configs/\0.py",
                str(ours / "quickstart.py"), "/configs/quickstart.py"):
    assert shipped.find(other) == other


def test_a_config_of_ones_own_comes_first(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("configs").mkdir()
  pathlib.Path("configs/quickstart.py").touch()
  assert shipped.find("configs/quickstart.py") == "configs/quickstart.py"
  assert shipped.find("configs/deit.py") == str(ROOT / "configs" / "deit.py")


@pytest.mark.parametrize("args,error", [
    # The file was loaded: its table has the variants, its keys the values.
    (["--config=configs/caformer.py:s19"], f"ConfigError: {ROOT}/configs/"
     "caformer.py: 's19' is not a variant; did you mean s18"),
    (["--config", "configs/quickstart.py", "--config.seed=x"],
     "ConfigError: config.seed: 'x' is not valid"),
    (["--config=configs/quickstar.py"], "ConfigError: --config: "
     "configs/quickstar.py is not a file; did you mean configs/quickstart.py"),
])
def test_the_command_line_finds_them(args, error, tmp_path):
  done = command_line.python(["-m", "metaformer_jax.main", *args], cwd=tmp_path)
  assert (done.returncode, done.stdout) == (2, "")
  assert done.stderr.startswith(error)
  assert done.stderr.count("\n") == 1


def test_a_study_finds_them(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", [
      "study", "--config=configs/ablations.py", "--workdir=x", "--only=pool_4"])
  with pytest.raises(errors.ConfigError, match="no variant matches 'pool_4'"):
    study.main(study.parse())


def test_what_is_public_is_there():
  """Type checkers read the list, Python the table of places."""
  assert metaformer_jax.__all__ == sorted(metaformer_jax._WHERE)
  for name in metaformer_jax.__all__:
    assert getattr(metaformer_jax, name).__name__ == name
