"""The launcher, as it is when its folder is on sys.path."""

import importlib
import os
import sys

import pytest
from launches import ROOT

LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def launcher():
  """The launcher, imported with its folder on sys.path, as when it is run."""
  sys.path.insert(0, str(LAUNCH))
  try:
    yield importlib.import_module("tpu_vm")
  finally:
    sys.path.remove(str(LAUNCH))


@pytest.fixture
def world(launcher, tmp_path, monkeypatch):
  """Puts the fake gcloud on PATH; returns a function that sets the scenario."""
  for name in ("gcloud", "git"):
    program = tmp_path / "bin" / name
    program.parent.mkdir(exist_ok=True)
    # Without site-packages it starts in a few milliseconds.
    program.write_text(f"#!{sys.executable} -IS\nimport sys\n"
                       f"sys.path.append({str(ROOT / 'tests')!r})\n"
                       "import fake_gcloud\nsys.exit(fake_gcloud.main())\n")
    program.chmod(0o755)
  monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
  monkeypatch.setenv("FAKE_CLOUD", str(tmp_path))
  monkeypatch.setattr(launcher, "ROOT", tmp_path)  # The checkout to run.
  # One after the other, so that their order is always the same.
  monkeypatch.setattr(launcher.commands, "AT_ONCE", 1)

  def play(**scenario):
    (tmp_path / "scenario").write_text(repr(scenario))
    return tmp_path

  return play
